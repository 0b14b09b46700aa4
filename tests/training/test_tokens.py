"""Prepared rows: what is in them, what is left out and said, the process that makes them, and the cache."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from budgetsearch.core.errors import DataError, SettingsError, UntrustedCode
from budgetsearch.training.data import preparer, supervise, tokens
from budgetsearch.training.data.store import TokenSet
from budgetsearch.training.data.tokenizer import load_tokenizer
from budgetsearch.training.data.tokens import PreparedData, Sources, open_prepared, prepare
from tests.support.tiny import make_tiny_model

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose tokens are bytes."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "plain", chat_template=False)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is done in this process: another takes seconds to begin."""

    def work(task: preparer.Task, say: Any, seconds_left: Any) -> dict[str, Any]:
        return preparer.work(task, lambda message: say(message["say"]) if "say" in message else None)

    monkeypatch.setattr(tokens, "prepare_apart", work)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """A JSONL file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(model: Path, folder: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> PreparedData:
    """Prepared data of these rows, in a cache below ``folder``."""
    names = ("valid", "seed", "max_rows", "valid_share", "bad_rows", "columns")
    chosen = {name: options.pop(name) for name in names if name in options}
    settings = {"max_length": 256, "cache": folder / "cache"} | options
    data = options.pop("data", None) or write(folder / "x.jsonl", rows)
    settings.pop("data", None)
    return prepare(model, Sources(data, **chosen), **settings)


def texts(data: TokenSet, tiny: Path) -> list[tuple[str, str]]:
    """What each row holds: all of it, and what is trained, special tokens aside."""
    decode = partial(load_tokenizer(tiny).decode, skip_special_tokens=True)
    rows = [data.row(index) for index in range(len(data))]
    return [(decode(ids.tolist()), decode(ids[trained].tolist())) for ids, trained in rows]


# ------------------------------------------------------------------------------- the rows


def test_a_row_is_the_conversation_and_the_answers_are_trained(
    tiny: Path, tmp_path: Path, here: None
) -> None:
    """The rows of both sets are those of the file, each with its own sample."""
    data = prepared(tiny, tmp_path)
    assert sorted(f"q{i}" for i in range(20)) == sorted(
        whole.split("user\n")[1].split("\n")[0]
        for whole, _ in texts(data.train, tiny) + texts(data.valid, tiny)
    )
    assert all(trained.startswith("a") for _, trained in texts(data.train, tiny))
    assert [one.answer for one, _ in data.questions()] == [trained for _, trained in texts(data.valid, tiny)]
    assert (18, 2) == (data.train_stats.rows, data.valid_stats.rows)


def test_what_is_left_out_is_counted_and_said_in_five_lines(tiny: Path, tmp_path: Path, here: None) -> None:
    """Skipped rows by reason with their places, duplicates, cut rows, rows that are validation rows too."""
    bad = [{"question": "empty", "answer": ""}, {"question": "none", "answer": None}]
    rows = [*ROWS, ROWS[7], *bad, {"question": "long", "answer": "x" * 900}]
    said: list[str] = []
    data = prepared(tiny, tmp_path, rows, valid=write(tmp_path / "v.jsonl", ROWS[:5]), say=said.append)
    assert (17, 5) == (data.train_stats.rows, data.valid_stats.rows)
    assert 256 == data.train_stats.max_row_tokens
    facts = data.facts
    assert (29, 5, 1) == tuple(facts[name] for name in ("rows", "kept_out", "cut"))
    assert "2 of 29 rows are skipped" in said[1]
    assert "x.jsonl:22" in said[1] and "x.jsonl:23" in said[1]
    assert said == data.lines()
    assert len(said) <= 5


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([{"question": "q", "answer": ""}] * 3, {}, "no row can be used: 3 .*empty"),
        ([*ROWS, {"question": "q", "answer": ""}], {"bad_rows": "0"}, "1 of 21 rows .*--bad-rows 0"),
        (ROWS, {"valid": True}, "nothing is left"),
        (ROWS[:1], {}, "two different prompts"),
    ],
)
def test_rows_that_leave_nothing_to_train_on_are_refused(
    tiny: Path, tmp_path: Path, here: None, rows: list[dict[str, Any]], options: dict[str, Any], says: str
) -> None:
    """Before anything is spent, and nothing stays in the cache."""
    if "valid" in options:
        options = {"valid": write(tmp_path / "v.jsonl", ROWS)}
    with pytest.raises(DataError, match=says):
        prepared(tiny, tmp_path, rows, **options)
    assert [] == list((tmp_path / "cache" / "data").iterdir())


def test_sources_are_mixed_each_with_its_own_columns(tiny: Path, tmp_path: Path, here: None) -> None:
    """Two of three rows from the first, and none of them twice."""
    one = write(tmp_path / "one.jsonl", [{"ask": f"one {i}", "say": "x"} for i in range(30)])
    other = write(tmp_path / "other.jsonl", [{"question": f"other {i}", "answer": "y"} for i in range(10)])
    data = prepared(tiny, tmp_path, data=f"{one}=2\n{other}=1", columns="prompt=ask,completion=say\n")
    found = [trained for _, trained in texts(data.train, tiny) + texts(data.valid, tiny)]
    assert (20, 10) == (found.count("x"), found.count("y"))


def test_a_folder_brings_its_own_validation_rows(tiny: Path, tmp_path: Path, here: None) -> None:
    """They are not trained on, and it is said."""
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "train.jsonl", ROWS)
    write(tmp_path / "d" / "validation.jsonl", [{"question": "v", "answer": "w"}])
    said: list[str] = []
    data = prepared(tiny, tmp_path, data=str(tmp_path / "d"), say=said.append)
    assert (20, ["w"]) == (data.train_stats.rows, [trained for _, trained in texts(data.valid, tiny)])
    assert "sets apart" in said[0]


def test_statistics_count_what_happened(tiny: Path, tmp_path: Path, here: None) -> None:
    """Bytes can be counted by hand."""
    data = prepared(tiny, tmp_path, valid=write(tmp_path / "v.jsonl", [{"question": "v", "answer": "v"}]))
    lengths = [int(length) for length in data.train.lengths]
    stats = data.train_stats
    assert (20, sum(lengths), max(lengths)) == (stats.rows, stats.tokens, stats.max_row_tokens)
    assert sum(len(f"a{i}") + 1 for i in range(20)) == stats.target_tokens
    assert stats.mean_row_tokens == sum(lengths) / 20


# ------------------------------------------------------------------------------ the cache


def test_the_second_call_reads_the_cache(
    tiny: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is tokenized twice, the outcome is the same, and so is what is said."""
    said: list[list[str]] = [[], []]
    first = prepared(tiny, tmp_path, say=said[0].append)
    monkeypatch.setattr(tokens, "prepare_apart", lambda *_: pytest.fail("tokenized again"))
    second = prepared(tiny, tmp_path, say=said[1].append)
    assert first.folder == second.folder
    assert first.train.sha256() == second.train.sha256()
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"max_length": 64}, {"rows": ROWS[:-1]}, {"max_rows": 10}, {"columns": "text=answer"}],
)
def test_whatever_changes_the_tokens_changes_the_folder(
    tiny: Path, tmp_path: Path, here: None, change: dict[str, Any]
) -> None:
    """The folder's name is a hash of all that made the tokens."""
    assert prepared(tiny, tmp_path).folder != prepared(tiny, tmp_path, **change).folder


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json", "config.json"])
def test_whatever_chooses_the_tokenizer_changes_the_folder(
    tiny: Path, tmp_path: Path, here: None, file: str
) -> None:
    """Its class may come from the model type in config.json."""
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    path = other / file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(text + " ", encoding="utf-8")
    assert prepared(tiny, tmp_path).folder != prepared(other, tmp_path).folder


