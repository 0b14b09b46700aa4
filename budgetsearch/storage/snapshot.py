"""A snapshot of a ledger's fold, beside it: whoever looks at a long run reads only the events behind it.

It carries the number and the seal of the last event that it holds. The seal stands for all rows before it
(``storage.seals``), so a snapshot of another ledger, or of one that has been mended to another end, does not
fit and counts for nothing, like one that is torn or of another version: then the ledger is read whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from budgetsearch.core.codec import read_json
from budgetsearch.core.history.history import History
from budgetsearch.core.history.standing import as_text, from_text
from budgetsearch.storage.files import replace_text

LOGGER = logging.getLogger("budgetsearch.storage.ledger")
LEAST_EVENTS = 2_000
"""A shorter ledger is read whole in a moment."""
GROWTH = 1.1
"""A ledger that has grown so many times since gets a new one: the writing takes time in proportion to its
length, and at most a tenth of the events are read one by one."""


@dataclass(frozen=True)
class Snapshot:
    """The fold of the first ``seq`` events."""

    seq: int
    seal: str
    """Of the last of them."""
    history: History


def snapshot_of(ledger: Path) -> Path:
    """Where the snapshot of a ledger lies."""
    return ledger.with_suffix(".snapshot")


def is_due(seq: int, known: int) -> bool:
    """Whether a ledger with so many events gets a snapshot; ``known``: those that the last one holds."""
    return seq >= max(LEAST_EVENTS, GROWTH * known)


def write_snapshot(ledger: Path, found: Snapshot) -> None:
    """Write it over an older one; where that fails, what the ledger tells takes longer to read."""
    try:
        body = as_text(found.history)
        told = {"seq": found.seq, "seal": found.seal, "sum": _sum(body.encode()), "by": _version()}
        head = json.dumps(told)
        replace_text(snapshot_of(ledger), f"{head}\n{body}\n")
    except (OSError, ValueError) as error:
        LOGGER.warning("The snapshot of %s cannot be written (%s).", ledger, error)


def read_snapshot(ledger: Path) -> Snapshot | None:
    """The snapshot beside a ledger; None where none is, or none that is whole and of this version."""
    try:
        head, body = snapshot_of(ledger).read_bytes().split(b"\n")[:2]
        told = read_json(head)
        if told["by"] != _version() or told["sum"] != _sum(body):
            return None
        return Snapshot(int(told["seq"]), str(told["seal"]), from_text(body))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _version() -> str:
    """What folds like this."""
    return importlib.metadata.version("budgetsearch")


def _sum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
