"""``fold(entries) -> History``: everything that the policy may know, from the ledger alone."""

from __future__ import annotations

from collections.abc import Iterable

from budgetsearch.core.events import (
    Entry,
)
from budgetsearch.core.history.history import History


def fold(entries: Iterable[Entry]) -> History:
    """The history that a ledger tells.

    Raises:
        LedgerError: an entry contradicts what came before.
    """
    history = History()
    for entry in entries:
        history.apply(entry)
    return history
