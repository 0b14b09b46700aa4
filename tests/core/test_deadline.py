"""The end of a run: its steps have their time, one after the other."""

from __future__ import annotations

import pytest

from budgetsearch.core.policy.deadline import CLOSING_SECONDS, ENDING, EXIT_SECONDS, closing_seconds


def test_every_step_of_the_end_has_its_seconds_however_long_those_before_it_took() -> None:
    """The reserve is enough for all of them, and those that may take more leave the others theirs."""
    left = EXIT_SECONDS
    for step, sure in ENDING.items():
        taken = closing_seconds(step, left) if step in ("loggers", "study") else sure
        assert taken >= sure
        left -= taken
    assert left == 0.0
    assert EXIT_SECONDS == 6.0


@pytest.mark.parametrize(
    ("step", "left", "expected"),
    [
        ("study", 620.0, CLOSING_SECONDS),
        ("study", 4.5, 1.5),
        ("study", 2.5, 0.0),
        ("study", -10.0, 0.0),
        ("loggers", 4.5, 1.0),
    ],
)
def test_the_end_waits_for_loggers_and_study_only_within_the_budget(
    step: str, left: float, expected: float
) -> None:
    """Two seconds, or what is left beside the steps that follow."""
    assert expected == closing_seconds(step, left)
