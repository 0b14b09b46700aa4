"""What is wrong with a study, and how a damaged file makes room for one that is made again."""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from budgetsearch.core.history.trial import TrialState

PASSING = frozenset(
    {
        *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR),
        *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM),
        *(sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_NOLFS),
    }
)
"""SQLite's complaints about a lock, a disk or permissions: they say nothing of what the file holds.
Source: https://sqlite.org/rescode.html, primary codes."""
BESIDE = ("-journal", "-wal", "-shm")
"""What SQLite keeps beside a file: with another one in its place it would be taken for that one's."""
DAMAGED = "damaged"
OTHER_VERSION = "other-version"
CONTRADICTS = "contradicts-ledger"


class Contradiction(Exception):
    """The study says what the ledger does not."""


class Damaged(Exception):
    """The file is not whole."""


def damage(error: BaseException) -> str:
    """What an error of a SQLite study says of its file, as part of a file name; "" where nothing.

    An error that is neither SQLite's nor the system's comes from what Optuna found in the file.
    """
    chain = list(_chain(error))
    if any(isinstance(e, Contradiction) for e in chain):
        return CONTRADICTS
    codes = [getattr(e, "sqlite_errorcode", None) for e in chain if isinstance(e, sqlite3.Error)]
    if any(isinstance(e, (OSError, MemoryError, ImportError)) for e in chain):
        return ""
    if any(code is not None and code & 0xFF in PASSING for code in codes):
        return ""
    if "compatible with the table schema" in str(error):
        return OTHER_VERSION
    return DAMAGED


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from; SQLAlchemy keeps the driver's own in ``orig``."""
    while error is not None:
        yield error
        if isinstance(original := getattr(error, "orig", None), BaseException):
            yield original
        error = error.__cause__ or error.__context__


def put_aside(file: Path, why: str) -> Path:
    """Rename a study's file, and what SQLite keeps beside it, to say why; returns its new path.

    Raises:
        OSError: it cannot be renamed.
    """
    number = 1
    while (aside := file.with_name(f"{file.stem}-{why}-{number}{file.suffix}")).exists():
        number += 1
    os.rename(file, aside)
    for end in BESIDE:
        beside = file.with_name(file.name + end)
        if beside.exists():
            os.rename(beside, aside.with_name(aside.name + end))
    return aside


def check_whole(storage: Any) -> None:
    """Let SQLite look at every page.

    Raises:
        Damaged: it found something.
    """
    import sqlalchemy

    with storage.engine.connect() as connection:
        found = connection.execute(sqlalchemy.text("PRAGMA quick_check(1)")).scalar()
    if found != "ok":
        raise Damaged(str(found))


def check_trial(frozen: Any, state: TrialState | None, values: Mapping[int, float]) -> None:
    """Compare what cannot change any more with what the ledger says of the trial.

    ``values``: its loss by rung, from the ledger.

    Raises:
        Contradiction: they differ.
    """
    name = f"trial {frozen.number}"
    if state is None:
        raise Contradiction(f"{name} is none of the ledger's")
    if not all(_same(value, state.trial.params.get(key)) for key, value in frozen.params.items()):
        raise Contradiction(f"{name} has another configuration")
    ahead = set(frozen.intermediate_values) - set(values)
    if ahead:
        raise Contradiction(f"{name} has a loss at rung {min(ahead)} that the ledger does not know")
    if not frozen.state.is_finished():
        return  # whatever else differs can be written
    if not all(close(value, frozen.intermediate_values.get(step)) for step, value in values.items()):
        raise Contradiction(f"{name} has other losses")


def _same(one: Any, other: Any) -> bool:
    return close(one, other) if isinstance(one, float) and isinstance(other, float) else bool(one == other)


def close(one: float | None, other: float | None) -> bool:
    """The same number, as far as databases keep it."""
    return one is not None and other is not None and math.isclose(one, other, rel_tol=1e-6)


def reason(error: BaseException) -> str:
    """What the database's driver said, in a line; libraries wrap it in advice of their own."""
    said = next((found for e in _chain(error) if (found := getattr(e, "orig", None)) is not None), error)
    return str(said).strip().partition("\n")[0]
