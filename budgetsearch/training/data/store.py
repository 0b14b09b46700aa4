"""Tokenized rows on disk: written in a stream, mapped into memory, read by every worker without a tokenizer.

One safetensors file holds ``tokens`` (int32) and ``trained`` (uint8), end to end for all rows, ``offsets``
(int64), where each row begins, and ``targets`` (int32), the tokens of each row that have a loss.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

COLUMNS = {"offsets": "I64", "tokens": "I32", "targets": "I32", "trained": "U8"}
"""Of the file, in its order: the widest first, so that each begins where its numbers may."""


class TokenSet:
    """Tokenized rows, read-only."""

    def __init__(self, path: Path) -> None:
        from safetensors.torch import load_file

        tensors = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        self._tokens, self._trained = tensors["tokens"], tensors["trained"].view(bool)
        self._offsets, self._targets = tensors["offsets"], tensors["targets"]
        self.lengths: NDArray[numpy.int64] = numpy.diff(self._offsets)
        """Tokens of each row."""
        ends = len(self._tokens), len(self._trained)
        if len(self.lengths) != len(self._targets) or {int(self._offsets[-1])} != set(ends):
            raise ValueError("offsets and tokens do not match")

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> tuple[NDArray[numpy.int32], NDArray[numpy.bool_]]:
        """Ids of a row, and which of them are trained on."""
        at = slice(self._offsets[index], self._offsets[index + 1])
        return self._tokens[at], self._trained[at]

    def targets(self, index: int) -> int:
        """Tokens of a row with a loss: those that are trained on and have one before them."""
        return int(self._targets[index])

    def sha256(self) -> str:
        """Hash of ids, of which are trained, of where rows end: which rows these are, in which order."""
        digest = hashlib.sha256()
        for part in (self._tokens, self._trained, self._offsets):
            digest.update(part.data)
        return digest.hexdigest()


class Chosen(TokenSet):
    """Some rows of a set, by their indices in it."""

    def __init__(self, rows: TokenSet, kept: Sequence[int]) -> None:
        self._rows, self._kept = rows, kept
        self.lengths = rows.lengths[list(kept)]

    def row(self, index: int) -> tuple[NDArray[numpy.int32], NDArray[numpy.bool_]]:
        """Ids of a row, and which of them are trained on."""
        return self._rows.row(self._kept[index])

    def targets(self, index: int) -> int:
        """Tokens of a row with a loss."""
        return self._rows.targets(self._kept[index])

    def sha256(self) -> str:
        """As of the whole set, which these are chosen from."""
        return self._rows.sha256()


class Cut(TokenSet):
    """The rows of a set up to a length; those that have nothing with a loss till there are left out."""

    def __init__(self, rows: TokenSet, longest: int) -> None:
        """``longest`` in tokens."""
        self._rows, self._longest = rows, longest
        counts = [self._within(row) for row in range(len(rows))]
        self._kept = [row for row, count in enumerate(counts) if count]
        self._counts = [count for count in counts if count]
        self.lengths = numpy.minimum(rows.lengths[self._kept], longest)

    def _within(self, row: int) -> int:
        if self._rows.lengths[row] <= self._longest:
            return self._rows.targets(row)
        return int(numpy.count_nonzero(self._rows.row(row)[1][1 : self._longest]))

    def row(self, index: int) -> tuple[NDArray[numpy.int32], NDArray[numpy.bool_]]:
        """Ids of a row, and which of them are trained on."""
        ids, trained = self._rows.row(self._kept[index])
        return ids[: self._longest], trained[: self._longest]

    def targets(self, index: int) -> int:
        """Tokens of a row with a loss."""
        return self._counts[index]

    def sha256(self) -> str:
        """As of the whole set, which these are cut from."""
        return self._rows.sha256()


class TokenWriter:
    """Rows that are appended to a file."""

    def __init__(self, tokens: BinaryIO, trained: BinaryIO) -> None:
        self._tokens, self._trained = tokens, trained
        self.lengths, self.targets = array("q"), array("i")

    def add(self, ids: ArrayLike, trained: ArrayLike) -> None:
        """Append a row."""
        tokens, mask = numpy.asarray(ids, dtype=numpy.int32), numpy.asarray(trained, dtype=bool)
        self._tokens.write(tokens.tobytes())
        self._trained.write(mask.tobytes())
        self.lengths.append(len(tokens))
        self.targets.append(int(numpy.count_nonzero(mask[1:])))


@contextmanager
def writing(path: Path) -> Iterator[TokenWriter]:
    """A writer of the file ``path``, which is there once all rows are; memory holds two numbers a row."""
    parts = {name: path.with_suffix(f".{name}") for name in ("tokens", "trained")}
    try:
        with parts["tokens"].open("wb") as tokens, parts["trained"].open("wb") as trained:
            writer = TokenWriter(tokens, trained)
            yield writer
        _join(path, parts, writer)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _join(path: Path, parts: dict[str, Path], writer: TokenWriter) -> None:
    """The format's own writer would want all of it in memory."""
    offsets = numpy.cumsum([0, *writer.lengths], dtype=numpy.int64)
    here: dict[str, memoryview] = {"offsets": offsets.data, "targets": memoryview(writer.targets)}
    header, end = {}, 0
    for name, kind in COLUMNS.items():
        size = here[name].nbytes if name in here else parts[name].stat().st_size
        shape = [size * 8 // int(kind[1:])]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end := end + size]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name in COLUMNS:
            if name in here:
                file.write(here[name])
            else:
                with parts[name].open("rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