def test_the_hash_of_the_rows_is_not_of_their_split(tiny: Path, tmp_path: Path, here: None) -> None:
    """Another seed splits otherwise, but the rows are the same; their order does not count."""
    first, second = prepared(tiny, tmp_path), prepared(tiny, tmp_path, ROWS[::-1], seed=1)
    assert first.source_sha256 == second.source_sha256
    assert first.valid_hashes() != second.valid_hashes()


def test_a_sample_of_rows_is_seeded(tiny: Path, tmp_path: Path, here: None) -> None:
    """``max_rows`` counts before the split."""
    data = prepared(tiny, tmp_path, max_rows=10)
    assert 10 == data.train_stats.rows + data.valid_stats.rows


def test_a_tiny_length_is_refused(tiny: Path, tmp_path: Path) -> None:
    """No row fits into fewer than 8 tokens."""
    with pytest.raises(SettingsError, match="max_length"):
        prepared(tiny, tmp_path, max_length=7)


def test_opening_needs_no_tokenizer(
    tiny: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker reads tokens, statistics and samples from the folder alone."""
    made = prepared(tiny, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    opened = open_prepared(made.folder)
    assert list(made.questions()) == list(opened.questions())
    assert (made.train_stats, "chat") == (opened.train_stats, opened.template)


@pytest.mark.parametrize("name", ["meta.json", "train.safetensors", "valid.samples", "valid.prompts"])
def test_a_damaged_folder_says_what_to_do(tiny: Path, tmp_path: Path, here: None, name: str) -> None:
    """Half a file is a DataError, not a stack trace from somewhere else."""
    folder = prepared(tiny, tmp_path).folder
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(DataError, match="delete that folder"):
        open_prepared(folder)


# ----------------------------------------------------------------- a process of its own


def test_another_process_makes_the_same_rows_and_so_do_several(
    tiny: Path, plain: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, whoever does the work; and the folder holds nothing else."""
    rows = [*ROWS, {"question": "none", "answer": None}]
    alone = prepared(plain, tmp_path / "one", _in(tmp_path / "one", rows))
    monkeypatch.setattr(preparer, "SHARED_ROWS", 10)
    monkeypatch.setattr(tokens.os, "sched_getaffinity", lambda _: {0, 1})
    shared = prepared(plain, tmp_path / "two", _in(tmp_path / "two", rows))
    monkeypatch.setattr(tokens, "prepare_apart", supervise.prepare_apart)
    said: list[str] = []
    apart = prepared(plain, tmp_path / "three", _in(tmp_path / "three", rows), say=said.append)
    for name in (*tokens.KEPT, "meta.json"):
        assert (alone.folder / name).read_bytes() == (shared.folder / name).read_bytes(), name
        assert (alone.folder / name).read_bytes() == (apart.folder / name).read_bytes(), name
    assert {*tokens.KEPT, "meta.json"} == {path.name for path in apart.folder.iterdir()}
    assert ["tokenizing 20 of 21 rows", *apart.lines()] == said


def _in(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    folder.mkdir()
    return rows


def test_an_error_of_the_process_is_the_users_own(tiny: Path, tmp_path: Path) -> None:
    """With its kind and its words; code that comes with a tokenizer is not run there either."""
    own = tmp_path / "own"
    shutil.copytree(tiny, own)
    config = json.loads((own / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (own / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (own / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    with pytest.raises(UntrustedCode, match="--trust-remote-code"):
        prepared(own, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_nothing_of_it_stays_when_it_is_interrupted(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in whoever waits ends the process, and those that it started."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(supervise._Watch, "look", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepared(tiny, tmp_path)
    assert before == {child.pid for child in psutil.Process().children(recursive=True)}
    assert [] == list((tmp_path / "cache" / "data").iterdir())


def test_the_time_that_a_run_has_left_is_its_limit(tiny: Path, tmp_path: Path) -> None:
    """It is not waited for longer, and the message says what would help."""
    with pytest.raises(DataError, match=r"the budget leaves no more.*--hours"):
        prepared(tiny, tmp_path, seconds_left=lambda: 0.0)


def test_the_tiny_model_depends_on_its_seed_alone(tmp_path: Path) -> None:
    """The same seed gives the same weights and leaves the caller's random numbers alone."""
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    files = [
        make_tiny_model(tmp_path / str(i), seed=seed) / "model.safetensors"
        for i, seed in enumerate([3, 3, 4])
    ]
    assert expected == torch.rand(1)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()


@pytest.mark.parametrize("size", [{"vocab": 258}, {"hidden": 30}])
def test_a_tiny_model_has_a_smallest_size(tmp_path: Path, size: dict[str, int]) -> None:
    """Every byte needs an id, and every head eight numbers."""
    with pytest.raises(ValueError, match="needed"):
        make_tiny_model(tmp_path / "x", **size)  # type: ignore[arg-type]
