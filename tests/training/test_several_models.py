"""A worker with two base models: each with tokens of its own, losses in nats per byte of the completion."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.bases import ModelSetup
from budgetsearch.core.errors import DataError, ModelError
from budgetsearch.core.records import ScoreJob, TrainJob, WorkerSetup
from budgetsearch.run.models import in_common
from budgetsearch.training.data.conversation import Conversation, Sample, Turn, target_bytes
from budgetsearch.training.data.tokens import PreparedData, Sources, prepare
from budgetsearch.training.workshop import Workshop
from tests.support.rows import write_rows
from tests.support.tiny import make_tiny_model
from tests.support.training import PARAMS, make_segment
from tests.support.two_models import MERGES

LENGTH = 52
"""Some rows are longer for one model than for the other."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and some rows."""
    place = tmp_path_factory.mktemp("two")
    make_tiny_model(place / "a", hidden=32, layers=1)
    make_tiny_model(place / "b", hidden=32, layers=1, vocab=320, seed=1, merges=MERGES)
    write_rows(place / "rows.jsonl", 60)
    return place


@pytest.fixture(scope="module")
def data(place: Path, session_cache: Path) -> dict[str, PreparedData]:
    """The rows as tokens of each."""
    sources = Sources(str(place / "rows.jsonl"), valid_share=0.5)
    return {
        name: prepare(place / name, sources, max_length=LENGTH, cache=session_cache) for name in ("a", "b")
    }


@pytest.fixture(scope="module")
def workshop(place: Path, data: dict[str, PreparedData]) -> Any:
    """A worker's hands on both."""
    left_out = in_common(list(data.values()), LENGTH)
    models = tuple(
        ModelSetup(name, str(place / name), str(place / name), str(data[name].folder), gone)
        for name, gone in zip(data, left_out, strict=True)
    )
    first = models[0]
    setup = WorkerSetup(
        first.model_path, first.model_name, first.data_path, str(place), "cpu", "all-linear", 0, models=models
    )
    made = Workshop(setup, lambda report: None, lambda job: False)
    yield made
    made.close()


def job(number: int, model: str, **changes: Any) -> TrainJob:
    """A few steps of a trial of one model."""
    segment = make_segment(0, 600, trial_id=number, params={**PARAMS, "model": model}, **changes)
    return TrainJob(number, (segment,), 64, 60.0)


def test_the_same_rows_are_compared_whoever_makes_tokens_of_them(data: dict[str, PreparedData]) -> None:
    """What one of them cuts is left out for both; what is left are the same samples in the same order."""
    gone = dict(zip(data, in_common(list(data.values()), LENGTH), strict=True))
    assert gone["a"], "the longest rows are cut where each byte is a token"
    left = {name: one.without(gone[name]) for name, one in data.items()}
    texts = {name: [sample.answer for sample in one.samples()] for name, one in left.items()}
    assert texts["a"] == texts["b"]
    assert len(left["a"].valid) == len(texts["a"]) < len(data["a"].valid)
    assert left["a"].valid_bytes() == left["b"].valid_bytes() == tuple(map(len, texts["a"]))
    tokens = {
        name: sum(one.valid.targets(row) for row in range(len(one.valid))) for name, one in left.items()
    }
    assert tokens["b"] < tokens["a"]


def test_models_without_a_row_in_common_are_refused(data: dict[str, PreparedData]) -> None:
    """There is nothing to compare them on."""
    with pytest.raises(DataError, match="no validation row in common"):
        in_common(list(data.values()), 1)


def test_each_trial_trains_its_own_model_and_is_measured_per_byte(
    workshop: Workshop, data: dict[str, PreparedData]
) -> None:
    """The loss is the sum of the nats over the bytes that both models' rows have, and so are the scores."""
    results = {name: workshop.train(job(number, name))[0] for number, name in enumerate(data)}
    assert {"a/fp32", "b/fp32"} == set(workshop.bases._models)
    for name, result in results.items():
        shop = workshop._shops[name]
        assert "ok" == result.status
        assert len(shop.data.valid) == len(result.example_losses) == len(shop.bytes_of)
        nats = [loss * size for loss, size in zip(result.example_losses, shop.bytes_of, strict=True)]
        assert result.loss == pytest.approx(sum(nats) / sum(shop.bytes_of))
        score = workshop.score(ScoreJob(9, f"{name}/fp32", str(result.checkpoint_out), 64, 0, 4, 60.0))
        assert score.adapter_loss == pytest.approx(result.loss, rel=1e-5)
        assert shop.bytes_of == score.example_tokens
        assert score.base_loss is not None and math.isfinite(score.base_loss)


def test_a_model_that_is_not_there_is_an_error(workshop: Workshop) -> None:
    """And not the first one in its place."""
    with pytest.raises(ModelError, match="no model 'c'; it has 'a', 'b'"):
        workshop.train(job(30, "c"))
    with pytest.raises(ModelError, match="no model 'c'"):
        workshop.bases.get("c/fp32")


def test_one_of_several_models_trains_as_if_it_were_alone(
    workshop: Workshop, place: Path, data: dict[str, PreparedData]
) -> None:
    """The same weights to the bit; its loss per token is the same nats over tokens."""
    shared = workshop.train(job(20, "b"))[0]
    alone = dataclasses.replace(
        workshop.setup,
        model_path=str(place / "b"),
        model_name=str(place / "b"),
        data_path=str(data["b"].folder),
        models=(),
    )
    own = Workshop(alone, lambda report: None, lambda job: False)
    segment = make_segment(0, 600, trial_id=20, params=PARAMS, attempt=1)
    found = own.train(TrainJob(21, (segment,), 64, 60.0))[0]
    own.close()
    files = [place / str(one.checkpoint_out) / "adapter_model.safetensors" for one in (shared, found)]
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = data["b"].whole_rows(LENGTH)
    same = workshop._shops["b"].data.valid
    assert len(same) <= len(rows)
    assert shared.loss is not None and found.loss is not None and shared.loss < found.loss


def test_the_bytes_are_of_what_is_learned() -> None:
    """All answers, or the last one alone; their reasoning, or not."""
    turns = [Turn("user", "How many?"), Turn("assistant", "Four."), Turn("user", "And then?")]
    sample = Sample(Conversation((*turns, Turn("assistant", "<think>\nFive.\n</think>\n\nÜber."))))
    assert len("Four.") + len("<think>\nFive.\n</think>\n\nÜber.") + 1 == target_bytes(sample)
    assert len("Four.Über.") + 1 == target_bytes(sample, thoughts=False)
    assert len("Über.") + 1 == target_bytes(sample, last=True, thoughts=False)
