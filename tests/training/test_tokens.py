"""Tokenized rows: what is in them, what is cut, and the cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.errors import DataError, SettingsError
from budgetsearch.training.data import tokens
from budgetsearch.training.data.examples import Example
from budgetsearch.training.data.store import TokenSet
from budgetsearch.training.data.tokens import (
    PreparedData,
    Sources,
    fit,
    load_tokenizer,
    open_prepared,
    prepare,
    render_prompt,
)
from tests.support.tiny import CHAT_TEMPLATE, make_tiny_model

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)]
CHAT = Example(({"role": "user", "content": "q1"},), "a1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose tokens are bytes."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "plain", chat_template=False)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """A JSONL file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(model: Path, folder: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> PreparedData:
    """Prepared data of these rows, in a cache below ``folder``."""
    chosen = {
        name: options.pop(name) for name in ("valid", "seed", "max_rows", "valid_share") if name in options
    }
    settings = {"max_length": 256, "cache": folder / "cache"} | options
    return prepare(model, Sources(write(folder / "x.jsonl", rows), **chosen), **settings)


def split_row(data: TokenSet, index: int) -> tuple[list[int], int]:
    """The ids of a row of one prompt and one completion, and the length of the prompt."""
    ids, trained = data.row(index)
    prompt = trained.tolist().index(True)
    assert trained[prompt:].all()
    return ids.tolist(), prompt


def test_a_row_is_the_rendered_prompt_and_the_completion_with_its_end(tiny: Path, tmp_path: Path) -> None:
    """The prompt ids are an exact prefix, and the last id is the end of turn."""
    data, tokenizer = prepared(tiny, tmp_path), load_tokenizer(tiny)
    for index, example in enumerate(data.valid_examples):
        ids, prompt = split_row(data.valid, index)
        assert render_prompt(tokenizer, example) == tokenizer.decode(ids[:prompt])
        assert f"{example.completion}<|im_end|>" == tokenizer.decode(ids[prompt:])
        assert tokenizer.eos_token_id == ids[-1]
        assert len(ids) == data.valid.lengths[index]


def test_the_chat_template_is_used_as_it_is(tiny: Path) -> None:
    """One turn per message and an open one for the answer."""
    expected = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    assert expected == render_prompt(load_tokenizer(tiny), CHAT)


def test_without_a_chat_template_a_plain_one_serves(plain: Path, tmp_path: Path) -> None:
    """Headings mark the turns; the eos token ends the completion."""
    data, tokenizer = prepared(plain, tmp_path), load_tokenizer(plain)
    ids, prompt = split_row(data.valid, 0)
    assert "plain" == data.template
    assert "### Instruction\nq1\n\n### Response\n" == render_prompt(tokenizer, CHAT)
    assert f"{data.valid_examples[0].completion}<|im_end|>" == tokenizer.decode(ids[prompt:])


def test_what_a_template_puts_around_a_completion_is_kept(tiny: Path) -> None:
    """A space before the answer, an end that is no special token: both are seen, and eos is added."""
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
        "{% else %} {{ m['content'] }};{% endif %}{% endfor %}"
    )
    assert (" ", ";<|im_end|>") == tokens._around(tokenizer)


def test_a_template_that_rewrites_the_prompt_falls_back_to_eos(tiny: Path) -> None:
    """Where the prompt is no prefix of the whole chat, the completion simply ends with eos."""
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert ("", "<|im_end|>") == tokens._around(tokenizer)


def test_a_template_that_refuses_the_messages_names_the_row(tiny: Path) -> None:
    """The template's own complaint is in the message."""
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"x\.jsonl:3: .*no system role"):
        render_prompt(tokenizer, Example(CHAT.prompt, "a", None, "x.jsonl:3"))


def test_todays_date_does_not_enter_the_tokens(tiny: Path) -> None:
    """A template that would fill in the date gets a fixed one, or a run could not be repeated."""
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = "{{ date_string }}" + CHAT_TEMPLATE
    assert render_prompt(tokenizer, CHAT).startswith("26 Jul 2024")


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        (8, 8, (8, 8)),
        (12, 9, (12, 4)),
        (4, 99, (4, 12)),
        (13, 8, (8, 8)),
        (99, 2, (14, 2)),
        (99, 99, (4, 12)),
        (13, 3, (13, 3)),
    ],
)
def test_long_rows_lose_the_right_end(prompt: int, completion: int, expected: tuple[int, int]) -> None:
    """Of 16: the completion's end goes while the prompt leaves it 4, else the prompt's beginning."""
    before, after = list(range(prompt)), list(range(1000, 1000 + completion))
    cut_before, cut_after = fit(before, after, 16)
    assert expected == (len(cut_before), len(cut_after))
    assert before[len(before) - expected[0] :] == cut_before
    assert after[: expected[1]] == cut_after


