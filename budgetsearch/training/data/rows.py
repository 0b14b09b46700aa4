"""Files of rows: JSONL, JSON, CSV, TSV, Parquet and Arrow, also packed; each row with its place in the file.

A row that cannot be read is ``Broken``, and the next one is read; a file that cannot be read is a DataError.
"""

from __future__ import annotations

import csv
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import DataError
from budgetsearch.core.ports import Say
from budgetsearch.training.data.json_rows import json_rows, jsonl_rows
from budgetsearch.training.data.lines import (
    MAX_UNFOLDED,
    MAX_VALUE,
    PACKED,
    UNFOLDS,
    Broken,
    Read,
    Row,
    check_fetched,
    lines_of,
    whole,
)

KINDS: Mapping[str, str] = {
    ".jsonl": "JSONL",
    ".ndjson": "JSONL",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}
EXTENSIONS = (*KINDS, *(f".jsonl{ending}" for ending in (".gz", ".zst")))
DELIMITERS: Mapping[str, str] = {
    ",": "commas",
    ";": "semicolons",
    "\t": "tabs",
    "|": "bars",
    "^": "carets",
    "~": "tildes",
    ":": "colons",
}
OLD_END = re.compile(r'(?:[^"\r\n]|"[^"]*")*\r(?!\r*\n|\Z)')
"""A first line that ends, outside of quotes, with a carriage return alone."""
SEPARATOR = re.compile(r"sep=(.)\r?\n")
"""A first line with which spreadsheets name it."""
MAX_BATCH = 1 << 29
"""... of the rows of a Parquet file that are in memory at once."""


def kind_of(path: Path) -> str | None:
    """What kind of file a name means; None: none that can be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        kind = KINDS.get(suffixes[0]) if len(suffixes) == 2 else None
        return kind if kind not in ("Parquet", "Arrow") else None
    return KINDS.get(suffixes[-1]) if suffixes else None


def read_rows(path: Path, say: Say = lambda _: None) -> Iterator[Read]:
    """(line or row, columns) of a file of any known extension; ``say`` hears how a CSV file is divided.

    Raises:
        DataError: the file cannot be read.
    """
    readers = {"CSV": _csv_rows, "JSON": json_rows, "Parquet": _parquet_rows, "Arrow": _arrow_rows}
    reader = readers.get(kind_of(path) or "", jsonl_rows)
    try:
        check_fetched(path)
        yield from reader(path, say) if reader is _csv_rows else reader(path)  # type: ignore[operator]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; mend the file, or copy it again") from error


# ------------------------------------------------------------------------------------- CSV


def _csv_rows(path: Path, say: Say) -> Iterator[Read]:
    csv.field_size_limit(MAX_VALUE)
    lines, start = _ended(lines_of(path)), 1
    header = next(lines, "")
    if named := SEPARATOR.fullmatch(header):
        delimiter, start = named.group(1), 2
    else:
        delimiter = _delimiter(header)
    word = DELIMITERS.get(delimiter, repr(delimiter))
    if delimiter != ",":
        say(f"the columns of {path.name} are separated by {word}")
    reader = csv.reader(lines if named else _chain(header, lines), delimiter=delimiter, strict=True)
    begun = start - 1
    columns: list[str] = []
    while True:
        place = begun + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if not columns or "unexpected end" in str(error):  # what follows an open quote would all be in it
                raise DataError(
                    f"{path}:{place} is not valid CSV: {error}; mend its quotes, or save it as JSONL"
                ) from error
            yield str(place), Broken(f"it is not valid CSV ({error})")
            continue
        if not columns:
            columns = cells
            if twice := [name for name in dict.fromkeys(cells) if name and cells.count(name) > 1]:
                raise DataError(f"{path} has several columns {twice[0]!r}; give each a name of its own")
        elif cells:
            yield str(place), _record(columns, cells, word)


def _record(columns: list[str], cells: list[str], word: str) -> Row | Broken:
    if not any(cells[len(columns) :]):  # spreadsheets end rows with empty cells
        cells = cells[: len(columns)]
    if cells == columns:
        return Broken("it is the header again")
    if len(cells) != len(columns):
        return Broken(f"it does not have the {len(columns)} columns of the header, separated by {word}")
    if not all(map(whole, cells)):
        return Broken("it is not UTF-8")
    return dict(zip(columns, cells, strict=True))


def _ended(lines: Iterator[str]) -> Iterator[str]:
    """Lines that end as those of others do: old spreadsheets end them with a carriage return alone."""
    first = next(lines, "")
    if not OLD_END.match(first):
        return _chain(first, lines)
    return (one for text in _chain(first, lines) for one in re.findall(r"[^\r]*\r\n?|[^\r]+", text))


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(header: str) -> str:
    """What divides a header into the most columns: commas where nothing does."""
    return max(DELIMITERS, key=lambda one: len(next(csv.reader([header], delimiter=one), ())))


# ------------------------------------------------------------------------------ Arrow, Parquet


def _parquet_rows(path: Path) -> Iterator[Read]:
    import pyarrow
    import pyarrow.parquet as parquet

    number, bounded = 0, max(MAX_UNFOLDED, UNFOLDS * path.stat().st_size)
    try:
        with parquet.ParquetFile(path) as file:
            unfolded = 0
            for batch in file.iter_batches(batch_size=_batch_rows(file.metadata)):
                unfolded += batch.nbytes
                if unfolded > bounded:
                    raise DataError(
                        f"{path} unfolds to more than {bounded >> 20} MiB by row {number}; keep fewer rows"
                    )
                for row in _rows_of(batch):
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet after row {number}: {error}; write it again as JSONL"
        ) from error


def _rows_of(batch: Any) -> Iterator[Row | Broken]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # Parquet does not check its texts
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield Broken("it is not UTF-8")


def _batch_rows(facts: Any) -> int:
    """So many rows that they fit into memory though each repeats the largest value of its row group."""
    largest = max((facts.row_group(i).total_byte_size for i in range(facts.num_row_groups)), default=0)
    return max(1, min(256, MAX_BATCH // max(1, largest)))


def _arrow_rows(path: Path) -> Iterator[Read]:
    import pyarrow

    number = 0
    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                reader = pyarrow.ipc.open_stream(file)
                batches: Iterable[Any] = reader
            except pyarrow.ArrowInvalid:  # the other of Arrow's two formats
                whole = pyarrow.ipc.open_file(file)
                batches = (whole.get_batch(index) for index in range(whole.num_record_batches))
            for batch in batches:
                for start in range(0, batch.num_rows, 256):
                    for row in _rows_of(batch.slice(start, 256)):
                        number += 1
                        yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Arrow after row {number}: {error}; save it again"
        ) from error
