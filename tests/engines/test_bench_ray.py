"""The benchmark of several workers: its arithmetic, and the worker that sleeps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.ray import sleeper
from benchmarks.ray.efficiency import Slept, compare, gaps, seconds_until, slept
from budgetsearch.core.records import SegmentResult, TrainJob, WorkerSetup
from budgetsearch.core.reports import JobEnded
from budgetsearch.engines.local import LocalEngine
from tests.support.training import make_segment

JOBS = [Slept("a", 0.0, 5.0), Slept("b", 0.0, 10.0), Slept("a", 6.0, 10.0)]
"""Two lanes, one of which waits for a second."""


def test_work_is_counted_lane_by_lane() -> None:
    """Two lanes do ten seconds of work in five, and nineteen in ten; more was never done."""
    assert (5.0, None) == (seconds_until(JOBS, 10.0), seconds_until(JOBS, 20.0))
    until = seconds_until(JOBS, 19.0)
    assert until is not None and math.isclose(10.0, until, abs_tol=0.05)
    assert [1.0] == gaps(JOBS)


def test_the_same_work_is_compared_with_one_lane_s() -> None:
    """Efficiency at fixed work is T1 / (N TN)."""
    one, two = compare(
        [
            {"lanes": 1, "work_seconds": 9.0, "search_seconds": 10.0, "_jobs": [JOBS[0], JOBS[2]]},
            {"lanes": 2, "_jobs": JOBS},
        ]
    )
    assert 1.0 == one["fixed_work_efficiency"]
    assert (4.5, 2.22, 1.1111) == (
        two["seconds_to_the_work_of_one"],
        two["speedup"],
        two["fixed_work_efficiency"],
    )


@pytest.mark.parametrize(("tokens", "cancelled"), [(200, False), (600_000, True)])
def test_the_sleeper_takes_as_long_as_training_would_and_stops_when_told(
    tokens: int, cancelled: bool, tmp_path: Path
) -> None:
    """A worker process like any other, without torch; what it slept is written down."""
    setup = WorkerSetup("", "", "", str(tmp_path), "cpu", "all-linear", 0)
    engine = LocalEngine(setup, tmp_path / "worker.log", worker=sleeper.__name__)
    try:
        engine.submit(TrainJob(1, (make_segment(0, tokens),), 8, 60.0))
        if cancelled:
            engine.cancel(1)
        ended = next(r for _ in range(30) for r in engine.poll(1.0) if isinstance(r, JobEnded))
    finally:
        engine.close()
    (result,) = ended.results
    assert isinstance(result, SegmentResult)
    assert ("cancelled" if cancelled else "ok") == result.status
    (job,) = slept(tmp_path)
    expected = tokens / sleeper.TOKENS_PER_SECOND + sleeper.OVERHEAD_SECONDS
    assert job.end - job.start < 5.0 if cancelled else job.end - job.start >= expected - 0.01
