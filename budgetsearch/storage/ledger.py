"""The ledger: the append-only record of every event, decision and second, in SQLite.

WAL with ``synchronous=FULL``: an event that ``append`` returned from survives a power cut. Rows are
only ever inserted; two triggers refuse everything else. Each row is sealed (``core.seals``) and stands once
more in a backup beside the file, so damage is found, and what one of the two lost the other has.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import shlex
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from budgetsearch.core.codec import decode, encode, read_json
from budgetsearch.core.errors import LedgerError
from budgetsearch.core.events import (
    Calibrated,
    Closed,
    Entry,
    Event,
    Exported,
    Opened,
    Planned,
    Resumed,
    Scored,
    SegmentEnded,
)
from budgetsearch.core.history.fold import apply, fold
from budgetsearch.core.history.history import History
from budgetsearch.core.ports import Clock, Watcher
from budgetsearch.storage.backup import Backup, Copy, backup_of, last_seq, read_copy
from budgetsearch.storage.database import (
    LOCK_SECONDS,
    SCHEMA,
    WRONG_NUMBER,
    Damage,
    OtherFormat,
    check_format,
    is_empty,
    locked_remedy,
    reading,
    scan,
    structure_of,
)
from budgetsearch.storage.seals import FORMAT, GENESIS, Row, follows, last_seal, longest, sealed
from budgetsearch.storage.snapshot import Snapshot, is_due, read_snapshot, write_snapshot

LOGGER = logging.getLogger("budgetsearch.storage.ledger")
DEAR = (Opened, Calibrated, Planned, SegmentEnded, Scored, Exported, Resumed, Closed)
"""Events behind which the backup is forced to the disk: what they tell cost time, or is a promise."""


@dataclass(frozen=True)
class Survey:
    """What a ledger and its backup hold together."""

    rows: list[Row]
    """The longest beginning that is whole in one of them."""
    problem: str = ""
    """What is wrong with the database."""
    lost: int = 0
    """Later events that are to be seen and whole in neither; there may have been more."""
    flaw: str = ""
    """What is wrong with the backup; a torn last line, which a power cut leaves, is not."""
    copy: Copy = field(default_factory=lambda: Copy([]))


@contextmanager
def one_generation() -> Iterator[None]:
    """Let the collector of garbage wait: hundreds of thousands of records are made here and kept, and it
    would look at all of them again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def read_entries(path: Path, after: int = 0) -> Iterator[Entry]:
    """The entries of a ledger behind number ``after``, in order, for reading only; a run may write to it.

    Where the ledger is damaged its backup stands in, and a warning says so.

    Raises:
        LedgerError: there is no ledger, or it cannot be read.
    """
    for row in _whole_rows(path, after):
        yield _entry(row, path)


def _entry(row: Row, path: Path) -> Entry:
    try:
        event = decode(Event, read_json(row.body))
        if isinstance(event, Exported):  # the run may have been moved since
            event = replace(event, path=str(path.parent.absolute() / Path(event.path).name))
        return Entry(row.seq, row.at, row.wall, event)
    except ValueError as error:
        raise LedgerError(
            f"Entry {row.seq} of the ledger {path} cannot be understood ({error}): another version of "
            "budgetsearch wrote it. Use that version."
        ) from error


def read_history(path: Path) -> History:
    """The history that the ledger at ``path`` tells: from its snapshot on, where there is one that fits."""
    with one_generation():
        known = read_snapshot(path)
        if known is None or not _fits(path, known):
            return fold(read_entries(path))
        for entry in read_entries(path, known.seq):
            apply(known.history, entry)
        return known.history


def _fits(path: Path, known: Snapshot) -> bool:
    """Whether the ledger's event of its number has its seal."""
    if not path.is_file():
        return False
    try:
        with reading(path) as connection:
            check_format(connection, path)
            row = next(scan(connection, known.seq), None)
    except Damage:
        return False
    return row is not None and (row.seq, row.seal) == (known.seq, known.seal)


@one_generation()
def survey(path: Path) -> Survey:
    """Read a ledger and its backup from their beginnings and compare them.

    Raises:
        OtherFormat: another version wrote it.
        LedgerError: it cannot be looked at.
    """
    try:
        copy = read_copy(backup_of(path))  # before the database: a run may be writing to both
    except OSError as error:
        raise LedgerError(f"The ledger's backup cannot be read: {error}.") from error
    stored: list[Row] = []
    problem = "it is gone" if copy.lines and not path.is_file() else ""
    if path.is_file():
        try:
            problem = _gather(path, stored)
        except OtherFormat:
            if not longest(copy.rows):
                raise
            problem = WRONG_NUMBER
    rows = longest(stored, copy.rows)
    lost = max(0, max(len(stored), copy.lines) - len(rows))
    whole, copied = _agreeing(rows, stored), _agreeing(rows, copy.rows)
    if not problem and whole < len(stored):
        problem = f"entry {whole + 1} is not as it was written"
    elif not problem and (whole < len(rows) or lost):
        problem = f"it ends with entry {whole}, before its end"
    flaw = f"line {copied + 1} is not as it was written" if copied < copy.lines - copy.torn else ""
    return Survey(rows, problem, lost, flaw, copy)


def _agreeing(rows: list[Row], other: list[Row]) -> int:
    """How many of them are the same from the beginning on."""
    pairs = enumerate(zip(rows, other, strict=False))
    return next((number for number, (one, two) in pairs if one != two), min(len(rows), len(other)))


