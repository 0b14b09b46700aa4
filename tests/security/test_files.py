"""Files from elsewhere that are built to hurt: one clear error that names them, soon, in little memory."""

from __future__ import annotations

import ast
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import budgetsearch
from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import DataError, ModelError, SettingsError
from budgetsearch.machine.clock import SLURM_END, deadline_of
from budgetsearch.run.configuration import load_settings
from budgetsearch.training.data import rows
from budgetsearch.training.data.encoder import Encoder
from budgetsearch.training.data.models import resolve_model
from budgetsearch.training.data.tokenizer import load_tokenizer
from budgetsearch.training.data.tokens import Sources, prepare

PACKAGE = Path(budgetsearch.__file__).parent
NESTED = "[" * 100_000
INDEX = "model.safetensors.index.json"
MODELS: dict[str, tuple[str, str | bytes]] = {
    "a list of weights": (INDEX, '{"weight_map": ["a"]}'),
    "weights that are no names": (INDEX, '{"weight_map": {"a": {"b": 1}}}'),
    "weights outside": (INDEX, '{"weight_map": {"a": "../../etc/passwd"}}'),
    "a nested index": (INDEX, NESTED),
    "a nested config": ("config.json", NESTED),
    "a config that is a list": ("config.json", "[]"),
    "no tensors": ("model.safetensors", b"\x10" + b"\0" * 40),
    "a long header": ("model.safetensors", b"\xff" * 64),
    "a nested header": ("model.safetensors", (100_000).to_bytes(8, "little") + NESTED.encode()),
}
"""By what is wrong with a model: a file of its folder, and what it holds."""
TEMPLATES = {
    "zero": "{{ 1 / 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a key": "{{ messages['nobody']['home'] }}",
    "an index": "{{ messages[99].content.x }}",
    "no template": "{% for %}",
    "a format": "{{ '%d' % 'x' }}",
    "escape": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
}
"""Chat templates that fail."""
HOURS = ["1e300", "1e9", "inf", "nan", "9" * 400 + "d"]
ENDS = ["²", "9" * 400, "-1", "soon", "1e9", "０"]
"""What SLURM_JOB_END_TIME may hold."""


@pytest.mark.parametrize("broken", MODELS)
def test_a_broken_model_is_an_error_with_its_file(tiny_model: Path, tmp_path: Path, broken: str) -> None:
    """Before anything is loaded: not a traceback, nor a budget that is called too small an hour later."""
    name, content = MODELS[broken]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=name):
        resolve_model(str(folder), tmp_path / "cache")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_fails_is_a_data_error(tiny_model: Path, template: str) -> None:
    """Whatever it does."""
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="chat template"):
        Encoder(tokenizer)


@pytest.mark.parametrize("hours", HOURS)
def test_hours_that_no_clock_knows_are_refused(tmp_path: Path, hours: str) -> None:
    """By their flag."""
    with pytest.raises(SettingsError, match="--hours must be a time"):
        load_settings({"hours": hours, "gpu": "cpu"}, cwd=tmp_path)


@pytest.mark.parametrize("end", ENDS)
def test_an_end_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Whoever set the variable."""
    monkeypatch.setenv(SLURM_END, end)
    with pytest.raises(SettingsError, match=SLURM_END):
        deadline_of("slurm")


# ------------------------------------------------------------------------------- data


def bomb(path: Path, length: int, count: int) -> Path:
    """A Parquet file of some hundred bytes with one text so many times."""
    import pyarrow
    import pyarrow.parquet as parquet

    text = pyarrow.array(["x" * length])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), text)
    table = pyarrow.table({"prompt": column, "completion": column})
    parquet.write_table(table.cast(pyarrow.schema([("prompt", "string"), ("completion", "string")])), path)
    return path


@pytest.mark.parametrize(("length", "count"), [(4_000, 100_000), (4_000_000, 200)])
def test_a_parquet_file_that_unfolds_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, count: int
) -> None:
    """Many rows or large ones: what is in memory at once is bounded, and so is the whole."""
    monkeypatch.setattr(rows, "MAX_UNFOLDED", 1 << 26)
    monkeypatch.setattr(rows, "MAX_BATCH", 1 << 24)
    path = bomb(tmp_path / "bomb.parquet", length, count)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(DataError, match="unfolds to more than"):
        sum(len(row["prompt"]) for _, row in rows.read_rows(path))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_nested_rows_are_an_error_of_the_data(tiny_model: Path, tmp_path: Path, name: str) -> None:
    """With the file's name."""
    (tmp_path / name).write_text(NESTED, encoding="utf-8")
    with pytest.raises(DataError, match=name):
        prepare(tiny_model, Sources(str(tmp_path / name), None, 0, None, 0.1), max_length=64, cache=tmp_path)


@pytest.mark.parametrize("text", [NESTED, '{"a":' * 100_000, b"[" * 100_000])
def test_brackets_without_end_are_a_value_error(text: Any) -> None:
    """In any JSON text, in no time."""
    start = time.perf_counter()
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(text)
    assert time.perf_counter() - start < 1.0
    assert {"a": 1} == read_json(json.dumps({"a": 1}))


def test_all_json_is_read_so() -> None:
    """Where it is not, the text is our own, or RecursionError is caught as well."""
    own: Callable[[ast.AST], bool] = lambda node: (  # noqa: E731
        isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load")
    )
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(map(own, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
    }
    task = "training/data/sketch.py"  # a program that imports nothing but Jinja; its task is our own text
    assert {"core/codec.py", "training/data/json_rows.py", "tools/compare/kept.py", task} == found
