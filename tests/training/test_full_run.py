"""A full run of the tiny model that ends itself by the clock, and is measured with the time that there is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from budgetsearch.core.records import Landing, Schedule, ScoreJob, Segment
from budgetsearch.core.schedule import rate_factor
from budgetsearch.training import checkpoints
from budgetsearch.training.members import Shop
from budgetsearch.training.recipe import train_gang
from budgetsearch.training.score import score
from tests.support.training import base, make_segment

STOP, EXAMPLES = 6_000, 32


class Clock:
    """The seconds of a job: each look at it costs one."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def full_run(seconds: float, overhead: float = 2.0) -> Segment:
    """Its last link, foreseen at 300 tokens a look, which is more than four short rows hold."""
    schedule = Schedule(warmup_tokens=300, stop_tokens=STOP, cooldown_tokens=STOP // 5)
    landing = Landing(seconds, 300.0, overhead, 0.5, STOP)
    return make_segment(0, STOP, schedule=schedule, landing=landing)


def trained(shop: Shop, model: Any, segment: Segment, **how: Any) -> Any:
    """The segment alone, on the job's own clock."""
    (result,) = train_gang(model, [segment], dataclasses.replace(shop, elapsed=Clock()), EXAMPLES, **how)
    return result


def test_it_lands_early_on_a_slow_machine_and_can_be_repeated_to_the_bit(
    shop: Shop, tiny_model: Path
) -> None:
    """It ends cooled and measured although it is far from its planned end; with what it decided written down
    it comes to the same bits again, on a machine that has all the time in the world."""
    told: list[str] = []
    model, segment = base(tiny_model), full_run(25.0)
    found = trained(dataclasses.replace(shop, notice=told.append), model, segment)
    assert ("ok", True) == (found.status, found.tokens < STOP)
    assert len(found.example_losses) == len(shop.data.valid)
    last = found.revisions[-1].schedule
    assert last.stop_tokens <= found.tokens
    assert rate_factor(last, found.tokens) < 0.15
    assert any("slower than foreseen; its full run now ends at" in text for text in told)

    before = checkpoints.load(shop.checkpoint_path / found.checkpoint_out).tensors
    again = dataclasses.replace(segment, landing=None, revisions=found.revisions, attempt=1)
    repeated = trained(shop, model, again, course=found.course)
    after = checkpoints.load(shop.checkpoint_path / repeated.checkpoint_out).tensors
    assert (found.tokens, found.train_loss) == (repeated.tokens, repeated.train_loss)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    unrevised = trained(shop, model, dataclasses.replace(again, revisions=(), attempt=2), course=found.course)
    assert unrevised.train_loss != found.train_loss


def test_where_the_time_ends_it_is_measured_on_the_first_examples(shop: Shop, tiny_model: Path) -> None:
    """Evaluation looks at the clock after each part; what it measured is the beginning of the whole."""
    model = base(tiny_model)
    whole = trained(shop, model, full_run(40.0, overhead=1.0))
    ended = dataclasses.replace(shop, stopping=lambda: False, elapsed=Clock())
    late = dataclasses.replace(full_run(40.0), stop_tokens=whole.tokens, start_tokens=whole.tokens)
    late = dataclasses.replace(
        late, checkpoint_in=whole.checkpoint_out, landing=Landing(1.0, 300.0, 0.5, 0.4, STOP)
    )
    (cut,) = train_gang(model, [late], ended, EXAMPLES)
    assert 0 < len(cut.example_losses) < len(whole.example_losses)
    assert list(cut.example_losses) == pytest.approx(
        whole.example_losses[: len(cut.example_losses)], rel=1e-4
    )


def test_a_score_that_is_told_to_stop_has_the_same_examples_of_both(shop: Shop, tiny_model: Path) -> None:
    """Base and adapter are measured part by part, and whatever was done stands."""
    model = base(tiny_model)
    found = trained(shop, model, full_run(20.0))
    calls = iter([False, False, True, True, True])
    hurried = dataclasses.replace(shop, stopping=lambda: next(calls))
    job = ScoreJob(1, "fp32", found.checkpoint_out, len(shop.data.valid), 0, 2, limit_seconds=1e9)
    outcome = score(model, job, hurried, started=0.0)
    assert outcome.status == "ok"
    measured = len(outcome.adapter_example_losses)
    assert 0 < measured == len(outcome.base_example_losses) == len(outcome.example_tokens)
    assert measured < len(shop.data.valid)
