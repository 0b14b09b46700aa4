"""GGUF files are gone through once, and hold what package gguf says they hold."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy
import pytest

from budgetsearch.machine.gguf_files import open_gguf, read_once


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A vocabulary, a number, and one tensor."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "bc", "déf"])
    writer.add_tensor("output.weight", numpy.arange(64, dtype=numpy.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_read_is_what_gguf_reads(file: Path) -> None:
    """Every field and tensor."""
    ours, theirs = open_gguf(file), gguf.GGUFReader(file)
    assert list(ours.fields) == list(theirs.fields)
    assert [f.contents() for f in ours.fields.values()] == [f.contents() for f in theirs.fields.values()]
    assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]
    assert numpy.array_equal(ours.tensors[0].data, theirs.tensors[0].data)


def test_whoever_asks_again_gets_the_same_reader(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the path is written, and only inside."""
    plain = gguf.GGUFReader
    monkeypatch.chdir(file.parent)
    with read_once():
        assert gguf.GGUFReader(file) is gguf.GGUFReader(str(file)) is gguf.GGUFReader("model.gguf")
        llama = gguf.MODEL_ARCH.LLAMA
        assert gguf.get_tensor_name_map(llama, 2) is gguf.get_tensor_name_map(llama, 2)
    assert gguf.GGUFReader is plain


def test_a_broken_file_is_an_error_as_ever(tmp_path: Path) -> None:
    """Nothing is kept of it."""
    (tmp_path / "bad.gguf").write_bytes(b"no such thing" * 9)
    with read_once(), pytest.raises(ValueError, match="GGUF"):
        gguf.GGUFReader(tmp_path / "bad.gguf")
