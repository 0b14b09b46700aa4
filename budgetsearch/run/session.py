"""A run from its first second to its last: opened or gone on with, driven, scored, exported, reported."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from budgetsearch.core.errors import BudgetsearchError, LedgerError, RunFolderError, SettingsError, UsageError
from budgetsearch.core.events import Opened
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.history import History
from budgetsearch.core.policy.deadline import closing_seconds
from budgetsearch.core.ports import Exporter, Say, Watcher
from budgetsearch.core.secrets import without_secrets
from budgetsearch.core.space.space import Space
from budgetsearch.machine.clock import Timing, budget_of_resumed, deadline_of, timing_of_resumed
from budgetsearch.run.choose_engine import RunEngine, choose, moved
from budgetsearch.run.failure import keep_traceback, marked
from budgetsearch.run.preflight import anchored, check
from budgetsearch.run.prepare import (
    check_same_inputs,
    facts_of,
    max_held,
    prepare_inputs,
    request_of,
    to_write_down,
    worker_setup,
)
from budgetsearch.run.process import ended_in_time, stop_signals
from budgetsearch.run.result import Result, result_of
from budgetsearch.storage.files import cache_folder
from budgetsearch.storage.ledger import Ledger, read_entries, read_history
from budgetsearch.storage.lock import RunLock
from budgetsearch.storage.repair import mend
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.storage.shared import begin_place, find_place, leave_place
from budgetsearch.views.loggers import ScalarLogger
from budgetsearch.views.report.write import write_in_time
from budgetsearch.views.study.storage import resumed_storage, storage_url

if TYPE_CHECKING:
    from budgetsearch.machine.detect import Card
    from budgetsearch.run.driver import Driver
    from budgetsearch.run.settings import Changes, Settings
    from budgetsearch.training.data.models import BaseModel
    from budgetsearch.training.data.tokens import PreparedData
    from budgetsearch.views.study.follower import Follower
    from budgetsearch.views.study.mirror import StudyMirror


Conclude = Callable[[RunFolder, Say, Timing], None]
"""What follows a search."""


def start(
    settings: Settings,
    timing: Timing,
    watchers: Sequence[Watcher],
    say: Say,
    *,
    last_resort: bool = False,
    conclude: Conclude | None = None,
) -> History:
    """Check everything that can be checked without touching anything, then make the run folder.

    Raises:
        UsageError: something cannot be used; a folder that was made is gone again.
    """
    from budgetsearch.run.preflight import check_before

    assert settings.out is not None
    folder = RunFolder(settings.out)
    check(settings)
    check_before(settings, timing.budget_seconds, cache_folder(), say)
    settings = anchored(settings)
    try:
        folder.check_free()
        existed = folder.path.exists()
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder.path)
    except OSError as error:
        raise RunFolderError(f"--out {folder.path} cannot be made: {error}. Name another folder.") from error
    try:
        lock.sign()
        with marked(folder.path):
            if settings.shared:
                begin_place(settings.shared)
            return drive(
                settings, folder, lock, timing, watchers, say, last_resort=last_resort, conclude=conclude
            )
    except (UsageError, KeyboardInterrupt):
        if not _has_trials(folder):
            folder.clear(remove=not existed)
            if settings.shared:
                leave_place(settings.shared)
        raise
    finally:
        lock.release()


def _has_trials(folder: RunFolder) -> bool:
    """Whether anything was earned that must be kept."""
    return folder.has_ledger() and bool(read_history(folder.ledger).trials)


def drive(
    settings: Settings,
    folder: RunFolder,
    lock: RunLock,
    timing: Timing,
    watchers: Sequence[Watcher],
    say: Say,
    *,
    last_resort: bool = False,
    conclude: Conclude | None = None,
) -> History:
    """Prepare model and data while the worker starts, then let the driver run to the end, and conclude.

    ``last_resort``: this process may be ended when its time is over, whatever hangs in it. ``conclude`` is
    under the same lock, last resort and signals as the search, but the first signal stops it.
    """
    from budgetsearch.views.study.follower import Follower

    execution = choose(settings, folder, (lock.fd,), say)
    engine = execution.engine
    drivers: list[Driver] = []

    def planned() -> bool:
        return any(driver.history.plan is not None for driver in drivers)

    watched = ended_in_time(timing, engine, folder, planned) if last_resort else nullcontext()
    with stop_signals() as signals, watched:
        try:
            engine.warm_up()
            base, prepared = prepare_inputs(settings, say)
            card = execution.card()
            engine.prepare(worker_setup(settings, folder, card, base, prepared))
            driver = _driver(settings, folder, card, base, prepared, engine, timing)
            drivers.append(driver)
            driver.stop_requested = signals.gently
            follower = Follower(
                mirror_of(settings.storage, folder, driver.opened), read_entries(folder.ledger)
            )
            for watcher in (*watchers, follower):
                driver.ledger.watch(watcher)
            try:
                history = driver.run()
            finally:
                engine.close()
                if driver.history.closed is not None:
                    _await_views(watchers, follower, timing)
                follower.close()
                driver.ledger.close()
        finally:
            engine.close()
        signals.at_once()
        if conclude is not None:
            conclude(folder, say, timing)
        return history


def _await_views(watchers: Sequence[Watcher], follower: Follower, timing: Timing) -> None:
    """Give loggers and study what time there is to take the last events."""
    for watcher in watchers:
        if isinstance(watcher, ScalarLogger):
            watcher.close(closing_seconds("loggers", timing.seconds_left()))
    follower.close(closing_seconds("study", timing.seconds_left()))


def _driver(
    settings: Settings,
    folder: RunFolder,
    card: Card,
    base: BaseModel,
    prepared: PreparedData,
    engine: RunEngine,
    timing: Timing,
) -> Driver:
    from budgetsearch.run.driver import Driver
    from budgetsearch.run.spaces import load_space
    from budgetsearch.sampler.sampler import OptunaSampler

    facts = facts_of(settings, folder, card, base, prepared)
    folder.prepare(settings.model_dump(mode="json"))
    ledger = Ledger(folder.ledger)
    plan = ledger.history.plan
    space = Space.parse(plan.space) if plan else load_space(settings.space)
    opened = ledger.history.opened or Opened(timing.budget_seconds, to_write_down(settings), facts)
    check_same_inputs(opened, facts)
    request = request_of(settings, timing.budget_seconds, card, space, prepared, base)
    if plan is None:
        request = dataclasses.replace(request, max_held=max_held(settings, folder, space, base, timing))
    return Driver(
        ledger=ledger,
        engine=engine,
        sampler=OptunaSampler(),
        exporter=_exporter(settings, folder, base, opened),
        clock=timing.clock,
        down_seconds=timing.down_seconds,
        request=request,
        opened=opened,
        quantizations=space.quantizations,
        grace_seconds=settings.grace_seconds,
    )


def _exporter(settings: Settings, folder: RunFolder, base: BaseModel, opened: Opened) -> Exporter:
    from budgetsearch.run.export import AdapterExporter, exporter_for

    inner = AdapterExporter(
        run_folder=folder.path.absolute(),
        checkpoint_path=folder.checkpoints,
        model_facts=opened.facts["model"],
        data_facts=opened.facts["data"],
        tokenizer_files_from=base.path,
        keep_checkpoints=settings.keep_checkpoints,
    )
    return exporter_for(inner, settings.shared)


AMPLE_SECONDS = 600.0
"""For the reports of a run that was over before this process began."""


def conclude(folder: RunFolder, say: Say, timing: Timing | None = None) -> None:
    """Write manifest and reports within what is left of the time; what cannot be written is said.

    A signal ends it: the run is over, and reports can be written at any time.
    """
    try:
        _write(folder, say, timing)
    except KeyboardInterrupt:
        say(f"stopped before the reports were written; {_later(folder)}")
    except OSError as error:
        say(f"the reports cannot be written ({error}); make room, then: {_command(folder)}")
    except Exception as error:
        kept = keep_traceback(error, folder.path)
        where = f" (the traceback is in {kept})" if kept else ""
        what = without_secrets(f"{type(error).__name__}: {error}")
        say(f"the reports could not be written: {what}{where}; {_later(folder)}")


def _write(folder: RunFolder, say: Say, timing: Timing | None) -> None:
    from budgetsearch.run.manifest import write_manifest

    entries = list(read_entries(folder.ledger))
    history = fold(entries)
    write_manifest(folder, history)
    left = timing.seconds_left() if timing else AMPLE_SECONDS
    if untold := write_in_time(folder, entries, history, left):
        say(untold)


def _command(folder: RunFolder) -> str:
    return f"budgetsearch report {folder.command_word}"


def _later(folder: RunFolder) -> str:
    return f"`{_command(folder)}` writes them"


LOGGER = logging.getLogger("budgetsearch.run.session")


def finish_leaving(folder: RunFolder, history: History, say: Say, storage: str | None = None) -> None:
    """What the process of a run that is over may not have come to, if it was killed right then: the study's
    last lines, and removing what nobody needs any more. An adapter that was damaged since is written again.
    """
    from budgetsearch.run.export import AdapterExporter, exporter_for, mend

    opened = history.opened
    assert opened is not None
    try:
        mirror = mirror_of(resumed_storage(opened, storage), folder, opened)
        mirror.catch_up(history)
        mirror.close()
    except SettingsError as error:
        LOGGER.warning("The Optuna study is not looked at. %s", error)
    keep = bool(opened.settings.get("keep_checkpoints"))
    model, data = opened.facts.get("model", {}), opened.facts.get("data", {})
    inner = AdapterExporter(folder.path.absolute(), folder.checkpoints, model, data, folder.adapter, keep)
    exporter = exporter_for(inner, opened.settings.get("shared"))
    mend(exporter, history, say, lambda: _tokenizer(opened, say))
    exporter.sweep(history)
    folder.tidy()


def _tokenizer(opened: Opened, say: Say) -> Path:
    """A folder that holds the base model's tokenizer."""
    from budgetsearch.training.data.models import resolve_model

    known = opened.settings
    return resolve_model(
        known["model"],
        cache_folder(),
        revision=known.get("revision"),
        trust_remote_code=bool(known.get("trust_remote_code")),
        say=say,
    ).path