class Ledger:
    """One run's ledger, open for appending; ``history`` is always the fold of what it holds."""

    def __init__(self, path: Path) -> None:
        """Open or create the ledger at ``path`` and replay it.

        Raises:
            LedgerError: the file is damaged or of another format, or cannot be written.
        """
        self.path = path
        self.history = History()
        self._watchers: list[Watcher] = []
        there = survey(path)
        if there.problem:
            raise LedgerError(damaged(path, there.problem, len(there.rows), there.lost))
        self._seq, self._seal = len(there.rows), last_seal(there.rows)
        self._known = self._seq
        try:
            self._connection = connect(path)
            self._backup = Backup(backup_of(path), there.rows, there.copy)
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(_unwritable(path, error)) from error
        for row in there.rows:
            apply(self.history, _entry(row, path))

    def watch(self, watcher: Watcher) -> None:
        """Tell ``watcher`` of every entry from now on."""
        self._watchers.append(watcher)

    def append(self, event: Event, clock: Clock) -> Entry:
        """Write one event, durably, then fold it and tell the watchers.

        Raises:
            LedgerError: it could not be written (a full disk, a read-only folder).
        """
        at = float(max(clock.now(), self.history.spent))
        entry = Entry(self._seq + 1, at, time.time(), event)
        body = json.dumps(encode(event), allow_nan=False)
        row = sealed(self._seal, entry.seq, entry.at, entry.wall, type(event).__name__, body)
        try:
            self._connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise LedgerError(_unwritable(self.path, error)) from error
        self._backup.append(row, durably=isinstance(event, DEAR))
        self._seq, self._seal = row.seq, row.seal
        apply(self.history, entry)
        if is_due(self._seq, self._known):
            self._known = self._seq
            write_snapshot(self.path, Snapshot(self._seq, self._seal, self.history))
        self._tell(entry)
        return entry

    def _tell(self, entry: Entry) -> None:
        """A watcher only looks: one that fails is left out from then on, and the run goes on."""
        for watcher in list(self._watchers):
            try:
                watcher.see(entry, self.history)
            except Exception:
                self._watchers.remove(watcher)
                LOGGER.exception("%s failed and sees no further events", type(watcher).__name__)

    def close(self) -> None:
        """Close the files; safe to call twice."""
        self._connection.close()
        self._backup.close()


class MemoryLedger(Ledger):
    """A ledger that is kept in memory and lost with the process: for simulations."""

    def __init__(self) -> None:
        self.path = Path("memory")
        self.history = History()
        self.entries: list[Entry] = []
        self._watchers: list[Watcher] = []
        self._seq = 0

    def append(self, event: Event, clock: Clock) -> Entry:
        """Keep one event, fold it and tell the watchers."""
        at = max(clock.now(), self.history.spent)
        self._seq += 1
        entry = Entry(self._seq, at, at, event)
        self.entries.append(entry)
        apply(self.history, entry)
        self._tell(entry)
        return entry

    def close(self) -> None:
        """Nothing to close."""


def connect(path: Path) -> sqlite3.Connection:
    """The database at ``path`` for writing; made, whole or not at all, where there is none."""
    if path.is_symlink():  # SQLite would follow it
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    connection = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    if is_empty(connection):
        statements = (f"PRAGMA user_version={FORMAT}", *SCHEMA)
        connection.executescript(f"BEGIN; {'; '.join(statements)}; COMMIT;")
    return connection


# ------------------------------------------------------------------------ reading a database


def _whole_rows(path: Path, after: int) -> Iterator[Row]:
    """Of the database as long as it is whole, then of whatever is."""
    copy = backup_of(path)
    if not path.is_file() and not copy.is_file():
        raise LedgerError(f"There is no ledger at {path}.")
    least, last = last_seq(copy), after
    try:
        for row in _chained(path, after):
            yield row
            last = row.seq
        if last >= least:
            return
    except Damage:
        pass
    found = survey(path)
    if not found.rows:
        raise LedgerError(damaged(path, found.problem))
    if found.problem:
        _warn(damaged(path, found.problem, len(found.rows), found.lost))
    yield from found.rows[last:]


def _chained(path: Path, after: int) -> Iterator[Row]:
    """The rows of the database behind ``after``, each one checked."""
    if not path.is_file():
        return
    with reading(path) as connection:
        check_format(connection, path)
        seal = GENESIS
        for number, row in enumerate(scan(connection, after), start=max(1, after)):
            if row is None or not (number == after or follows(seal, row)):
                raise Damage(f"entry {number} is not as it was written")
            seal = row.seal
            if row.seq > after:
                yield row


def _gather(path: Path, rows: list[Row]) -> str:
    """Add all rows of the database that can be read, whole or not; returns what is wrong with it."""
    try:
        with reading(path) as connection:
            rows.extend(row for row in scan(connection, 0) if row is not None)
            check_format(connection, path)
            return structure_of(connection, path)
    except Damage as damage:
        return str(damage)


def damaged(path: Path, problem: str, readable: int = 0, lost: int = 0) -> str:
    """What to tell of a damaged ledger, and what to do."""
    if not readable:
        return (
            f"The ledger {path} is damaged ({problem or 'nothing in it is whole'}), or another version of "
            f"budgetsearch wrote it, and its backup {backup_of(path).name} does not help. Use that version, "
            "restore one of the two files from a copy, or start a new run."
        )
    missing = f"at least {lost} later ones are lost" if lost else "none is known to be lost"
    return (
        f"The ledger {path} is damaged ({problem}). {readable} events are whole, {missing}; this is what "
        f"they tell. `budgetsearch resume {shlex.quote(str(path.parent))}` mends it."
    )


@cache
def _warn(message: str) -> None:
    """Once in a process is enough."""
    LOGGER.warning(message)


def _unwritable(path: Path, error: Exception) -> str:
    remedy = locked_remedy(error) or "Make room or mend the folder's permissions,"
    return (
        f"The ledger {path} cannot be written ({error}). What it holds is safe. {remedy} then resume the run."
    )
