"""The ledger: the append-only record of every event, decision and second, in SQLite.

WAL with ``synchronous=FULL``: an event that ``append`` returned from survives a power cut. Rows are
only ever inserted; two triggers refuse everything else.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from budgetsearch.core.codec import decode, encode
from budgetsearch.core.errors import LedgerError
from budgetsearch.core.events import Entry, Event
from budgetsearch.core.history import History
from budgetsearch.core.ports import Clock, Watcher

LOGGER = logging.getLogger("budgetsearch.ledger")
FORMAT = 4
SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    wall REAL NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL
);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON events
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON events
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


def read_entries(path: Path, after: int = 0) -> Iterator[Entry]:
    """The entries of a ledger behind number ``after``, in order, for reading only; a run may write to it.

    Raises:
        LedgerError: there is no ledger, or it cannot be read.
    """
    if not path.is_file():
        raise LedgerError(f"There is no ledger at {path}.")
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30)
    try:
        yield from _rows(connection, path, after)
    finally:
        connection.close()


def read_history(path: Path) -> History:
    """The history that the ledger at ``path`` tells."""
    history = History()
    for entry in read_entries(path):
        history.apply(entry)
    return history


class Ledger:
    """One run's ledger, open for appending; ``history`` is always the fold of what it holds."""

    def __init__(self, path: Path) -> None:
        """Open or create the ledger at ``path`` and replay it.

        Raises:
            LedgerError: the file is damaged or of another format.
        """
        self.path = path
        self.history = History()
        self._watchers: list[Watcher] = []
        self._seq = 0
        try:
            self._connection = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._check_format()
            self._connection.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            raise LedgerError(_damaged(path, error)) from error
        for entry in _rows(self._connection, path):
            self.history.apply(entry)
            self._seq = entry.seq

    def _check_format(self) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version > FORMAT:
            raise LedgerError(f"{self.path} was written by a newer budgetsearch (format {version}).")
        if 0 < version < FORMAT:
            raise LedgerError(
                f"{self.path} was written by an older budgetsearch (format {version}) and cannot go on. "
                "Resume it with that version, or start a new run with another --out."
            )
        self._connection.execute(f"PRAGMA user_version={FORMAT}")

    def watch(self, watcher: Watcher) -> None:
        """Tell ``watcher`` of every entry from now on."""
        self._watchers.append(watcher)

    def append(self, event: Event, clock: Clock) -> Entry:
        """Write one event, durably, then fold it and tell the watchers.

        Raises:
            LedgerError: it could not be written (a full disk, a read-only folder).
        """
        at = max(clock.now(), self.history.spent)
        entry = Entry(self._seq + 1, at, time.time(), event)
        body = json.dumps(encode(event), allow_nan=False)
        try:
            self._connection.execute(
                "INSERT INTO events VALUES (?, ?, ?, ?, ?)",
                (entry.seq, entry.at, entry.wall, type(event).__name__, body),
            )
        except sqlite3.Error as error:
            raise LedgerError(
                f"The ledger {self.path} cannot be written ({error}). What it holds is safe; make room or "
                "mend the folder's permissions, then resume the run."
            ) from error
        self._seq = entry.seq
        self.history.apply(entry)
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
        """Close the file; safe to call twice."""
        self._connection.close()


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
        self.history.apply(entry)
        self._tell(entry)
        return entry

    def close(self) -> None:
        """Nothing to close."""


def _rows(connection: sqlite3.Connection, path: Path, after: int = 0) -> Iterator[Entry]:
    seq = 0
    try:
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return  # its process was killed between the file and its table
        query = "SELECT seq, at, wall, body FROM events WHERE seq > ? ORDER BY seq"
        for seq, at, wall, body in connection.execute(query, (after,)):
            yield Entry(seq, at, wall, decode(Event, json.loads(body)))
    except (sqlite3.DatabaseError, ValueError) as error:
        raise LedgerError(_damaged(path, error, seq)) from error


def _damaged(path: Path, error: Exception, seq: int | None = None) -> str:
    where = f" near entry {seq}" if seq else ""
    return (
        f"The ledger {path} is damaged{where}, or another version of budgetsearch wrote it ({error}). Use "
        "that version, restore the file from a copy, or start a new run."
    )
