"""The short forms of the campaigns on the command line's real runs, which take real minutes."""

from __future__ import annotations

import pytest

from tests.support.faults.deadlines import summary
from tests.support.faults.modules import run_module


@pytest.mark.slow
def test_real_training_that_is_killed_loses_and_repeats_nothing() -> None:
    """The same for the command line on a tiny model, and plain PEFT loads what it leaves."""
    assert run_module("realkills", "--kills", "3", "--seed", "1")["kills"] == 3


@pytest.mark.slow
def test_real_runs_under_load_end_before_their_deadline() -> None:
    """From the start of the command to its exit, with a process that competes for the processor."""
    found = run_module("deadlines", "--runs", "2", "--longest", "90", "--load", "1")
    assert found["after their deadline"] == 0, found
    assert found["without an adapter though a segment finished well"] == 0
    assert any(run.get("well") for run in found["each"]), found


def test_the_summary_of_deadlines_counts_what_is_late() -> None:
    """A run that came back too late, or without what it had found, is counted."""
    good = {"budget": 100.0, "slack": 3.0, "state": "finished", "well": 4, "adapter": True}
    late = {**good, "slack": -1.0, "adapter": False}
    found = summary([good, late])
    assert found["after their deadline"] == 1
    assert found["without an adapter though a segment finished well"] == 1
    assert found["slack in s"] == {"least": -1.0, "median": 1.0, "most": 3.0}
