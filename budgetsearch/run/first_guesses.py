"""Configurations that are tried first: a person's own, and the best of an earlier run."""

from __future__ import annotations

from pathlib import Path

from budgetsearch.core.errors import SettingsError, SpaceError
from budgetsearch.core.space.space import Space
from budgetsearch.core.wishes import as_guess, guesses_of, read_guess
from budgetsearch.run.settings import Settings
from budgetsearch.storage.ledger import read_history
from budgetsearch.storage.runfolder import RunFolder

WINNERS = 3
"""Of an earlier run so many are tried first."""


def said_of_tries(settings: Settings, space: Space) -> str:
    """What will be tried first.

    Raises:
        SpaceError: a guess is none of the space.
    """
    found = [as_guess(read_guess(text, space), space) for text in guesses_of(settings.tries)]
    return "; ".join(found)


def with_guesses(settings: Settings, space: Space) -> Settings:
    """The settings with the best of an earlier run among the first guesses."""
    if settings.like is None:
        return settings
    given = [*guesses_of(settings.tries), *winners_of(settings.like, space)]
    return settings.model_copy(update={"tries": "\n".join(dict.fromkeys(given))})


def winners_of(run: Path, space: Space) -> list[str]:
    """The best configurations of an earlier run that this space holds, best first.

    Raises:
        SettingsError: there is none.
    """
    folder = RunFolder(run)
    history = read_history(folder.ledger) if folder.has_ledger() else None
    if history is None:
        raise SettingsError(f"--like {run}: there is no run in it. Name the folder of one.")
    known = [s for s in history.trials.values() if s.best_loss is not None]
    found: list[str] = []
    for state in sorted(known, key=lambda s: (-s.rung, s.best_loss, s.trial_id)):
        text = as_guess(state.trial.params, space)
        try:
            read_guess(text, space)
        except SpaceError:
            continue
        if text not in found:
            found.append(text)
    if not found:
        raise SettingsError(f"--like {run}: none of its trials lies in the search space {space.name}.")
    return found[:WINNERS]
