"""The short forms of the campaigns; ``benchmarks/faults`` has the long ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.faults.deadlines import summary
from tests.faults.slowdowns import MOODS, play, play_all


def run_module(name: str, *arguments: str) -> dict[str, Any]:
    """What ``python -m tests.faults.NAME`` prints: a process of its own, because it forks."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{name}", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_run_that_is_killed_anywhere_loses_and_repeats_nothing() -> None:
    """Driver, worker or both, at points chosen alike among all that a run passes, and at any moment: after
    every kill the ledger holds what it held, with the adapter beside it; at the end each second is charged
    once, each token trained once, every decision replays, and the adapter is the best trial's."""
    found = run_module("kills", "--kills", "25", "--seed", "3")
    assert found["kills"] == 25
    assert found["kill points found"] > 50
    assert set(found["by victim"]) == {"driver", "worker", "both"}


def test_real_training_that_is_killed_loses_and_repeats_nothing() -> None:
    """The same for the command line on a tiny model, and plain PEFT loads what it leaves."""
    assert run_module("realkills", "--kills", "3", "--seed", "1")["kills"] == 3


def test_simulated_machines_that_misbehave_pass_no_deadline_and_lose_no_adapter() -> None:
    """Slowdowns that begin in the middle of a segment, hangs, deafness, divergence, full memory, deaths."""
    found = play_all(60)
    assert found["broken"] == []
    assert set(found["by mood"]) == set(MOODS)
    assert found["runs in which a segment finished well"] >= 30
    assert {"hung", "deaf", "diverged", "out_of_memory", "crashed", "slowed 10 times"} <= set(found["faults"])


@pytest.mark.parametrize("seed", [5, 211, 316, 598, 602, 1071])
def test_a_machine_that_becomes_ten_times_as_slow_at_the_end_is_still_in_time(seed: int) -> None:
    """These once passed their deadline: the kill of a score job that heard nothing had eaten the export's
    time."""
    play(seed)


def test_real_runs_under_load_end_before_their_deadline() -> None:
    """From the start of the command to its exit, with a process that competes for the processor."""
    found = run_module("deadlines", "--runs", "2", "--load", "1")
    assert found["after their deadline"] == 0, found
    assert found["without an adapter though a segment finished well"] == 0
    assert any(run["well"] for run in found["each"]), found


def test_the_summary_of_deadlines_counts_what_is_late() -> None:
    """A run that came back too late, or without what it had found, is counted."""
    good = {"budget": 100.0, "slack": 3.0, "state": "finished", "well": 4, "adapter": True}
    late = {**good, "slack": -1.0, "adapter": False}
    found = summary([good, late])
    assert found["after their deadline"] == 1
    assert found["without an adapter though a segment finished well"] == 1
    assert found["slack in s"] == {"least": -1.0, "median": 1.0, "most": 3.0}
