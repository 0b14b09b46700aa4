"""What is shown of the data before a run: the rows as the model sees them, counts, and what looks wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from budgetsearch import inspect
from budgetsearch.cli import app
from budgetsearch.core.errors import DataError
from budgetsearch.storage.files import cache_folder
from budgetsearch.training.data import preparer, tokens
from budgetsearch.training.data.tokenizer import load_tokenizer
from tests.support.tiny import CHAT_TEMPLATE, make_tiny_model

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(9)]
CHAT = {
    "messages": [
        {"role": role, "content": content}
        for role, content in (("user", "one"), ("assistant", "1"), ("user", "\x1b[2J"), ("assistant", "2"))
    ]
}


@pytest.fixture(autouse=True)
def _prepared_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with a cache of the test's own."""

    def work(task: preparer.Task, say: Any, seconds_left: Any) -> dict[str, Any]:
        return preparer.work(task, lambda message: None)

    monkeypatch.setattr(tokens, "prepare_apart", work)
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(tmp_path / "cache"))


def told(*arguments: str) -> str:
    """What the command prints."""
    done = CliRunner().invoke(app, ["inspect", "--gpu", "cpu", *arguments])
    assert 0 == done.exit_code, done.output
    return done.output


def write(path: Path, rows: list[Any]) -> str:
    """A JSONL file; texts are lines as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_the_json_holds_every_row_as_the_model_sees_it(tiny_model: Path, tmp_path: Path) -> None:
    """Ids, what of them is trained, and where each row stands; counts by reason with places."""
    source = write(tmp_path / "x.jsonl", [*ROWS, CHAT, "oops", {"prompt": "q", "completion": ""}])
    found = json.loads(told("--data", source, "--model", str(tiny_model), "--json", "--all"))
    assert {"rows", "counts", "warnings", "stop_tokens", "lengths"} == set(found)
    tokenizer = load_tokenizer(tiny_model)
    rows = {row["place"]: row for row in found["rows"]}
    assert {f"x.jsonl:{number}" for number in range(1, 11)} == set(rows)
    chat = rows["x.jsonl:10"]
    trained = [token for token, flag in zip(chat["ids"], chat["trained"], strict=True) if flag]
    assert "1<|im_end|>2<|im_end|>" == tokenizer.decode(trained)
    assert tokenizer.decode(chat["ids"]) == chat["text"]
    assert ["<|im_end|>"] == found["stop_tokens"]
    counts = found["counts"]
    assert (12, 10, 9, 1) == tuple(counts[name] for name in ("rows", "kept", "train", "valid"))
    assert {"x.jsonl:11", "x.jsonl:12"} == {
        place for one in counts["skipped"].values() for place in one["places"]
    }
    assert counts["trained_tokens"] == sum(sum(row["trained"]) for row in found["rows"])
    assert 10 == sum(one["rows"] for one in found["lengths"])


def test_people_see_marks_where_there_are_no_colours_and_no_escapes(tiny_model: Path, tmp_path: Path) -> None:
    """What is learned stands in marks; a row cannot clear the screen."""
    source = write(tmp_path / "x.jsonl", [CHAT, ROWS[0]])
    text = told(source, "--model", str(tiny_model), "--rows", "9")
    assert "\u00ab1<|im_end|>\u00bb" in text and "\u00ab2<|im_end|>\u00bb" in text
    assert "\\x1b[2J" in text and "\x1b" not in text
    assert "x.jsonl:1: " in text and "2 rows: 1 are trained on, 1 are for validation" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"template": CHAT_TEMPLATE.replace("'<|im_end|>'", "'[END]'")}, "do not end with a token"),
        ({"rows": [{"prompt": "q" * 200 + f"{i}", "completion": f"{i}"} for i in range(9)]}, "are trained"),
        ({"rows": [ROWS[0]] * 9 + ROWS}, "there twice or more"),
        ({"rows": [{"prompt": f"{i}", "completion": "a" * 400} for i in range(9)]}, "larger --max-length"),
        ({"template": None}, "no chat template"),
    ],
)
def test_what_looks_wrong_is_said(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """And nothing is said of rows with which nothing is wrong."""
    model = make_tiny_model(
        tmp_path / "model", chat_template="template" not in change or change["template"] is not None
    )
    if change.get("template"):
        (model / "chat_template.jinja").write_text(change["template"], encoding="utf-8")
    source = write(tmp_path / "x.jsonl", change.get("rows", ROWS))
    found = inspect(data=source, model=model, gpu="cpu", max_length=256, rows=0)
    assert [line for line in found.warnings if says in line], found.warnings


def test_good_rows_are_shown_without_a_warning(tiny_model: Path, tmp_path: Path) -> None:
    """So that a warning means something."""
    found = inspect(data=ROWS, model=tiny_model, gpu="cpu", max_length=256)
    assert ([], 3) == (found.warnings, len(found.rows))


class PolarsFrame:
    """What a DataFrame of polars offers of itself, which is not installed here."""

    def to_dicts(self) -> list[dict[str, str]]:
        """All rows at once."""
        raise MemoryError

    def iter_rows(self, *, named: bool) -> Iterator[dict[str, str]]:
        """One row after the other."""
        assert named
        return iter(ROWS)


@pytest.mark.parametrize("kind", ["list", "columns", "frame", "polars", "dataset", "stream"])
def test_rows_may_be_given_as_python_values(tiny_model: Path, kind: str) -> None:
    """A list of dictionaries, a dictionary of columns, a DataFrame, a Dataset that may be a stream; the same
    rows are the same file."""
    import datasets
    import pandas

    table = datasets.Dataset.from_list(ROWS)
    data: Any = {
        "list": ROWS,
        "columns": {name: [row[name] for row in ROWS] for name in ROWS[0]},
        "frame": pandas.DataFrame(ROWS),
        "polars": PolarsFrame(),
        "dataset": table,
        "stream": table.to_iterable_dataset(),
    }[kind]
    held_out = [{"prompt": "v", "completion": "w"}]
    found = inspect(data=data, valid=held_out, model=tiny_model, gpu="cpu", rows=None)
    assert (9, 1) == (found.counts["train"], found.counts["valid"])
    written = cache_folder() / "rows"
    assert 2 == len(list(written.iterdir()))
    inspect(data=ROWS, valid=held_out, model=tiny_model, gpu="cpu", rows=0)
    assert 2 == len(list(written.iterdir()))


def test_splits_together_are_no_rows(tiny_model: Path) -> None:
    """One of them has to be chosen; a file that was begun does not stay."""
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    with pytest.raises(DataError, match="choose one of train, test"):
        inspect(data=datasets.DatasetDict({"train": table, "test": table}), model=tiny_model, gpu="cpu")  # type: ignore[arg-type]
    assert [] == list((cache_folder() / "rows").iterdir())


def test_a_template_is_shown_as_a_run_would_use_it(tiny_model: Path, tmp_path: Path) -> None:
    """What a run takes, inspect takes."""
    source = write(tmp_path / "x.jsonl", ROWS)
    options = ("--template", "none", "--system", "Kind.", "--train-on", "last")
    text = told(source, "--model", str(tiny_model), *options)
    assert "### Context\nKind.\n\n### Instruction\nq" in text
