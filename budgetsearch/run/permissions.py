"""What a run that somebody else may have made is allowed to switch on when it goes on here.

Its ledger may come from a stranger. What runs code or reaches another machine is this user's to allow, now,
with a flag; everything else is read and can do no harm.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import encode
from budgetsearch.core.errors import SettingsError, UntrustedCode
from budgetsearch.core.events import Opened
from budgetsearch.core.metric import LOSS, is_code, is_task, is_task_file
from budgetsearch.run.fields import flag_of
from budgetsearch.run.metric import anchored_metric
from budgetsearch.run.settings import Changes
from budgetsearch.storage.files import append_to, cache_folder
from budgetsearch.storage.ledger import read_entries
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.storage.shared import url_of
from budgetsearch.training.data.origins import origins_of

LOGGER = logging.getLogger("budgetsearch.run.permissions")
REMOTE = ("hub:", "pypi:")
BEGUN = "runs-begun"
"""In the cache: a line for each run that this user began."""

ASKED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "trust_remote_code": (bool, "lets code that comes with its base model run on this machine"),
    "recipe": (bool, "runs the code of a recipe"),
    "metric": (is_code, "lets a Python function, or the definition of a task, run that it names"),
    "address": (
        lambda value: value not in (None, "auto"),
        "connects to a Ray cluster, whose workers run code",
    ),
    "storage": (bool, "connects to a database, with what passwords this machine has for it"),
    "shared": (
        lambda value: bool(url_of(value)),
        "keeps its checkpoints in a service, with this machine's credentials",
    ),
}
"""By setting: which values of a run's are used only if the flag says the same again, and what they do."""
CODE = ("trust_remote_code", "recipe", "metric")
"""Those that run code which may be somebody else's."""
TAKEN: Mapping[str, str] = {
    "model revision": "fetched as data (FETCHED); a wheel from PyPI is unpacked, never installed",
    "data valid": "read as rows (FETCHED), and its hash must be what it was",
    "space": "the ledger's plan holds it; YAML without tags",
    "out": "not used: the run is where the user says",
    "gpu device engine gpus": "what of this machine is used",
    "hours deadline grace_seconds": "how long",
    "columns bad_rows system thinking train_on": "how rows are read and written",
    "template": "rendered in a sandbox, and stopped where it takes too long",
    "seed split_seed": "numbers",
    "max_length batch_size eta first_rung full_share max_epochs valid_share max_rows": "numbers",
    "max_trials max_gang eval_share task_examples optimizer torch_compile targets": "how it trains",
    "direction": "a word",
    "tries like": "values of the space; another run is read when this one begins, and never again",
    "keep_checkpoints": "nothing is removed",
    "fresh_calibration": "what is measured instead of remembered",
}
"""The other settings, and why they may come from anywhere."""


FETCHED: Mapping[str, Callable[[str], bool]] = {
    "model": lambda source: not all(Path(one).expanduser().exists() for one in source.split("\n")),
    "data": lambda source: any(one.source.startswith(REMOTE) for one in origins_of(source)),
    "valid": lambda source: any(one.source.startswith(REMOTE) for one in origins_of(source)),
    "metric": lambda source: is_task(source) and not is_task_file(source),
}
"""By setting: which sources come over the network. Those of a run that this user has not begun are fetched
only if its flag names them again."""


@dataclass(frozen=True)
class Places:
    """Where things lie now, if not where the run found them, and what the user allows."""

    model: str | None = None
    data: str | None = None
    valid: str | None = None
    trust_remote_code: bool = False
    """Whether code that came with the base may run, if it ran in the run."""