def test_statistics_count_what_happened(tiny: Path, tmp_path: Path) -> None:
    """Bytes can be counted by hand: 30 of template and special tokens, then the texts."""
    held_out = write(tmp_path / "valid.jsonl", [{"question": "v", "answer": "v"}])
    rows = [{"question": "q", "answer": "abc"}, {"question": "r", "answer": "x" * 400}]
    data = prepared(tiny, tmp_path, rows, valid=held_out, max_length=64)
    stats, (_, prompt) = data.train_stats, split_row(data.train, 0)
    short = prompt + len("abc") + 1
    assert (2, short + 64, short + 64 - 2 * prompt) == (stats.rows, stats.tokens, stats.target_tokens)
    assert (1, 0, 64, (short + 64) / 2) == (
        stats.truncated,
        stats.dropped,
        stats.max_row_tokens,
        stats.mean_row_tokens,
    )


def test_examples_stay_aligned_when_a_row_is_dropped(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row without completion tokens leaves both the tokens and the examples."""
    real = fit

    def drop(prompt: list[int], completion: list[int], room: int) -> tuple[list[int], list[int]]:
        return real(prompt, completion if len(completion) > 2 else [], room)

    monkeypatch.setattr(tokens, "fit", drop)
    held_out = write(
        tmp_path / "v.jsonl", [{"question": "v", "answer": "v"}, {"question": "w", "answer": "ww"}]
    )
    data = prepared(tiny, tmp_path, valid=held_out)
    assert (1, 1) == (data.valid_stats.rows, data.valid_stats.dropped)
    assert ["ww"] == [example.completion for example in data.valid_examples]


def test_the_second_call_reads_the_cache(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tokenized twice, and the outcome is the same."""
    first = prepared(tiny, tmp_path)
    monkeypatch.setattr(tokens, "load_tokenizer", lambda *_, **__: pytest.fail("tokenized again"))
    second = prepared(tiny, tmp_path)
    assert first.folder == second.folder
    assert [split_row(first.train, i) for i in range(3)] == [split_row(second.train, i) for i in range(3)]


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_length": 64}, {"rows": ROWS[:-1]}, {"max_rows": 10}])
def test_whatever_changes_the_tokens_changes_the_folder(
    tiny: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """The folder's name is a hash of all that made the tokens."""
    assert prepared(tiny, tmp_path).folder != prepared(tiny, tmp_path, **change).folder


def test_another_template_changes_the_folder(tiny: Path, plain: Path, tmp_path: Path) -> None:
    """The same rows under another tokenizer are other tokens."""
    assert prepared(tiny, tmp_path).folder != prepared(plain, tmp_path).folder


def test_the_hash_of_the_rows_is_not_of_their_split(tiny: Path, tmp_path: Path) -> None:
    """Another seed splits otherwise, but the rows are the same."""
    assert prepared(tiny, tmp_path).source_sha256 == prepared(tiny, tmp_path, seed=1).source_sha256


def test_a_sample_of_rows_is_seeded(tiny: Path, tmp_path: Path) -> None:
    """``max_rows`` counts before the split."""
    data = prepared(tiny, tmp_path, max_rows=10)
    assert 10 == data.train_stats.rows + data.valid_stats.rows


def test_training_rows_that_are_in_the_validation_file_are_left_out(tiny: Path, tmp_path: Path) -> None:
    """No prompt is on both sides, and the user hears of it."""
    said: list[str] = []
    data = prepared(tiny, tmp_path, valid=write(tmp_path / "valid.jsonl", ROWS[:5]), say=said.append)
    assert (15, 5) == (data.train_stats.rows, data.valid_stats.rows)
    assert any(line.startswith("5 rows of") for line in said)


def test_nothing_left_to_train_on_is_an_error(tiny: Path, tmp_path: Path) -> None:
    """The same file cannot train and validate."""
    with pytest.raises(DataError, match="nothing is left"):
        prepared(tiny, tmp_path, valid=write(tmp_path / "valid.jsonl", ROWS))


def test_a_tiny_length_is_refused(tiny: Path, tmp_path: Path) -> None:
    """No row fits into fewer than 8 tokens."""
    with pytest.raises(SettingsError, match="max_length"):
        prepared(tiny, tmp_path, max_length=7)


def test_opening_needs_no_tokenizer(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker reads tokens, statistics and examples from the folder alone."""
    made = prepared(tiny, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    opened = open_prepared(made.folder)
    assert made.valid_examples == opened.valid_examples
    assert (made.train_stats, "chat") == (opened.train_stats, opened.template)


@pytest.mark.parametrize("name", ["meta.json", "train.safetensors", "valid.jsonl"])
def test_a_damaged_folder_says_what_to_do(tiny: Path, tmp_path: Path, name: str) -> None:
    """Half a file is a DataError, not a stack trace from somewhere else."""
    folder = prepared(tiny, tmp_path).folder
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(DataError, match="delete that folder"):
        open_prepared(folder)


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
        make_tiny_model(tmp_path, **size)  # type: ignore[arg-type]
