"""The ledger's backup: the same sealed rows once more, as lines of JSON in a file that only grows.

The ledger is written first, so while both are whole the backup never holds more than the ledger. A row is
handed to the system at once, which a killed process survives, and forced to the disk where the caller says
that it matters, which a power cut survives too.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from budgetsearch.core.codec import read_json
from budgetsearch.storage.files import open_own, replace_file, sync
from budgetsearch.storage.seals import GENESIS, Row, follows, row_of

LOGGER = logging.getLogger("budgetsearch.storage.ledger")
TAIL_BYTES = 1 << 16
"""Where the last line is looked for first; one that is longer costs reading the whole file."""


def backup_of(ledger: Path) -> Path:
    """Where the backup of a ledger lies."""
    return ledger.with_suffix(".jsonl")


@dataclass(frozen=True)
class Copy:
    """What a backup holds."""

    rows: list[Row]
    """All that can be read, whole or not."""
    lines: int = 0
    """All that are known to have been begun."""
    torn: bool = False
    """Whether its last line has no end, as a power cut leaves it."""


def read_copy(path: Path) -> Copy:
    """Read a backup; where there is none it is empty.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Copy([])
    pieces = [piece for piece in content.split(b"\n") if piece]
    found = [_row(piece) for piece in pieces]
    rows = [row for row in found if row is not None]
    return Copy(rows, _begun(pieces, found), bool(content) and not content.endswith(b"\n"))


def _begun(pieces: Sequence[bytes], found: Sequence[Row | None]) -> int:
    """How many rows were begun: up to the highest number of a row that is as it was written, and what lies
    behind it. One line that a changed byte broke in two is one. A number alone says nothing: one digit of it
    may have changed."""
    seals = [GENESIS, *(row.seal if row is not None else "" for row in found)]
    backwards = ((place, found[place]) for place in reversed(range(len(found))))
    whole = ((place, row.seq) for place, row in backwards if row is not None and follows(seals[place], row))
    last, known = next(whole, (-1, 0))
    behind = pieces[last + 1 :]
    unread = max(1, sum(piece.startswith(b"[") for piece in behind)) if behind else 0
    return known + unread


def last_seq(path: Path) -> int:
    """The number of the last event in a backup; 0 where there is none that can be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        if (row := _row(line)) is not None:
            return row.seq
    return len(read_copy(path).rows) if size > TAIL_BYTES else 0


def write_copy(path: Path, rows: Sequence[Row]) -> None:
    """Let the backup hold these rows and no others.

    Raises:
        OSError: it cannot be written; then it holds what it held.
    """
    replace_file(path, b"".join(map(_line, rows)))


class Backup:
    """The backup of a ledger that is being written."""

    def __init__(self, path: Path, rows: Sequence[Row], there: Copy) -> None:
        """Bring the backup, which holds what is ``there``, level with the ledger's ``rows`` and keep it open.

        Raises:
            OSError: it cannot be written.
        """
        self.path = path
        level = not there.torn and there.rows == list(rows[: there.lines])
        if not level:
            write_copy(path, rows)
        self._fd = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._size = os.fstat(self._fd).st_size
        if not there.lines:
            sync(path.parent)
        missing = rows[there.lines :] if level else ()
        if missing:
            self._write(b"".join(map(_line, missing)))
            os.fsync(self._fd)

    def append(self, row: Row, *, durably: bool) -> None:
        """Add one row. If that fails the run goes on without its backup; the next process mends it."""
        if self._fd < 0:
            return
        try:
            self._write(_line(row))
            if durably:
                os.fsync(self._fd)
        except OSError as error:
            LOGGER.warning("The ledger's backup %s cannot be written (%s).", self.path, error)
            self.close()

    def _write(self, data: bytes) -> None:
        written = os.write(self._fd, data)
        if written < len(data):
            os.ftruncate(self._fd, self._size)
            raise OSError("no room")
        self._size += written

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _line(row: Row) -> bytes:
    return (json.dumps(row, separators=(",", ":")) + "\n").encode()


def _row(line: bytes) -> Row | None:
    try:
        return row_of(read_json(line))
    except (ValueError, RecursionError):
        return None
