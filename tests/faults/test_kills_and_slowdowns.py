"""The short forms of the fast campaigns; ``benchmarks/faults`` has the long ones."""

from __future__ import annotations

import pytest

from tests.support.faults.modules import run_module
from tests.support.faults.slowdowns import MOODS, play, play_all


@pytest.mark.parametrize("kills", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_anywhere_loses_and_repeats_nothing(kills: int) -> None:
    """Driver, worker or both, at points chosen alike among all that a run passes, and at any moment: after
    every kill the ledger holds what it held, with the adapter beside it; at the end each second is charged
    once, each token trained once, every decision replays, and the adapter is the best trial's."""
    found = run_module("kills", "--kills", str(kills), "--seed", "3")
    assert found["kills"] == kills
    assert found["kill points found"] > 50
    assert set(found["by victim"]) == {"driver", "worker", "both"}


def test_simulated_machines_that_misbehave_pass_no_deadline_and_lose_no_adapter() -> None:
    """Slowdowns that begin in the middle of a segment, hangs, deafness, divergence, full memory, deaths."""
    found = play_all(60)
    assert found["broken"] == []
    assert set(found["by mood"]) == set(MOODS)
    assert found["runs in which a segment finished well"] >= 30
    assert {"hung", "deaf", "diverged", "out_of_memory", "crashed", "slowed 10 times"} <= set(found["faults"])


def test_a_short_segment_that_hangs_near_the_end_is_stopped_by_what_is_left() -> None:
    """Its own limit, four times what it should take, lies behind the deadline; the seed has such a one."""
    play(156)


@pytest.mark.parametrize("seed", [5, 211, 316, 598, 602, 1071])
def test_a_machine_that_becomes_ten_times_as_slow_at_the_end_is_still_in_time(seed: int) -> None:
    """These once passed their deadline: the kill of a score job that heard nothing had eaten the export's
    time."""
    play(seed)
