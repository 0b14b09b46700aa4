"""Columns inside of columns: ``translation.en`` is the value ``en`` of the object in ``translation``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from budgetsearch.training.data.conversation import Skip
from budgetsearch.training.data.messages import parsed

Row = Mapping[str, Any]

INNER = 6
"""Names inside of a column that are shown."""


def opened(row: Row, columns: Iterable[str]) -> dict[str, Any]:
    """The values of those columns that lie inside of others, by their paths; None where nothing does.

    A column whose own name has a dot comes first. Of a list ``0`` is the first item.
    """
    return {
        path: _at(row[path.partition(".")[0]], path.partition(".")[2])
        for path in columns
        if path not in row and path.partition(".")[2] and path.partition(".")[0] in row
    }


def outer(path: str, row: Row) -> str:
    """The column of the row that a path leads into."""
    return path if path in row else path.partition(".")[0]


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            try:
                value = parsed(value, path)
            except Skip:
                return None
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, (list, tuple)) and key.isdecimal():
            value = value[int(key)] if int(key) < len(value) else None
        else:
            return None
    return value


def names(row: Row) -> str:
    """The names of the columns, with those inside of them."""
    return ", ".join(_name(str(column), value) for column, value in row.items()) or "none"


def _name(column: str, value: Any) -> str:
    if not isinstance(value, Mapping) or not value:
        return column
    return f"{column} ({', '.join(f'{column}.{key}' for key in [*value][:INNER])})"
