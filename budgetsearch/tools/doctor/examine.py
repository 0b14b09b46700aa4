"""The examination: every line, in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from budgetsearch.core.space.space import Space
from budgetsearch.core.targets import ALL_LINEAR, words_of
from budgetsearch.machine.detect import detect
from budgetsearch.machine.host import gib
from budgetsearch.machine.profiles import profile
from budgetsearch.run.configuration import check_one_model, load_settings
from budgetsearch.run.possible import check_possible, examined
from budgetsearch.run.preflight import INPUTS, largest_adapter, run_need
from budgetsearch.run.settings import Settings
from budgetsearch.run.spaces import load_space
from budgetsearch.storage.shared import folder_of, url_of
from budgetsearch.tools.doctor import card, host, hub, machine, model
from budgetsearch.tools.doctor.check import Check, attempt, ok
from budgetsearch.tools.doctor.hub import Repository
from budgetsearch.tools.doctor.model import ModelFacts
from budgetsearch.training.data.origins import origins_of

Say = Callable[[Check], None]


def examine(
    given: Mapping[str, Any],
    *,
    cache: Path,
    config: Path | None = None,
    say: Say = lambda check: None,
) -> list[Check]:
    """Look at everything that a run needs, without fetching, loading or writing anything of it.

    Args:
        given: settings as flags give them; the others come from where a run would take them.
        cache: the folder for converted models and tokenized data.
        config: a settings file; None: ``budgetsearch.yaml`` in the working folder, if there is one.
        say: hears of each check as soon as it is done.

    Raises:
        UsageError: a setting is unknown or out of range, or contradicts another one.
    """
    checks = []
    for check in _checks(given, cache, config):
        say(check)
        checks.append(check)
    return checks


def _checks(given: Mapping[str, Any], cache: Path, config: Path | None) -> Iterator[Check]:
    settings = load_settings(given, config)
    check_one_model(settings)
    if profile(settings.gpu).name == "cpu":
        detect(settings.gpu, settings.device)  # a contradiction between flags, not a fault of the machine
    space = load_space(settings.space)
    yield attempt("python", host.python)
    yield attempt("packages", host.packages)
    yield from _card(settings)
    yield from _model(settings, cache, space)
    yield from _inputs(settings, space)


def _inputs(settings: Settings, space: Space) -> Iterator[Check]:
    """What a run refuses, in its words."""
    for each in INPUTS:
        found = attempt(each.name, partial(each.look, settings, space))
        if isinstance(found, Check):
            yield found
        elif found:
            yield ok(each.name, found)


def _card(settings: Settings) -> Iterator[Check]:
    found = attempt("card", lambda: machine.ask(settings.gpu, settings.device))
    if isinstance(found, Check):
        yield found
        return
    for check in card.CHECKS:
        yield attempt(check.__name__, partial(check, found))


def _model(settings: Settings, cache: Path, space: Space) -> Iterator[Check]:
    asked = attempt("hub", lambda: _repositories(settings))
    repositories = [] if isinstance(asked, Check) else asked
    named = next((r for r in repositories if r.kind == "model"), None)
    facts = attempt("model", lambda: model.look(settings.model, cache, named))
    places = _places(settings, cache, facts, space)
    disks = attempt("disk", lambda: host.disks(places))
    yield from [disks] if isinstance(disks, Check) else disks
    if settings.shared:
        yield attempt("checkpoints", partial(host.shared_place, settings.shared))
    yield attempt("shared memory", host.shared_memory)
    yield asked if isinstance(asked, Check) else attempt("hub", lambda: hub.hub(asked))
    if isinstance(facts, Check):
        yield facts
        return
    for name, check in model.CHECKS.items():
        yield attempt(name, partial(check, facts))
    if facts.folder is not None:
        yield attempt("adapters", partial(_adapters, settings, facts.folder, space))


def _adapters(settings: Settings, folder: Path, space: Space) -> Check:
    """What a run finds out of the model's modules before it measures anything."""
    targets = space.targets(settings.targets)
    named = all(words_of(targets))  # else another line says so
    found = examined(folder, targets if named else ALL_LINEAR, settings.trust_remote_code)
    check_possible(settings.model, space.quantizations, found.refused)
    return ok("adapters", found.sentence().removeprefix("adapters "))


def _repositories(settings: Settings) -> list[Repository]:
    """What the Hub says of the model and the data, as far as they are on it."""
    found = [hub.ask_model(settings.model, settings.revision)] if model.on_hub(settings.model) else []
    named = [*origins_of(settings.data), *origins_of(settings.valid or "")]
    data = [hub.ask_data(origin.source) for origin in named]
    return found + [repository for repository in data if repository is not None]


def _places(settings: Settings, cache: Path, facts: ModelFacts | Check, space: Space) -> list[host.Place]:
    """The folders that a run writes to, and how much."""
    assert settings.out is not None
    if isinstance(facts, Check):
        return [host.Place("checkpoints", settings.out, None), host.Place("cache", cache, None)]
    model, fetched = facts.fetch_bytes, facts.fetch_bytes or 0
    places = [_run_place(settings, facts, space)]
    if facts.stored_in is None:
        return [*places, host.Place("cache", cache, model, fetched)]
    return [*places, host.Place("model", facts.stored_in, model, fetched), host.Place("cache", cache, 0)]


def _run_place(settings: Settings, facts: ModelFacts, space: Space) -> host.Place:
    """Where the checkpoints lie, with their usual need, the most that it may come to, and the least."""
    assert settings.out is not None
    if url_of(settings.shared):
        return host.Place("the run", settings.out, None)
    where = folder_of(settings.shared) or settings.out
    if facts.shape is None:
        return host.Place("checkpoints", where, None)
    weights = largest_adapter(settings.targets, space, facts.shape)
    need = run_need(settings, weights, 3600.0 * settings.hours)
    return host.Place(f"checkpoints (at most {gib(need.most)})", where, need.usual, need.least)
