"""A run from its first second to its last: begun or gone on with, prepared, driven, exported, reported."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from budgetsearch.core.errors import LateError, RunFolderError, UsageError
from budgetsearch.core.history.history import History
from budgetsearch.core.policy.deadline import ENDING, closing_seconds
from budgetsearch.core.ports import Say, Watcher
from budgetsearch.core.space.space import Space
from budgetsearch.core.wishes import guesses_of
from budgetsearch.machine.clock import (
    Timing,
    budget_of_resumed,
    deadline_of,
    timing_of_new,
    timing_of_resumed,
)
from budgetsearch.run.calibrations import calibrations_of, preparation_of
from budgetsearch.run.choose_engine import Execution, choose, moved
from budgetsearch.run.conclusion import conclude, make_up
from budgetsearch.run.configuration import revised
from budgetsearch.run.exporters import exporter_of
from budgetsearch.run.failure import marked
from budgetsearch.run.foresight import check_hours, too_late
from budgetsearch.run.metric import said_of_metric
from budgetsearch.run.models import PreparedModels, check_same_inputs
from budgetsearch.run.permissions import asks_of, check_permitted, check_sources, remember
from budgetsearch.run.preflight import Resolved, anchored, card_of, check_room, resolve, space_of
from budgetsearch.run.prepare import (
    Prepared,
    Subject,
    Watch,
    opened_by,
    prepare_inputs,
    run_id_of,
)
from budgetsearch.run.process import PREPARATION_SECONDS, ended_in_time, stop_signals
from budgetsearch.run.recipes import PreparedRecipe
from budgetsearch.run.result import Result, result_of
from budgetsearch.run.settings import Changes, Settings
from budgetsearch.run.wishes import Guided, Inbox
from budgetsearch.storage import repair
from budgetsearch.storage.files import cache_folder, local_time
from budgetsearch.storage.ledger import Ledger, read_entries, read_history
from budgetsearch.storage.lock import RunLock, lock_in_time
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.storage.shared import begin_place, find_place, leave_place
from budgetsearch.views.loggers import ScalarLogger
from budgetsearch.views.study.storage import forget_file, resumed_storage

if TYPE_CHECKING:
    from budgetsearch.core.ports import Engine
    from budgetsearch.run.driver import Driver
    from budgetsearch.views.study.follower import Follower

LOGGER = logging.getLogger("budgetsearch.run.session")


@dataclass(frozen=True)
class Caller:
    """Whoever asks for a run: who hears of it, and what the process may do."""

    watchers: Sequence[Watcher] = ()
    """See every event."""
    say: Say = lambda line: None
    """Takes lines about the preparation."""
    already_seconds: float = 0.0
    """Of the budget, gone before the call."""
    last_resort: bool = False
    """Whether this process may be ended when its time is over, whatever hangs in it."""


@dataclass(frozen=True)
class Session:
    """The work of one process on a run, in a folder that it has locked."""

    run: Resolved
    folder: RunFolder
    lock: RunLock
    timing: Timing
    caller: Caller


# ------------------------------------------------------------------------------- the start


def start(settings: Settings, caller: Caller) -> Result:
    """Check everything that can be checked without touching anything, then make the folder and search.

    Raises:
        UsageError: something cannot be used; a folder that was made is gone again.
        BudgetError: the budget is below the measured minimum.
        EngineError: the worker cannot train here.
    """
    until = deadline_of(settings.deadline) if settings.deadline else None
    timing = timing_of_new(settings.hours, until, caller.already_seconds)
    if until is not None:
        settings = settings.model_copy(update={"deadline": local_time(until)})
    run = resolve(settings)
    check_room(run, timing.budget_seconds, cache_folder(), caller.say)
    check_hours(run, timing.budget_seconds, cache_folder())
    run = dataclasses.replace(run, settings=anchored(run.settings))
    assert settings.out is not None
    folder = RunFolder(settings.out)
    with _begun(folder, run.settings.shared) as lock:
        search(Session(run, folder, lock, timing, caller))
    with marked(folder.path):
        return result_of(folder, read_history(folder.ledger), timing)


@contextmanager
def _begun(folder: RunFolder, shared: str | None) -> Iterator[RunLock]:
    """Make the folder of a run, lock it, and make the place of its shared checkpoints.

    If the run never begins, nothing of them stays.

    Raises:
        RunFolderError: the folder cannot be made, or is somebody else's.
        SettingsError: the place cannot be written.
    """
    try:
        folder.check_free()
        existed, before = folder.path.exists(), folder.names()
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder.path)
    except OSError as error:
        raise RunFolderError(f"--out {folder.path} cannot be made: {error}. Name another folder.") from error
    try:
        lock.sign()
        with marked(folder.path):
            if shared:
                begin_place(shared)
            yield lock
    except (UsageError, KeyboardInterrupt):
        earned = folder.has_ledger() and read_history(folder.ledger).trials
        if not earned:
            folder.clear(before, remove=not existed)
            if shared:
                leave_place(shared)
        raise
    finally:
        lock.release()


# ------------------------------------------------------------------------------ the resume


def resume(folder: RunFolder, changes: Changes, caller: Caller, *, patient: bool = False) -> Result:
    """Mend what can be mended, then search on with what is left; what a finished run still lacks is made up.

    What ``changes`` does not name stays as it was. ``patient``: wait for three minutes at most while a
    process elsewhere, which may have been killed a moment ago, still seems to have the run.

    Raises:
        RunFolderError: there is no run in the folder, it is in use, or it never began.
        LedgerError: neither its ledger nor the backup can be used.
        SettingsError: the storage's password is missing, or the hours are spent.
    """
    folder.check_run()
    lock = lock_in_time(folder.path, caller.say) if patient else RunLock(folder.path)
    if lock.left_behind is not None and not lock.left_behind.lives():
        caller.say(f"{lock.left_behind} had this run and was ended from outside")
    lock.sign()
    try:
        with marked(folder.path):
            _mend(folder, caller.say)
            history = read_history(folder.ledger)
            if history.opened is None:
                raise folder.never_began()
            if history.closed is not None and history.closed.state == "finished":
                if changes.get("hours") is not None or changes.get("deadline"):
                    caller.say(
                        "this run is finished and takes no more time; `budgetsearch run` begins another"
                    )
                changed = make_up(folder, history, changes, caller.say)
                conclude(folder, caller.say, history=history, changed=changed)
                return result_of(folder, history)
            session = _gone_on_with(folder, lock, history, changes, caller)
            search(session)
            return result_of(folder, read_history(folder.ledger), session.timing)
    finally:
        lock.release()


def _mend(folder: RunFolder, say: Say) -> None:
    """Mend of a run's ledger what can be mended."""
    folder.check_no_links()
    if (mended := repair.mend(folder.ledger)) is not None:
        say(mended.line)
        forget_file(folder.study)  # it may know more than the ledger does now


