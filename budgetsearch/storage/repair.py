"""Mends a damaged ledger before its run goes on: what is whole is kept, what is damaged is put aside.

At every moment the longest whole beginning stands in one of the two files: the backup gets all of it before
the database is touched. So a process that is killed here leaves something that the next one mends.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from budgetsearch.core.errors import LedgerError
from budgetsearch.storage.backup import backup_of, write_copy
from budgetsearch.storage.files import local_time, sync
from budgetsearch.storage.ledger import Survey, connect, damaged, survey
from budgetsearch.storage.seals import Row

SIDECARS = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a database."""


@dataclass(frozen=True)
class Mended:
    """What was done."""

    line: str
    """For the user."""
    lost: int
    """Events that could be seen and not be saved."""


def mend(path: Path) -> Mended | None:
    """Make the ledger at ``path`` whole again; None if it is. Call it with the run locked.

    Raises:
        LedgerError: nothing in it or its backup is whole, or the disk cannot be written; nothing is lost.
    """
    found = survey(path)
    if not found.problem and not found.flaw:
        return None
    if not found.rows:
        raise LedgerError(damaged(path, found.problem or found.flaw))
    try:
        kept = _mend(path, found)
    except OSError as error:
        raise LedgerError(
            f"The ledger {path} is damaged, and mending it failed ({error}). What is whole is safe; make "
            "room or mend the folder's permissions, then resume the run."
        ) from error
    return Mended(_line(found, kept), found.lost)


def _mend(path: Path, found: Survey) -> list[str]:
    """Returns the names of the files that were put aside."""
    kept = []
    backup = backup_of(path)
    aside = _free_name(path)
    if found.flaw:
        target = backup_of(aside)
        shutil.copyfile(backup, target)
        sync(target)
        kept.append(target.name)
    write_copy(backup, found.rows)
    if not found.problem:
        return kept
    new = path.with_name(f".{path.name}.new")
    _build(new, found.rows)
    if path.exists():
        kept.insert(0, aside.name)
    for end in (*SIDECARS, ""):
        part = Path(f"{path}{end}")
        if part.exists():
            os.replace(part, f"{aside}{end}")
    os.replace(new, path)
    sync(path.parent)
    return kept


def _free_name(path: Path) -> Path:
    """``ledger.damaged-1.sqlite``, or with the next number that nothing has."""
    for number in count(1):
        aside = path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")
        ends = [f"{aside}{end}" for end in (*SIDECARS, "")] + [str(backup_of(aside))]
        if not any(os.path.lexists(end) for end in ends):
            return aside
    raise AssertionError


def _build(path: Path, rows: list[Row]) -> None:
    """A ledger with these rows, in one file that is on the disk."""
    for end in (*SIDECARS, ""):
        Path(f"{path}{end}").unlink(missing_ok=True)
    try:
        connection = connect(path)
        try:
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", rows)
            connection.execute("COMMIT")
            connection.execute("PRAGMA journal_mode=DELETE")  # nothing of it is left beside the file
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise OSError(str(error)) from error
    sync(path)


def _line(found: Survey, kept: list[str]) -> str:
    last = found.rows[-1]
    what = f"The ledger was damaged ({found.problem})" if found.problem else "The ledger is whole"
    if found.flaw:
        what += f", {'and' if found.problem else 'but'} its backup was damaged ({found.flaw})"
    lost = (
        f"At least {found.lost} later events are lost: what they told is done again"
        if found.lost
        else "Nothing is known to be lost"
    )
    aside = f" {' and '.join(kept)} {'are' if len(kept) > 1 else 'is'} what was damaged." if kept else ""
    return (
        f"{what}. It was made again from {len(found.rows)} whole events, until {last.at:.0f} s of the run "
        f"({local_time(last.wall)}). {lost}.{aside}"
    )