def remember(opened: Opened) -> None:
    """Keep in mind that this user begins this run; its folder alone cannot say so."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with append_to(cache_folder() / BEGUN) as file:
            file.write(f"{_digest(opened)}\n".encode())
    except OSError as error:
        LOGGER.warning("What this run fetches is asked for again when it goes on: %s.", error)


def check_source(run: Path, role: str, source: str, given: str | None) -> None:
    """Refuse to fetch what only a folder from elsewhere asks for.

    Args:
        run: the folder of a run, or of its adapter.
        role: the setting: model, data, valid or metric.
        source: what it names.
        given: what this user names.

    Raises:
        SettingsError: the flag is missing; it is named.
    """
    if given == source or not FETCHED[role](source) or _was_begun_here(run, role, source):
        return
    flag = " ".join(f"{flag_of(role)} {shlex.quote(one)}" for one in source.split("\n"))
    raise SettingsError(
        f"{run} was not begun by you here, and {source} would be fetched for it. If you trust it, allow it "
        f"with {flag}; a folder that may be somebody else's does not decide that."
    )


def check_sources(run: Path, settings: Mapping[str, Any], changes: Changes) -> None:
    """The same of all that a run which goes on has.

    Raises:
        SettingsError: a flag is missing, or names something else than the run has.
    """
    for role in FETCHED:
        source, given = settings.get(role), _given(role, changes)
        if given is not None and str(given) != source:
            raise SettingsError(
                f"{flag_of(role)} {given}: a run goes on with what it has ({source}); the flag only allows "
                "to fetch that. With something else, start a new run."
            )
        if source:
            check_source(run, role, str(source), None if given is None else str(given))


def asks_of(opened: Opened) -> dict[str, Any]:
    """The settings of a run for ``check_permitted``: a recipe that this user began with is theirs."""
    own = _digest(opened) in _begun()
    return {**opened.settings, "recipe": None} if own else dict(opened.settings)


def _was_begun_here(run: Path, role: str, source: str) -> bool:
    """Whether this user began the run, and with this source."""
    for folder in map(RunFolder, (run, run.absolute().parent)):
        if folder.has_ledger():
            entry = next(iter(read_entries(folder.ledger)), None)
            opened = entry.event if entry is not None else None
            return (
                isinstance(opened, Opened)
                and source in str(opened.settings.get(role))
                and _digest(opened) in _begun()
            )
    return False


def _begun() -> frozenset[str]:
    try:
        return frozenset((cache_folder() / BEGUN).read_text(encoding="utf-8").split())
    except (OSError, ValueError):
        return frozenset()


def _digest(opened: Opened) -> str:
    """Of what the run began with; its facts hold a random name."""
    text = json.dumps(encode([opened.settings, opened.facts]), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_permitted(settings: Mapping[str, Any], changes: Changes) -> None:
    """Refuse to go on with a run that wants more than the user allows; ``settings``: the run's own.

    Raises:
        SettingsError: a flag is missing; it is named.
        UntrustedCode: the same, for code.
    """
    given, own = _given("metric", changes), settings.get("metric", LOSS)
    if given not in (None, own):
        raise SettingsError(
            f"--metric {given}: a run goes on with the metric that it has ({own}). With another one, start a "
            "new run."
        )
    for name, (is_asked, effect) in ASKED.items():
        value = settings.get(name)
        if not is_asked(value) or _is_allowed(name, value, changes):
            continue
        kind = UntrustedCode if name in CODE else SettingsError
        raise kind(
            f"This run {effect}. If you trust it, allow it with {_flag(name, value)}; the run "
            "folder, which may be somebody else's, does not decide that."
        )


def _given(name: str, changes: Changes) -> Any:
    """What the user names, as a run writes it down."""
    given = changes.get(name)
    return anchored_metric(given) if name == "metric" and isinstance(given, str) else given


def _is_allowed(name: str, value: Any, changes: Changes) -> bool:
    given: Any = _given(name, changes)
    if name == "address" and changes.get("engine") == "local":
        return True
    if name == "shared":  # a run has its own place below what was named
        return bool(given) and str(value).startswith(f"{str(given).rstrip('/')}/")
    if name == "metric":  # nothing but the very function that was named
        return bool(given == value)
    return bool(given)


def flags_again(settings: Mapping[str, Any]) -> str:
    """The flags that such a run needs again, each after a blank, as a shell takes them."""
    wanted = [
        _flag(name, settings[name]) for name, (is_asked, _) in ASKED.items() if is_asked(settings.get(name))
    ]
    return "".join(f" {flag}" for flag in wanted)


def _flag(name: str, value: Any) -> str:
    if value is True:
        return flag_of(name)
    shown = str(value).rpartition("/")[0] if name == "shared" else str(value)
    return f"{flag_of(name)} {shlex.quote(shown)}"