def _gone_on_with(
    folder: RunFolder, lock: RunLock, history: History, changes: Changes, caller: Caller
) -> Session:
    """The run with its own settings, but for the changes, and what is left of its budget."""
    opened = history.opened
    assert opened is not None
    settings = Settings.model_validate(dict(opened.settings))
    check_permitted(asks_of(opened), changes)
    check_sources(folder.path, opened.settings, changes)
    said_of_metric(settings)
    settings = moved(settings, changes)
    card = card_of(settings)
    settings = settings.model_copy(update={"storage": resumed_storage(opened, changes.get("storage"))})
    deadline = changes.get("deadline")
    timing = timing_of_resumed(
        history.spent,
        budget_of_resumed(_hours_of(settings, changes), history.spent, opened.budget_seconds),
        _began(folder) if settings.deadline else None,
        deadline_of(deadline) if deadline else None,
        caller.already_seconds,
    )
    if settings.shared:
        find_place(settings.shared)
    space = Space.parse(history.plan.space) if history.plan else space_of(settings)
    return Session(Resolved(settings, space, card), folder, lock, timing, caller)


def _hours_of(settings: Settings, changes: Changes) -> float | None:
    """The hours that a run is given now; None: those that it had."""
    hours = changes.get("hours")
    return None if hours is None else revised(settings, {"hours": hours}).hours


def _began(folder: RunFolder) -> float:
    """When a run began, in seconds since the epoch, by the clock on the wall."""
    first = next(iter(read_entries(folder.ledger)))
    return first.wall - first.at


# ------------------------------------------------------------------------------ the search


def search(session: Session) -> None:
    """Prepare model and data while the worker starts, let the driver run to the end, and write the reports.

    The reports are under the same lock, last resort and signals as the search, but the first signal stops
    them.
    """
    settings, folder, say = session.run.settings, session.folder, session.caller.say
    if session.run.card is not None and session.run.card.note:
        say(session.run.card.note)
    execution = choose(settings, session.run.card, folder, session.lock.fd)
    engine = execution.engine
    drivers: list[Driver] = []
    watch = Watch(partial(_seconds_to_prepare, session.timing))

    def planned() -> bool:
        return any(driver.history.plan is not None for driver in drivers)

    # A time on the wall is kept whatever happens; too few hours are to be refused with what would do.
    patience = 0.0 if settings.deadline else PREPARATION_SECONDS
    in_time = ended_in_time(session.timing, engine, folder, planned, patience)
    with stop_signals() as signals, in_time if session.caller.last_resort else nullcontext():
        try:
            engine.warm_up()
            prepared = _prepared(session, execution, watch)
            engine.prepare(prepared.setup(folder))
            if settings.recipe is None and not folder.has_ledger():
                preparation_of(settings).keep(session.timing.clock.now() - watch.once)
            driver = driver_of(session, prepared, engine)
            drivers.append(driver)
            driver.stop_requested = signals.gently
            _drive(driver, session)
        finally:
            engine.close()
        signals.at_once()
        conclude(folder, say, session.timing)


