"""Files of rows: JSONL, JSON, CSV, TSV and Parquet, each row with its place in the file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import DataError
from budgetsearch.core.ports import Say

Row = Mapping[str, Any]
KINDS: Mapping[str, str] = {
    ".jsonl": "JSONL",
    ".ndjson": "JSONL",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
}
EXTENSIONS = tuple(KINDS)
DELIMITERS: Mapping[str, str] = {",": "commas", ";": "semicolons", "\t": "tabs"}
SHOWN_NAMES = 20
MAX_UNFOLDED = 2 << 30
"""Bytes of a Parquet file's rows: a value that a million rows share stands there once."""
MAX_BATCH = 1 << 29
"""... of the rows that are in memory at once."""


def files_of(path: Path) -> list[Path]:
    """The files of rows that a path means: itself, or of a folder all in it, by name.

    Raises:
        DataError: a folder holds none, or some of several kinds.
    """
    if not path.is_dir():
        return [path]
    names = sorted(one.name + "/" * one.is_dir() for one in path.iterdir())
    files = [path / name for name in names if Path(name).suffix.lower() in KINDS and not name.endswith("/")]
    if len({KINDS[file.suffix.lower()] for file in files}) != 1:
        problem = "files of several kinds" if files else f"no file of {', '.join(EXTENSIONS)}"
        there = ", ".join(names[:SHOWN_NAMES]) or "nothing"
        raise DataError(
            f"the folder {path} holds {problem}: {there}; name one of its files, or leave those of one kind "
            "in it"
        )
    return files


def read_rows(path: Path, say: Say = lambda _: None) -> Iterator[tuple[str, Row]]:
    """(line or row, columns) of a file of any known extension; ``say`` hears how a CSV file is divided."""
    if KINDS.get(path.suffix.lower()) == "CSV":
        return _csv_rows(path, say)
    readers = {".json": _json_rows, ".parquet": _parquet_rows}
    return readers.get(path.suffix.lower(), _jsonl_rows)(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw.removeprefix(b"\xef\xbb\xbf"), path, number).strip()
            if line:
                yield str(number), _object(_parse(line, path, number), path, str(number))


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    value = _parse(_text(path), path, 1)
    if isinstance(value, dict):
        lists = {key: item for key, item in value.items() if isinstance(item, list)}
        if len(lists) != 1:
            raise DataError(f"{path} holds an object with {len(lists)} lists; one list of rows is needed")
        value = next(iter(lists.values()))
    if not isinstance(value, list):
        raise DataError(f"{path} holds neither a list of rows nor an object with one; save its rows as JSONL")
    for number, row in enumerate(value, start=1):
        yield f"row {number}", _object(row, path, f"row {number}")


def _csv_rows(path: Path, say: Say) -> Iterator[tuple[str, Row]]:
    text, start = _text(path), 1
    try:
        delimiter = _delimiter(text)
        if delimiter != ",":
            say(f"the columns of {path.name} are separated by {DELIMITERS[delimiter]}")
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        columns = reader.fieldnames or ()
        start = reader.line_num + 1
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}:{start} does not have the {len(columns)} columns of the header, separated by "
                    f"{DELIMITERS[delimiter]}; mend it"
                )
            yield str(start), row
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{start} is not valid CSV: {error}; mend its quotes, or save it as JSONL"
        ) from error


def _delimiter(text: str) -> str:
    """What divides a header into the most columns: commas where nothing does."""
    header = io.StringIO(text, newline="").readline()
    return max(DELIMITERS, key=lambda one: len(next(csv.reader([header], delimiter=one), ())))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            unfolded = 0
            for batch in file.iter_batches(batch_size=_batch_rows(file.metadata)):
                unfolded += batch.nbytes
                if unfolded > MAX_UNFOLDED:
                    raise DataError(
                        f"{path} unfolds to more than {MAX_UNFOLDED >> 20} MiB by row {number}; keep "
                        "fewer rows"
                    )
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet after row {number}: {error}; write it again as JSONL"
        ) from error


def _batch_rows(facts: Any) -> int:
    """So many rows that they fit into memory though each repeats the largest value of its row group."""
    largest = max((facts.row_group(i).total_byte_size for i in range(facts.num_row_groups)), default=0)
    return max(1, min(256, MAX_BATCH // max(1, largest)))


def _text(path: Path) -> str:
    return _decode(path.read_bytes(), path, 1).removeprefix("\ufeff")


def _decode(raw: bytes, path: Path, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line} is not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if not isinstance(error, json.JSONDecodeError):  # thousands of digits, or of brackets
            raise DataError(f"{path}:{line} cannot be read: {error}; mend or remove it") from error
        raise DataError(
            f"{path}:{line + error.lineno - 1} is not valid JSON: {error.msg}; mend it there"
        ) from error


def _object(value: Any, path: Path, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{path}:{place} is a {type(value).__name__}, not an object with columns; mend or remove it"
        )
    return value
