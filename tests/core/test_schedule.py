"""The learning rate as a pure function of tokens and schedule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetsearch.core.records import Schedule
from budgetsearch.core.schedule import rate_factor


def test_warmup_trunk_and_cooldown() -> None:
    """Linear up, constant, then (1 - sqrt) down to exactly zero."""
    schedule = Schedule(warmup_tokens=100, stop_tokens=1000, cooldown_tokens=200)
    assert rate_factor(schedule, 0) == pytest.approx(0.01)
    assert rate_factor(schedule, 49) == pytest.approx(0.5)
    assert [rate_factor(schedule, t) for t in (100, 500, 799)] == [1.0, 1.0, 1.0]
    assert rate_factor(schedule, 850) == pytest.approx(0.5)
    assert [rate_factor(schedule, t) for t in (1000, 2000)] == [0.0, 0.0]


def test_the_trunk_has_no_end() -> None:
    """Without a cooldown the rate stays, however far a rung goes."""
    schedule = Schedule(warmup_tokens=10, stop_tokens=100)
    assert rate_factor(schedule, 10**9) == 1.0


@given(st.integers(0, 500), st.integers(600, 5000), st.integers(0, 100), st.integers(0, 10_000))
def test_the_factor_stays_within_bounds(warmup: int, stop: int, cooldown: int, tokens: int) -> None:
    """Whatever the schedule, the factor is in 0..1."""
    assert 0.0 <= rate_factor(Schedule(warmup, stop, cooldown), tokens) <= 1.0
