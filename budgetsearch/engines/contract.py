"""For those who write an engine of their own: one contract suite that every engine passes.

Subclass ``EngineContract`` in a pytest module and give it a fixture ``harness``::

    class TestMyEngine(EngineContract):
        @pytest.fixture
        def harness(self): ...
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from budgetsearch.core.ports import Engine
from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Job,
    Schedule,
    Segment,
    SegmentResult,
    TrainJob,
)
from budgetsearch.core.reports import JobEnded, Report

__all__ = ["EngineContract", "Harness", "await_end", "segment", "train_job"]

MAX_POLLS = 1200
_NUMBERS = itertools.count()


@dataclass
class Harness:
    """An engine under test, and how long its segments are."""

    engine: Engine
    short_tokens: int
    """A segment of so many tokens ends soon."""
    long_tokens: int
    """A segment of so many tokens is still under way when it is cancelled."""
    let_start: Callable[[], None]
    """Returns once a submitted job is well under way."""


def segment(trial_id: int, stop: int, *, start: int = 0, checkpoint: str | None = None) -> Segment:
    """A first-rung segment with a harmless configuration."""
    return Segment(
        trial_id=trial_id,
        params={"quantization": "fp32", "rank": 4, "learning_rate": 1e-3},
        seed=trial_id,
        rung=0,
        start_tokens=start,
        stop_tokens=stop,
        schedule=Schedule(0, stop),
        batch_size=4,
        micro_batch=4,
        checkpoint_in=checkpoint,
    )


def await_end(engine: Engine, job_id: int) -> JobEnded:
    """Poll until the job is over; other reports are passed over."""
    for _ in range(MAX_POLLS):
        for report in engine.poll(0.5):
            if isinstance(report, JobEnded) and report.job_id == job_id:
                return report
    raise AssertionError(f"job {job_id} never ended")


def train_job(*segments: Segment) -> TrainJob:
    """A job with a number of its own: engines may share a process between tests."""
    return TrainJob(next(_NUMBERS), segments, eval_examples=4, limit_seconds=600.0)


def _only(ended: JobEnded) -> SegmentResult:
    (result,) = ended.results
    assert isinstance(result, SegmentResult)
    return result


class EngineContract:
    """What every engine does, whatever executes its jobs."""

    def test_an_idle_engine_reports_nothing(self, harness: Harness) -> None:
        """Polling without a job returns an empty list after its timeout."""
        assert list[Report]() == list(harness.engine.poll(0.1))

    def test_a_calibration_measures_a_rate(self, harness: Harness) -> None:
        """A calibration ends with a positive rate and a micro-batch within the batch."""
        job: Job = CalibrateJob(-1, "fp32", ranks=(4,), batch_size=4, limit_seconds=600.0)
        harness.engine.submit(job)
        (result,) = await_end(harness.engine, -1).results
        assert isinstance(result, Calibration)
        assert result.status == "ok", result.detail
        assert result.tokens_per_second > 0
        assert 1 <= result.micro_batch <= 4

    def test_a_segment_reaches_its_tokens_with_a_loss_and_a_checkpoint(self, harness: Harness) -> None:
        """Status ok, at least the tokens asked for, a finite loss, seconds by phase."""
        job0 = train_job(segment(0, harness.short_tokens))
        harness.engine.submit(job0)
        result = _only(await_end(harness.engine, job0.job_id))
        assert result.status == "ok", result.detail
        assert result.tokens >= harness.short_tokens
        assert result.loss is not None
        assert result.checkpoint_out is not None
        assert result.seconds["train"] > 0

    def test_a_segment_goes_on_from_its_checkpoint(self, harness: Harness) -> None:
        """The second segment of a trial starts where the first one stopped."""
        job0 = train_job(segment(0, harness.short_tokens))
        harness.engine.submit(job0)
        first = _only(await_end(harness.engine, job0.job_id))
        more = segment(0, 2 * harness.short_tokens, start=first.tokens, checkpoint=first.checkpoint_out)
        job1 = train_job(more)
        harness.engine.submit(job1)
        second = _only(await_end(harness.engine, job1.job_id))
        assert second.status == "ok", second.detail
        assert second.tokens >= 2 * harness.short_tokens

    def test_several_segments_of_one_job_each_have_a_result(self, harness: Harness) -> None:
        """Results come in the order of the segments."""
        segments = [segment(i, harness.short_tokens) for i in range(2)]
        job0 = train_job(*segments)
        harness.engine.submit(job0)
        results = await_end(harness.engine, job0.job_id).results
        assert [0, 1] == [r.trial_id for r in results if isinstance(r, SegmentResult)]

    def test_a_cancelled_job_ends_early(self, harness: Harness) -> None:
        """It ends as cancelled, short of its tokens, and the engine takes the next job."""
        job0 = train_job(segment(0, harness.long_tokens))
        harness.engine.submit(job0)
        harness.let_start()
        harness.engine.cancel(job0.job_id)
        result = _only(await_end(harness.engine, job0.job_id))
        assert result.status == "cancelled"
        assert result.tokens < harness.long_tokens
        job1 = train_job(segment(1, harness.short_tokens))
        harness.engine.submit(job1)
        assert _only(await_end(harness.engine, job1.job_id)).status == "ok"

    def test_a_killed_job_is_a_crash_and_the_engine_goes_on(self, harness: Harness) -> None:
        """It ends as crashed with the tokens it began with, and the engine takes the next job."""
        job0 = train_job(segment(0, harness.long_tokens))
        harness.engine.submit(job0)
        harness.let_start()
        harness.engine.kill(job0.job_id)
        result = _only(await_end(harness.engine, job0.job_id))
        assert result.status == "crashed"
        assert result.tokens == 0
        job1 = train_job(segment(1, harness.short_tokens))
        harness.engine.submit(job1)
        assert _only(await_end(harness.engine, job1.job_id)).status == "ok"

    def test_cancelling_and_killing_what_is_not_there_is_harmless(self, harness: Harness) -> None:
        """A job that has already ended cannot be harmed."""
        harness.engine.cancel(99)
        harness.engine.kill(99)
        assert list[Report]() == list(harness.engine.poll(0.1))

    def test_closing_twice_is_harmless(self, harness: Harness) -> None:
        """Close is safe at any time, a running job included."""
        job0 = train_job(segment(0, harness.long_tokens))
        harness.engine.submit(job0)
        harness.engine.close()
        harness.engine.close()
        assert harness.engine.slots >= 1
