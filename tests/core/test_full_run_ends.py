"""A full run that stops paying stops: its best checkpoint stays, and the next finalist gets the seconds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from budgetsearch.core.history.trial import TrialState, turned_worse
from budgetsearch.core.metric import Metric
from budgetsearch.core.records import Segment
from tests.support.factories import Story
from tests.support.simulation import run
from tests.support.worlds import SyntheticWorld

TURN = 110_000
"""From so many tokens on everybody's validation loss rises."""


class Overfitting(SyntheticWorld):
    """Data that are learnt by heart."""

    def loss(self, segment: Segment, tokens: int) -> float:
        """As ever, and then worse with every token."""
        return super().loss(segment, min(tokens, TURN)) + 2.0 * max(0, tokens - TURN) / TURN


def state(losses: list[float], noise: float = 0.0, examples: int = 16) -> TrialState:
    """A trial with these evaluations in its full run; the examples scatter by ``noise``."""
    story, chance = Story.planned(), random.Random(0)
    found = story.history.trials[story.trial()]
    found.full_losses = losses
    found.full_marks = [1000 * (n + 1) for n in range(len(losses))]
    found.full_examples = [
        tuple(loss + noise * chance.gauss(0.0, 1.0) for _ in range(examples)) for loss in losses
    ]
    return found


FALLING = [1.3, 1.2, 1.1, 1.05, 1.0, 1.0]


@pytest.mark.parametrize("examples", [0, 16])
def test_worse_for_good_is_worse_by_a_margin_and_beyond_noise(examples: int) -> None:
    """Three evaluations in a row, each on the same examples as the best."""
    assert not turned_worse(state(FALLING, examples=examples))
    assert not turned_worse(state([*FALLING, 1.3, 1.0, 1.0], examples=examples))  # one was bad luck
    assert not turned_worse(state([*FALLING, 1.02, 1.03, 1.04], examples=examples))  # it may cool down yet
    assert turned_worse(state([*FALLING, 1.2, 1.25, 1.3], examples=examples))


def test_what_the_examples_do_not_bear_out_is_noise() -> None:
    """The same means, with examples that scatter far more than these differ."""
    worse = [*FALLING, 1.2, 1.25, 1.3]
    assert turned_worse(state(worse, noise=0.05))
    assert not turned_worse(state(worse, noise=5.0))
    jumping = [1.3, 0.9, 1.3, 0.9, 1.3, 0.9, 1.25, 1.25, 1.3]
    assert not turned_worse(state(jumping, examples=0))


def test_while_the_metric_finds_its_best_the_loss_does_not_end_it() -> None:
    """An exact match may rise while the loss does."""
    found = state([*FALLING, 1.2, 1.25, 1.3])
    found.merits, found.best_tokens = (0.5,) * 16, 9000
    assert not turned_worse(found)
    found.best_tokens = 5000
    assert turned_worse(found)


@pytest.mark.parametrize("metric", [None, Metric("exact_match")])
def test_a_full_run_that_overfits_ends_and_the_next_finalist_gets_its_time(
    tmp_path: Path, metric: Metric | None
) -> None:
    """Well before its planned end; what is exported was trained before it turned."""
    world = Overfitting(metric=lambda segment, count: (0.5,) * count, answer_seconds=0.02)
    plain = SyntheticWorld(metric=world.metric, answer_seconds=0.02)
    ended = run(tmp_path / "a.sqlite", world, budget=7200.0, metric=metric)
    usual = run(tmp_path / "b.sqlite", plain, budget=7200.0, metric=metric)
    first, other = (history.trials[history.full_done[0]] for history in (ended, usual))
    assert first.trial_id == other.trial_id
    assert first.tokens < 0.8 * other.tokens
    assert first.tokens > TURN
    assert ended.incumbent is not None
    assert ended.incumbent.best_tokens <= 1.1 * TURN
    assert len(ended.full_done) > len(usual.full_done)
    assert "done" == ended.standing(first)
