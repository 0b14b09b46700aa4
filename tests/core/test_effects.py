"""What a configuration of a free space costs is learned, and its rungs are equal in seconds."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetsearch.core.history.effects import Effects, solved
from budgetsearch.core.history.measured import Measured
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.costs import CostModel
from budgetsearch.core.policy.jobs import new_trial
from budgetsearch.core.policy.planning import make_plan
from budgetsearch.core.ports import Proposal
from budgetsearch.core.records import Calibration, Params, Schedule, Segment, SegmentResult
from budgetsearch.core.space.space import Space
from tests.support.factories import Story, plan
from tests.support.simulation import request

SPACE: dict[str, Any] = {
    "free": True,
    "dimensions": {
        "width": {"kind": "choice", "values": [8, 16, 32, 64], "ordered": True},
        "rate": {"kind": "float", "low": 1e-4, "high": 1e-1, "log": True},
        "kind": {"kind": "choice", "values": ["lean", "heavy", "usual"]},
    },
}
TIMES = {8: 0.5, 16: 1.0, 32: 2.0, 64: 4.0}


def cost(params: Params) -> float:
    """Times the reference: by width, and three times as much for what is heavy."""
    return TIMES[int(params["width"])] * (3.0 if params["kind"] == "heavy" else 1.0)


def free_plan() -> Plan:
    """A plan whose only class of costs trains a hundred units a second."""
    name = next(iter(Space.parse(SPACE).cost_classes))
    one = {name: 1.0}
    return plan(SPACE, reference_rates={name: 100.0}, micro_batches={name: 1}, overheads=one,
                checkpoint_seconds=one, load_seconds=one, step_tokens=1.0)  # fmt: skip


def some(count: int, seed: int = 0) -> list[Params]:
    """Random configurations."""
    space, chance = Space.parse(SPACE), random.Random(seed)
    return [space.from_unit({name: chance.random() for name in space.searched}) for _ in range(count)]


def segment(params: Params, tokens: int, seconds: float, trial: int = 0) -> tuple[Segment, SegmentResult]:
    """One that took so many seconds."""
    return (
        Segment(trial, params, 0, 0, 0, tokens, Schedule(0, tokens), 1, 1),
        SegmentResult(trial, 0, "ok", tokens, loss=1.0, seconds={"train": seconds}),
    )


def test_a_cost_that_multiplies_is_found_from_two_dozen_segments() -> None:
    """Also of configurations that were none of them."""
    effects, noise = Effects(Space.parse(SPACE)), random.Random(1)
    for params in some(24):
        effects.add(params, cost(params) * math.exp(noise.gauss(0.0, 0.05)))
    for params in some(20, seed=7):
        assert effects.factor(params) == pytest.approx(cost(params), rel=0.25)


def test_little_was_measured_and_little_is_said() -> None:
    """Of one measurement the configuration itself learns most, and its opposite least."""
    effects = Effects(Space.parse(SPACE))
    assert effects.factor(some(1)[0]) == 1.0
    slow = {"width": 64, "rate": 1e-3, "kind": "usual"}
    effects.add(slow, 4.0)
    assert 2.0 < effects.factor(slow) < 4.0
    assert 1.0 < effects.factor({**slow, "width": 8}) < effects.factor(slow)


@given(st.integers(1, 6), st.integers(0, 1000))
def test_a_system_is_solved(size: int, seed: int) -> None:
    """Any that is symmetric and positive definite."""
    chance = random.Random(seed)
    half = [[chance.gauss(0, 1) for _ in range(size)] for _ in range(size)]
    rows = [
        [sum(a * b for a, b in zip(half[i], half[j], strict=True)) + (i == j) for j in range(size)]
        for i in range(size)
    ]
    wanted = [chance.gauss(0, 1) for _ in range(size)]
    right = [sum(a * b for a, b in zip(line, wanted, strict=True)) for line in rows]
    assert solved(rows, right) == pytest.approx(wanted, abs=1e-6)


def test_rungs_of_a_free_space_are_equal_in_seconds() -> None:
    """A wide network gets fewer steps in the time of a rung; before anything was measured all get as many."""
    made = free_plan()
    measured = Measured.of(made, [segment(p, 100, cost(p)) for p in some(24)])
    wide, slim = ({"width": width, "rate": 1e-3, "kind": "usual"} for width in (64, 8))

    def rungs(params: Params, known: Measured | None) -> tuple[int, ...]:
        return new_trial(made, 0, Proposal(params, "prior"), known).rung_tokens

    assert rungs(wide, None) == rungs(slim, None) == (1000, 3000, 9000)
    assert rungs(wide, Measured(made)) == (1000, 3000, 9000)
    assert rungs(wide, measured) == pytest.approx((250, 750, 2250), rel=0.25)
    assert rungs(slim, measured) == pytest.approx((2000, 6000, 18000), rel=0.25)


def test_costs_of_a_free_space_follow_its_parameters() -> None:
    """Not the slowest tenth of what was measured, whatever that was: what cheap ones may take is little."""
    story = Story.planned(**{k: v for k, v in vars(free_plan()).items() if k != "budget_seconds"})
    assert story.history.plan is not None
    story.history.results += [segment(p, 100, cost(p)) for p in some(24)]
    costs = CostModel.learn(story.history.plan, story.history)
    slim, wide = ({"width": width, "rate": 1e-3, "kind": "usual"} for width in (8, 64))
    for params in (slim, wide):
        expected = cost(params)
        assert costs.train_seconds(params, 100.0) == pytest.approx(expected, rel=0.25)
        assert costs.train_seconds(params, 100.0, pessimistic=True) < 2.0 * expected


def test_what_a_trial_itself_took_counts_more_than_what_its_parameters_say() -> None:
    """From its second segment on."""
    made, own = free_plan(), {"width": 8, "rate": 1e-3, "kind": "lean"}
    results = [segment(p, 100, cost(p)) for p in some(24)] + [segment(own, 100, 2.0)] * 2
    story = Story.planned(**{k: v for k, v in vars(made).items() if k != "budget_seconds"})
    story.history.results += results
    assert CostModel.learn(made, story.history).train_seconds(own, 100.0) == pytest.approx(2.0, rel=0.05)


def test_the_slower_machine_is_seen_beside_what_parameters_do() -> None:
    """Costs that differ by the configuration are no drift; five in a row that took twice as long are."""
    measured = Measured.of(free_plan(), [segment(p, 100, cost(p)) for p in some(40)])
    assert measured.drift == 1.0
    for params in some(5, seed=3):
        measured.add(*segment(params, 100, 2.0 * cost(params)))
    assert measured.drift > 1.5


def test_a_short_full_run_is_looked_at_on_its_way_where_that_is_cheap() -> None:
    """Up to twelve times, as long as evaluations take three hundredths of its time at the most."""

    def links(example_seconds: float, write: float) -> float:
        found = Calibration("fp32", "ok", 200.0, example_seconds, write, 1.0, micro_batch=8)
        made = make_plan(request(600.0, task_examples=0), {"fp32": found}, 30.0)
        return made.full_seconds / made.checkpoint_every_seconds

    assert links(0.0001, 0.01) == pytest.approx(12.0)
    assert 1.0 < links(0.002, 0.2) < 12.0
    assert links(0.1, 1.0) == pytest.approx(links(0.2, 2.0), rel=0.2), "the minute between two checkpoints"
