"""GGUF files, gone through once: package gguf takes slices of a memory map for each word of a vocabulary."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def open_gguf(path: Path | str) -> Any:
    """A ``gguf.GGUFReader`` of the file.

    Raises:
        ImportError: package gguf is not installed.
        ValueError: it is no GGUF file, or a broken one.
        OSError: it cannot be read.
    """
    return _reader_class()(path)


@functools.cache
def _reader_class() -> Any:
    import numpy
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]  # gguf says nothing of its types
        """Slices a plain array: one of a memory map takes four times as long."""

        data: Any

        def _get(self, *arguments: Any, **more: Any) -> Any:
            if isinstance(data := self.data, numpy.memmap):
                self.data = data.view(numpy.ndarray)
            return super()._get(*arguments, **more)

    return Reader


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, whoever asks package gguf for a file gets the reader that is there already.

    transformers goes through a file for the configuration, for the tokenizer and for the weights, and makes
    the table of tensors' names anew for every module of the model: a minute for one that is read in seconds.
    """
    import gguf

    readers = functools.cache(open_gguf)
    names = functools.cache(gguf.get_tensor_name_map)
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = lambda path: readers(os.path.abspath(path)), names
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before