def _prepared(session: Session, execution: Execution, watch: Watch) -> Subject:
    """Fetch, convert and tokenize what adapters need, or load the recipe.

    Raises:
        UsageError: something of it cannot be used.
    """
    run = session.run
    if run.settings.recipe is not None:
        return PreparedRecipe.of(run.settings, execution.card(), run.space)
    return _prepared_in_time(session, execution, watch)


def _prepared_in_time(session: Session, execution: Execution, watch: Watch) -> Subject:
    """The models and the data of the run.

    Raises:
        BudgetError: the budget does not even suffice for them.
    """
    run, timing = session.run, session.timing
    say = _noting(session.folder, session.caller.say)
    try:
        if len(run.settings.models) > 1:
            return PreparedModels.of(run.settings, execution.card(), say, run.space, watch)
        inputs = prepare_inputs(run.settings, say, watch, run.space)
        return Prepared(run.settings, execution.card(), *inputs, run.space)
    except LateError as error:
        if run.settings.deadline or session.folder.has_ledger():
            raise
        raise too_late(run, timing, watch.once, error) from error


def _noting(folder: RunFolder, say: Say) -> Say:
    """Whatever is said of the preparation stands in the folder too, for whoever asks for its status."""

    def noted(line: str) -> None:
        folder.note_step(line)
        say(line)

    folder.note_step("the model and the data are looked at")
    return noted


def _seconds_to_prepare(timing: Timing) -> float:
    return timing.seconds_left() - ENDING["exit"]


def driver_of(session: Session, prepared: Subject, engine: Engine) -> Driver:
    """Open the ledger of the run and make its driver.

    Raises:
        RunFolderError: the run began with another model or other data, or the disk has no room for it.
    """
    from budgetsearch.run.driver import Driver
    from budgetsearch.sampler.sampler import OptunaSampler

    folder, space, timing = session.folder, session.run.space, session.timing
    settings = prepared.settings
    began = opened_by(prepared, folder.path.name, timing.budget_seconds)
    ledger = Ledger(folder.ledger)
    if ledger.history.opened is None:
        remember(began)
    opened = ledger.history.opened or began
    folder.prepare(settings.model_dump(mode="json"), run_id_of(opened))
    check_same_inputs(opened, began.facts)
    request = prepared.request(space, timing.budget_seconds)
    if ledger.history.plan is None:
        held = prepared.held(space, folder.path, timing.budget_seconds)
        request = dataclasses.replace(request, max_held=held)
    return Driver(
        ledger=ledger,
        engine=engine,
        sampler=Guided(OptunaSampler(), tuple(guesses_of(session.run.settings.tries))),
        wishes=Inbox(folder.path).take,
        exporter=exporter_of(folder, opened, prepared.tokenizer),
        clock=timing.clock,
        down_seconds=timing.down_seconds,
        request=request,
        opened=opened,
        quantizations=space.cost_classes,
        kept=calibrations_of(settings, space, session.run.card, timing.budget_seconds),
        grace_seconds=settings.grace_seconds,
    )


def _drive(driver: Driver, session: Session) -> None:
    """Run to the end, while the study and whoever watches follow."""
    from budgetsearch.views.study.follower import Follower
    from budgetsearch.views.study.mirror import mirror_of

    folder = session.folder
    mirror = mirror_of(session.run.settings.storage, folder, driver.opened)
    follower = Follower(mirror, read_entries(folder.ledger))
    for watcher in (*session.caller.watchers, follower):
        driver.ledger.watch(watcher)
    try:
        driver.run()
    finally:
        driver.engine.close()
        if driver.history.closed is not None:
            planned = driver.history.plan is not None
            _await_views(session, follower if planned else None)
        follower.close()
        driver.ledger.close()


def _await_views(session: Session, follower: Follower | None) -> None:
    """Give loggers and study, where there is one, what time there is to take the last events."""
    timing = session.timing
    for watcher in session.caller.watchers:
        if isinstance(watcher, ScalarLogger):
            watcher.close(closing_seconds("loggers", timing.seconds_left()))
    if follower is not None:
        level = follower.close(closing_seconds("study", timing.seconds_left()))
        session.folder.note_study(level, follower.seq)
