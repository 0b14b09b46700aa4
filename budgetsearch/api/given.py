"""Data that are given as Python values: written to the cache once, so that a resume finds them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from budgetsearch.core.errors import DataError
from budgetsearch.storage.files import cache_folder, replace_file

ROLES = ("data", "valid")


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with a file in the place of rows.

    Raises:
        DataError: the rows are none.
    """
    return {name: _source(name, value) if name in ROLES else value for name, value in settings.items()}


def _source(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (str, os.PathLike)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(one, (str, os.PathLike)) for one in value):
        return [os.fspath(one) for one in value]
    try:
        text = "".join(json.dumps(row, ensure_ascii=False, default=_plain) + "\n" for row in _rows(value))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}: the rows cannot be written as JSON: {error}; make their values plain"
        ) from error
    if not text:
        raise DataError(f"{name} holds no rows; give a source, or rows as dictionaries")
    content = text.encode("utf-8", "surrogatepass")
    path = cache_folder() / "rows" / f"{hashlib.sha256(content).hexdigest()[:32]}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    return str(path)


def _rows(value: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a list, a pandas DataFrame or a Dataset of the library datasets."""
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        value = value.to_dict("records")
    for row in chain(value):
        if not isinstance(row, Mapping):
            raise TypeError(f"a row is a {type(row).__name__}, not a dictionary of columns")
        yield dict(row)


def _plain(value: Any) -> Any:
    """Of numpy and its like, the Python value."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is no JSON value")