def go_on(
    folder: RunFolder,
    lock: RunLock,
    changes: Changes,
    watchers: Sequence[Watcher],
    say: Say,
    already_seconds: float,
    last_resort: bool,
) -> Result:
    """Mend what can be mended, then search on with what is left; what a finished run still lacks is made up.

    What ``changes`` does not name stays as it was.

    Raises:
        RunFolderError: the run never began.
        LedgerError: neither its ledger nor the backup can be used.
        SettingsError: the storage's password is missing, or the hours are spent.
    """
    from budgetsearch.run.settings import Settings

    hours, deadline, storage = changes.get("hours"), changes.get("deadline"), changes.get("storage")
    if (mended := mend(folder.ledger)) is not None:
        say(mended.line)
        if mended.lost:
            folder.forget_study()
    history = read_history(folder.ledger)
    if history.opened is None:
        raise never_began(folder)
    if history.closed is not None and history.closed.state == "finished":
        finish_leaving(folder, history, say, storage)
        conclude(folder, say)
        return result_of(folder)
    settings = moved(
        Settings.model_validate(dict(history.opened.settings)),
        engine=changes.get("engine"),
        gpus=changes.get("gpus"),
        address=changes.get("address"),
    )
    settings = settings.model_copy(update={"storage": resumed_storage(history.opened, storage)})
    timing = timing_of_resumed(
        history.spent,
        budget_of_resumed(hours, history.spent, history.opened.budget_seconds),
        _began(folder) if settings.deadline else None,
        deadline_of(deadline) if deadline else None,
        already_seconds,
    )
    if settings.shared:
        find_place(settings.shared)
    drive(settings, folder, lock, timing, watchers, say, last_resort=last_resort, conclude=conclude)
    return result_of(folder, timing)


def never_began(folder: RunFolder) -> BudgetsearchError:
    """What a ledger without an event means: beside what only a search can have left it has lost them."""
    if folder.has_earned():
        return LedgerError(
            f"The ledger {folder.ledger} holds no event, but there are checkpoints or an adapter beside it. "
            "Restore it from a copy; the adapter can be used as it is."
        )
    return RunFolderError(
        f"{folder.path} was stopped before it began, so there is nothing to go on with. Start it "
        f"again with `budgetsearch run --out {folder.command_word}` and its other options."
    )


def _began(folder: RunFolder) -> float:
    """When a run began, in seconds since the epoch, by the clock on the wall."""
    first = next(iter(read_entries(folder.ledger)))
    return first.wall - first.at


def mirror_of(storage: str | None, folder: RunFolder, opened: Opened) -> StudyMirror:
    """What writes a run's events into its study. ``storage``: a URL with its password, if one was given."""
    from budgetsearch.views.study.mirror import StudyMirror
    from budgetsearch.views.study.showcase import Showcase

    own = None if storage else folder.study
    showcase = Showcase(folder.path.absolute())
    return StudyMirror(storage_url(storage, folder), str(opened.facts["study"]), own, showcase=showcase)
