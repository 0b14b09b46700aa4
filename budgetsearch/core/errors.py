"""The exceptions of budgetsearch.

::

    BudgetsearchError             anything this package raises on purpose
    ├── UsageError                the caller can mend it: exit code 2, nothing was touched
    │   ├── SettingsError         an unknown key or a value out of range
    │   ├── SpaceError            a search space that does not parse
    │   ├── DataError             a data file or a row that cannot be used
    │   │   └── LateError         data that were not prepared when the budget left no more
    │   ├── ModelError            a base model that cannot be found or loaded
    │   │   └── UntrustedCode     one that runs its own code, which nobody has allowed
    │   ├── RecipeError           a training of the user's own that cannot be used
    │   ├── DeviceError           a card that is unknown or absent
    │   │   └── CardLost          a card that fell off the bus (gpu.nvml)
    │   ├── BudgetError           a budget below the measured minimum
    │   └── RunFolderError        a run folder that is in use, missing or not a run
    ├── LedgerError               the ledger is damaged or contradicts itself
    ├── CheckpointError           a checkpoint is damaged or incomplete
    ├── DiskError                 a disk is full, or a folder cannot be written any more
    │   └── UnreadableError       a file cannot be read now; it may well be whole
    └── EngineError               the worker cannot be started, or dies again and again

Every message says what happened, what it touched and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BudgetsearchError(Exception):
    """Anything that this package raises on purpose."""


class UsageError(BudgetsearchError):
    """Wrong input; the command line exits with code 2 and nothing was touched."""


class SettingsError(UsageError):
    """An unknown setting, or a value that it does not take."""


class SpaceError(UsageError):
    """A search space that cannot be read."""


class DataError(UsageError):
    """Training or validation data that cannot be used."""


class LateError(DataError):
    """Data that were not prepared when the budget left no more."""


class ModelError(UsageError):
    """A base model that cannot be found, fetched or loaded."""


class UntrustedCode(ModelError):
    """A base model, or its tokenizer, that runs its own code to load, and nobody has allowed it."""


class RecipeError(UsageError):
    """A training of the user's own that cannot be found or loaded, or breaks its contract."""


class DeviceError(UsageError):
    """A card that is unknown, absent or too small."""


class BudgetError(UsageError):
    """A budget below the measured minimum; ``minimum_seconds`` is that minimum."""

    def __init__(self, message: str, minimum_seconds: float) -> None:
        super().__init__(message)
        self.minimum_seconds = minimum_seconds


class RunFolderError(UsageError):
    """A run folder that is in use, missing, or holds something else."""


class LedgerError(BudgetsearchError):
    """The ledger is damaged or contradicts itself."""


class CheckpointError(BudgetsearchError):
    """A checkpoint is damaged or incomplete."""


class DiskError(BudgetsearchError):
    """A disk is full, or a folder cannot be written any more; what was written before is kept."""


class UnreadableError(DiskError):
    """A file that is there cannot be read now: it is tried again, and nothing is given up for it."""


class EngineError(BudgetsearchError):
    """The engine cannot execute jobs any more."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'rank'?)"`` when a known word is close, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
