"""The final scores: base against adapter on the same examples."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.records import ScoreJob
from budgetsearch.training import score as scoring
from budgetsearch.training.bases import load_base
from budgetsearch.training.members import Shop
from tests.support.training import make_segment, train

ASKED = 4


@pytest.fixture
def trained(shop: Shop, tiny_model: Path) -> tuple[object, str]:
    """A base, and the checkpoint of a trial that was trained on it."""
    base = load_base(str(tiny_model), "fp32", "cpu")
    return base, str(train(base, make_segment(0, 300), shop).checkpoint_out)


def job(checkpoint: str, *, limit: float, further: bool = True) -> ScoreJob:
    """Answers alone, two sequences to a pass."""
    return ScoreJob(1, "fp32", checkpoint, 0, ASKED, 2, limit, further)


def test_idle_seconds_go_to_further_answers(
    shop: Shop, trained: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With time to spare all validation rows are answered, though only a few were asked for, but no more than
    make a difference."""
    base, checkpoint = trained
    found = scoring.score(base, job(checkpoint, limit=600), shop, time.monotonic())
    everything = len(list(shop.data.questions()))
    assert everything > ASKED
    assert everything == found.task_examples
    assert "" == found.detail
    monkeypatch.setattr(scoring, "MAX_ANSWERS", ASKED + 1)
    found = scoring.score(base, job(checkpoint, limit=600), shop, time.monotonic())
    assert ASKED + 1 == found.task_examples


def test_a_base_in_the_computers_memory_is_scored_there_whatever_cards_there_are(
    shop: Shop, trained: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT would read the adapter onto the first card, which another run may have filled."""
    base, checkpoint = trained
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cuda")
    wanted = ScoreJob(1, "fp32", checkpoint, 2, 0, 2, 600.0)
    assert scoring.score(base, wanted, shop, time.monotonic()).adapter_loss is not None


def test_as_many_answers_as_were_asked_for(shop: Shop, trained: tuple[object, str]) -> None:
    """Whoever repeats the scores of a run wants its answers, whatever time there is."""
    base, checkpoint = trained
    found = scoring.score(base, job(checkpoint, limit=600, further=False), shop, time.monotonic())
    assert ASKED == found.task_examples


def test_answers_that_do_not_fit_are_left_out(
    shop: Shop, trained: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is cut off counts for neither base nor adapter, whatever may follow it."""
    base, checkpoint = trained
    ticks = itertools.count(step=1.0)
    monkeypatch.setattr(scoring.time, "monotonic", lambda: next(ticks))
    found = scoring.score(base, job(checkpoint, limit=3), shop, next(ticks))
    assert 0 == found.task_examples
    assert found.adapter_accuracy is None


def test_the_first_answers_are_few_so_that_there_are_some(
    shop: Shop, trained: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the time does for two and not for a whole batch, base and adapter are compared in those two."""
    base, checkpoint = trained
    real, calls = scoring.generate_answers, itertools.count()

    def cut_off(*arguments: Any, **more: Any) -> list[str] | None:
        return real(*arguments, **more) if next(calls) < 2 else None

    monkeypatch.setattr(scoring, "generate_answers", cut_off)
    found = scoring.score(base, job(checkpoint, limit=600), shop, time.monotonic())
    assert scoring.FIRST_ANSWERS == found.task_examples == len(found.base_grades)


def test_further_answers_end_where_those_of_one_sweep_do() -> None:
    """So whoever repeats them all has the same batches."""
    sweep = [part.stop for part in scoring.answer_parts(0, 30, 8)]
    assert [2, 8, 16, 24, 30] == sweep
    for first in sweep:
        on = [part.stop for part in scoring.answer_parts(first, 30, 8)]
        assert sweep == [*(part.stop for part in scoring.answer_parts(0, first, 8)), *on]
