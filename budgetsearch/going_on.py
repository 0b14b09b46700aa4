"""Going on with a run: what is left of its budget, and what its folder must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from budgetsearch.clock import budget_of_resumed, deadline_of, timing_of_resumed
from budgetsearch.compose import drive
from budgetsearch.concluding import conclude
from budgetsearch.core.errors import BudgetsearchError, LedgerError, RunFolderError
from budgetsearch.core.ports import Say, Watcher
from budgetsearch.execution import moved
from budgetsearch.finishing import finish_leaving
from budgetsearch.ledger import read_entries, read_history
from budgetsearch.mending import mend
from budgetsearch.results import Result, result_of
from budgetsearch.run_study import resumed_storage
from budgetsearch.runfolder import RunFolder, RunLock
from budgetsearch.shared import find_place


def go_on(
    folder: RunFolder,
    lock: RunLock,
    until: tuple[float | None, str | None],
    storage: str | None,
    place: Mapping[str, Any],
    watchers: Sequence[Watcher],
    say: Say,
    already_seconds: float,
    last_resort: bool,
) -> Result:
    """Mend what can be mended, then search on with what is left; what a finished run still lacks is made up.

    ``until``: other hours in all, another deadline; ``place``: another engine, gpus and address. What is None
    stays as it was.

    Raises:
        RunFolderError: the run never began.
        LedgerError: neither its ledger nor the backup can be used.
        SettingsError: the storage's password is missing, or the hours are spent.
    """
    from budgetsearch.settings import Settings

    hours, deadline = until
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
    settings = moved(Settings.model_validate(dict(history.opened.settings)), **place)
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
