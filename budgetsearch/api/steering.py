"""A person's hand on a run that goes, from Python and from the command line."""

from __future__ import annotations

import os
from pathlib import Path

from budgetsearch.core.errors import DiskError, RunFolderError, SettingsError
from budgetsearch.core.space.space import Space
from budgetsearch.core.wishes import Action, Wish, read_guess
from budgetsearch.storage import inbox
from budgetsearch.storage.ledger import read_history
from budgetsearch.storage.runfolder import RunFolder


def ask(run: str | os.PathLike[str], action: Action, trial: int | None = None, guess: str = "") -> str:
    """Ask something of the run in a folder; returns what was asked, for people.

    Raises:
        RunFolderError: there is no run in the folder, or it does not go.
        SettingsError: it has no such trial, or is not yet planned.
        SpaceError: the configuration is none of its space.
        DiskError: the folder cannot be written.
    """
    folder = RunFolder(Path(run))
    folder.check_run()
    history = read_history(folder.ledger)
    if not folder.goes(history.closed is not None):
        raise RunFolderError(f"The run in {run} does not go, so there is nothing to take a hand in.")
    if history.plan is None:
        raise SettingsError(f"The run in {run} is not planned yet. Ask again when its first trial has begun.")
    if action == "try":
        read_guess(guess, Space.parse(history.plan.space))
    elif trial not in history.trials:
        raise SettingsError(f"The run in {run} has no trial {trial}; it has 0 to {len(history.trials) - 1}.")
    try:
        inbox.post(folder.path, Wish(action, trial, guess))
    except OSError as error:
        raise DiskError(f"{folder.path}: {error}. Make room, or mend the folder's permissions.") from error
    return f"asked: {action} {guess or trial}; `budgetsearch status {run}` shows what came of it"
