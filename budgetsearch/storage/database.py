"""The ledger's SQLite file as it is found: its rows, its format, and whether SQLite finds it whole."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from budgetsearch.core.errors import LedgerError
from budgetsearch.storage.seals import FORMAT, GENESIS, Row, follows, row_of

SCHEMA = (
    """CREATE TABLE events (
    seq INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    wall REAL NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    seal TEXT NOT NULL
)""",
    """CREATE TRIGGER no_update BEFORE UPDATE ON events
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    """CREATE TRIGGER no_delete BEFORE DELETE ON events
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
)
LOCK_SECONDS = 3.0
"""Somebody who has the database locked is waited for so long: longer, and a deadline may pass meanwhile."""
BLOCKED = frozenset({3, 5, 6, 7, 8, 10, 13, 14, 23})
"""SQLite's PERM, BUSY, LOCKED, NOMEM, READONLY, IOERR, FULL, CANTOPEN, AUTH: it could not look."""
LOCKED = frozenset({5, 6})
"""... of these BUSY and LOCKED."""
SIDECARS_MISSING = frozenset({8, 14})
"""... and READONLY and CANTOPEN, where it cannot make or mend what it keeps beside a database."""
UNREADABLE = frozenset({266, 8202, 8458})
"""... but IOERR_READ, IOERR_DATA and IOERR_CORRUPTFS are a disk that has lost something."""


WRONG_NUMBER = "its format number is not as it was written"


class OtherFormat(LedgerError):
    """Another version of budgetsearch wrote the ledger."""


class Damage(Exception):
    """What is wrong with the database."""


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, for reading only.

    Raises:
        Damage: what SQLite says of it.
        LedgerError: SQLite could not look at it.
    """
    try:
        with _opened(path) as connection:
            connection.text_factory = lambda data: data.decode("utf-8", "replace")
            yield connection
    except OSError as error:
        raise LedgerError(f"The ledger {path} cannot be read now ({error}).") from error
    except (sqlite3.Error, UnicodeError) as error:  # a name in its schema may be no text any more
        code = getattr(error, "sqlite_errorcode", 1)
        if code & 0xFF in BLOCKED and code not in UNREADABLE:
            remedy = locked_remedy(error) or "Mend the folder's permissions or its disk, or make room,"
            raise LedgerError(
                f"The ledger {path} cannot be read now ({error}). {remedy} and try again."
            ) from error
        raise Damage(str(error)) from error


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection for reading only, also where nothing can be written, as on a read-only disk or in somebody
    else's folder. There SQLite cannot make what it keeps beside a database with a log: without a log it is
    told that nobody writes, and a log is read from a copy of both, whose seals say whether it is whole."""
    with closing(_connect(path)) as connection:
        if not _lacks_sidecars(connection):
            yield connection
            return
    log = Path(f"{path}-wal")
    if not log.is_file() or not log.stat().st_size:
        with closing(_connect(path, "&immutable=1")) as connection:
            yield connection
        return
    with tempfile.TemporaryDirectory(prefix="budgetsearch-") as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        shutil.copyfile(log, f"{copy}-wal")
        with closing(_connect(copy)) as connection:
            yield connection


def _connect(path: Path, more: str = "") -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro{more}", uri=True, timeout=LOCK_SECONDS)


def _lacks_sidecars(connection: sqlite3.Connection) -> bool:
    """Whether SQLite would have to write beside the database, and cannot."""
    try:
        connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.OperationalError as error:
        return error.sqlite_errorcode & 0xFF in SIDECARS_MISSING
    return False


def locked_remedy(error: Exception) -> str:
    """What to do where another program has the database locked, as the first half of a sentence; nothing if
    that is not what went wrong."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF not in LOCKED:
        return ""
    return f"Another program has had it locked for {LOCK_SECONDS:.0f} s: close what has it open,"


def is_empty(connection: sqlite3.Connection) -> bool:
    """Whether its process was killed between the file and its table."""
    return not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]


def check_format(connection: sqlite3.Connection, path: Path) -> None:
    """Insist that the database is of this version's format.

    Raises:
        Damage: it is, and its format number says otherwise.
        OtherFormat: another version wrote it.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == FORMAT or is_empty(connection):
        return
    first = next(scan(connection, 0), None)
    if first is not None and follows(GENESIS, first):
        raise Damage(WRONG_NUMBER)
    raise OtherFormat(
        f"The ledger {path} has format {version}, and this version of budgetsearch has {FORMAT}. Use the "
        "version that wrote it, or start a new run with another --out."
    )


def scan(connection: sqlite3.Connection, after: int) -> Iterator[Row | None]:
    """Each row from number ``after`` on; None for one that cannot be a row."""
    query = "SELECT seq, at, wall, kind, body, seal FROM events WHERE seq >= ? ORDER BY seq"
    for values in () if is_empty(connection) else connection.execute(query, (after,)):
        yield row_of(values)


def structure_of(connection: sqlite3.Connection, path: Path) -> str:
    """What is wrong with the database beside its rows."""
    if is_empty(connection):
        return ""
    found = [str(sql) for (sql,) in connection.execute("SELECT sql FROM sqlite_master")]
    if sorted(found) != sorted(SCHEMA):
        return "its table or its triggers are not as they were made"
    if (verdict := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        return str(verdict)
    with path.open("rb") as file:
        if not set(file.read(20)[18:]) <= {1, 2}:  # the versions of SQLite that may write and read it
            return "its header is not as it was written"
    return ""
