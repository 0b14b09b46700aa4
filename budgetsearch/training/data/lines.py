"""Files as lines of text, also packed ones, and what becomes of a line that is no text."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from budgetsearch.core.errors import DataError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read."""

    why: str
    """The same for all of its kind, so that they can be counted."""


Read = tuple[str, Row | Broken]
"""Line or row, and what stands there."""

PACKED: Mapping[str, str] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
MAGIC: Mapping[bytes, str] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
"""How packed files begin. The name is not asked: browsers unpack what they load and leave it the name."""
POINTER = b"version https://git-lfs"
MAX_UNFOLDED = 2 << 30
"""Bytes of a file's rows, or UNFOLDS times those of the file: a packed value may stand for a million."""
UNFOLDS = 100
MAX_VALUE = 1 << 28
"""Characters of one line or one value."""


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file that may be packed; bytes that are no UTF-8 become half characters."""
    pack = _pack(path)
    with _open(path) as file:
        bounded = MAX_UNFOLDED if pack is None else max(MAX_UNFOLDED, UNFOLDS * path.stat().st_size)
        first, unfolded = True, 0
        encoding = "utf-16" if _begins_utf16(path) else "utf-8"
        for raw in _split(file) if encoding == "utf-8" else _split_utf16(file):
            unfolded += len(raw)
            if pack and unfolded > bounded:
                raise DataError(f"{path} unfolds to more than {bounded >> 20} MiB; keep fewer rows")
            line = raw.decode("utf-8", "surrogateescape")
            yield line.removeprefix("\ufeff") if first else line
            first = False


def _split(file: IO[bytes]) -> Iterator[bytes]:
    while raw := file.readline(MAX_VALUE):
        if len(raw) == MAX_VALUE and not raw.endswith(b"\n"):
            raise DataError(f"{file.name} has a line of more than {MAX_VALUE >> 20} MiB; make it shorter")
        yield raw


def _split_utf16(file: IO[bytes]) -> Iterator[bytes]:
    text = file.read(MAX_VALUE).decode("utf-16", "replace")
    yield from (line.encode() for line in io.StringIO(text, newline="\n"))


def _begins_utf16(path: Path) -> bool:
    with _open(path) as file:
        return file.read(2) in (b"\xff\xfe", b"\xfe\xff")


def check_fetched(path: Path) -> None:
    """Refuse a file that only stands for one. Raises DataError."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise DataError(f"{path} is a Git LFS pointer, not rows; use git lfs pull, which fetches them")


def _pack(path: Path) -> str | None:
    with path.open("rb") as file:
        begins = file.read(4)
    return next((pack for magic, pack in MAGIC.items() if begins.startswith(magic)), None)


def _open(path: Path) -> IO[bytes]:
    pack = _pack(path)
    if pack == "gzip":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if pack == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def whole(text: str) -> bool:
    """Whether every character of it is one: no bytes that are no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
