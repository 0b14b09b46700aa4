"""From settings to a driver at work: every part is made here and handed to the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from budgetsearch.aftermath import marked
from budgetsearch.checking import anchored, check
from budgetsearch.clock import Timing
from budgetsearch.core.errors import RunFolderError, UsageError
from budgetsearch.core.events import Opened
from budgetsearch.core.history import History
from budgetsearch.core.ports import Exporter, Say, Watcher
from budgetsearch.core.space import Space
from budgetsearch.execution import RunEngine, choose
from budgetsearch.folders import cache_folder
from budgetsearch.ledger import Ledger, read_entries, read_history
from budgetsearch.opening import check_same_inputs, facts_of, to_write_down
from budgetsearch.preparing import max_held, prepare_inputs, request_of, worker_setup
from budgetsearch.run_study import mirror_of
from budgetsearch.runfolder import RunFolder, RunLock
from budgetsearch.shared import begin_place, leave_place
from budgetsearch.stopping import ended_in_time, stop_signals

if TYPE_CHECKING:
    from budgetsearch.driver import Driver
    from budgetsearch.gpu.detect import Card
    from budgetsearch.settings import Settings
    from budgetsearch.training.sources import BaseModel
    from budgetsearch.training.tokens import PreparedData

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
    from budgetsearch.room import check_before

    assert settings.out is not None
    folder = RunFolder(settings.out)
    check(settings)
    check_before(settings, timing.budget_seconds, cache_folder(), say)
    settings = anchored(settings)
    try:
        folder.check_free()
        existed = folder.path.exists()
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
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
    from budgetsearch.study.follower import Follower

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
                follower.close()
                driver.ledger.close()
        finally:
            engine.close()
        signals.at_once()
        if conclude is not None:
            conclude(folder, say, timing)
        return history


def _driver(
    settings: Settings,
    folder: RunFolder,
    card: Card,
    base: BaseModel,
    prepared: PreparedData,
    engine: RunEngine,
    timing: Timing,
) -> Driver:
    from budgetsearch.driver import Driver
    from budgetsearch.spaces import load_space
    from budgetsearch.study.sampler import OptunaSampler

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
    from budgetsearch.exporter import AdapterExporter
    from budgetsearch.shared_exporter import exporter_for

    inner = AdapterExporter(
        run_folder=folder.path.absolute(),
        checkpoint_path=folder.checkpoints,
        model_facts=opened.facts["model"],
        data_facts=opened.facts["data"],
        tokenizer_files_from=base.path,
        keep_checkpoints=settings.keep_checkpoints,
    )
    return exporter_for(inner, settings.shared)
