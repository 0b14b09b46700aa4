"""Trials that cut the training rows at lengths of their own: what is prepared, left, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.errors import DataError
from budgetsearch.core.space.space import Space
from budgetsearch.run.configuration import load_settings
from budgetsearch.run.lengths import length_shares, lengths_of, with_longest
from budgetsearch.run.preflight import resolve
from budgetsearch.training.data.tokens import Sources, prepare
from tests.support.rows import write_rows
from tests.support.simulation import SPACE


def space(body: dict[str, Any]) -> Space:
    """The usual one with a dimension of lengths."""
    return Space.parse({"dimensions": {**SPACE["dimensions"], "max_length": body}})  # type: ignore[dict-item]


def test_rows_are_prepared_for_the_longest_that_a_trial_may_have(tiny_model: Path, tmp_path: Path) -> None:
    """The values hold and not the setting; where some trials have none the setting counts too."""
    write_rows(tmp_path / "train.jsonl", 20)
    given = {"model": str(tiny_model), "data": str(tmp_path / "train.jsonl"), "gpu": "cpu", "hours": 0.01}
    settings = load_settings({**given, "max_length": 512})
    choice = space({"kind": "choice", "values": [16, 64], "ordered": True})
    assert 64 == with_longest(settings, choice).max_length
    assert [16, 64] == lengths_of(choice)
    some = space({"kind": "choice", "values": [16, 64], "when": {"quantization": ["nf4"]}})
    assert 512 == with_longest(settings, some).max_length
    plain = Space.parse(SPACE)
    assert (512, []) == (with_longest(settings, plain).max_length, lengths_of(plain))
    file = tmp_path / "own.yaml"
    file.write_text(
        "dimensions:\n  quantization: {kind: constant, value: fp32}\n  rank: {kind: constant, value: 4}\n"
        "  learning_rate: {kind: constant, value: 1e-3}\n  max_length: {kind: choice, values: [16, 48]}\n"
    )
    assert 48 == resolve(load_settings({**given, "space": str(file)})).settings.max_length


def test_what_is_left_of_the_data_is_counted_and_nothing_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Before the first second on the card."""
    write_rows(tmp_path / "train.jsonl", 60)
    sources = Sources(str(tmp_path / "train.jsonl"))
    data = prepare(tiny_model, sources, max_length=256, cache=tmp_path / "cache")
    longest = data.train_stats.max_row_tokens
    found = length_shares(
        data, space({"kind": "choice", "values": [longest - 2, longest + 9], "ordered": True})
    )
    assert [longest - 2, longest + 9] == [length for length, _ in found]
    shares = [share for _, share in found]
    kept = data.train_to(longest - 2)
    assert int(kept.lengths.sum()) / data.train_stats.tokens == shares[0] < shares[1] == 1.0
    with pytest.raises(
        DataError, match=rf"max_length 8 .* no training row .* longest row has {longest} tokens"
    ):
        length_shares(data, space({"kind": "int", "low": 8, "high": 64}))
