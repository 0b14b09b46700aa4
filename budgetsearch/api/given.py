"""Data that are given as Python values: written to the cache once, so that a resume finds them again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

from budgetsearch.core.errors import DataError, SettingsError
from budgetsearch.core.metric import is_function
from budgetsearch.run.fields import one_a_line
from budgetsearch.storage.files import cache_folder
from budgetsearch.training.recipes.loading import code_of

ROLES = ("data", "valid")
SEVERAL = ("model", *ROLES, "columns", "tries")
"""Settings that take several, of which a list is one way to give them."""


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with a file in the place of rows.

    Raises:
        DataError: the rows are none.
        RecipeError: a recipe's class is in no file.
    """
    plain = {name: _source(name, value) if name in ROLES else value for name, value in settings.items()}
    if isinstance(kind := plain.get("recipe"), type):
        code = code_of(kind)
        plain["recipe"] = f"{code.place}:{code.name}"
    if callable(plain.get("metric")):
        plain["metric"] = _function(plain["metric"])
    return {name: _one_text(name, value) if name in SEVERAL else value for name, value in plain.items()}


def _one_text(name: str, value: Any) -> Any:
    """Several texts or paths as one text with a line each; anything else as it is.

    Raises:
        SettingsError: there are none.
    """
    if isinstance(value, (list, tuple)):
        if not value:
            raise SettingsError(f"{name}: the list is empty; name at least one, or leave it out")
        value = [os.fspath(one) if isinstance(one, os.PathLike) else one for one in value]
    return one_a_line(value)


def _function(function: Any) -> str:
    """A function of the caller's as ``module:function``: it runs in a process of its own.

    Raises:
        SettingsError: no other process can import it.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or module == "__main__" or not is_function(f"{module}:{name}"):
        shown = name or repr(function)
        raise SettingsError(
            f"metric: {shown} of {module or 'nowhere'} cannot be imported by the worker. Write it as a "
            "function at the top of a module of its own, import it from there, and give it again."
        )
    return f"{module}:{name}"


def _source(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (str, os.PathLike)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(one, (str, os.PathLike)) for one in value):
        return [os.fspath(one) for one in value]
    folder = cache_folder() / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".rows-", delete=False) as file:
        try:
            digest = _written(name, value, file)
            path = folder / f"{digest[:32]}.jsonl"
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return str(path)


def _written(name: str, value: Any, file: IO[bytes]) -> str:
    """Write the rows, a line each, and return the hash of them; few of them are in memory at once."""
    digest = hashlib.sha256()
    try:
        for row in _rows(value):
            line = json.dumps(row, ensure_ascii=False, default=_plain) + "\n"
            content = line.encode("utf-8", "surrogatepass")
            digest.update(content)
            file.write(content)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}: the rows cannot be written as JSON: {error}; make their values plain"
        ) from error
    if not file.tell():
        raise DataError(f"{name} holds no rows; give a source, or rows as dictionaries")
    return digest.hexdigest()


def _rows(value: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a list or any other iterable, of a DataFrame of pandas or polars, of a Dataset or an
    IterableDataset of the library datasets."""
    if hasattr(value, "to_dicts"):
        value = value.iter_rows(named=True)
    elif hasattr(value, "to_dict") and hasattr(value, "columns"):
        value = value.to_dict("records")
    elif isinstance(value, Mapping) and not all(isinstance(one, (list, tuple)) for one in value.values()):
        raise TypeError(f"a mapping is no list of rows; choose one of {', '.join(map(str, value))}")
    elif isinstance(value, Mapping):
        names, columns = list(value), value.values()
        value = (dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True))
    for row in value:
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
