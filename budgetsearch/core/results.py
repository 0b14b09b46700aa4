"""Results of work that came to nothing: no worker trained, or none was left to report."""

from __future__ import annotations

from dataclasses import replace

from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Job,
    Score,
    Segment,
    SegmentResult,
    Status,
    TrainJob,
)


def untrained(segment: Segment, status: Status, detail: str) -> SegmentResult:
    """A segment's trial stands where it stood."""
    return SegmentResult(segment.trial_id, segment.rung, status, segment.start_tokens, detail=detail)


def failed_results(
    job: Job, status: Status, detail: str, peak_bytes: int = 0
) -> tuple[SegmentResult | Calibration | Score, ...]:
    """A job failed as a whole."""
    if isinstance(job, TrainJob):
        size = len(job.segments)
        return tuple(
            replace(untrained(segment, status, detail), peak_bytes=peak_bytes, gang=size)
            for segment in job.segments
        )
    kind = Calibration if isinstance(job, CalibrateJob) else Score
    return (kind(quantization=job.quantization, status=status, detail=detail),)


def crashed_results(job: Job, detail: str) -> tuple[SegmentResult | Calibration | Score, ...]:
    """A job's process is gone."""
    return failed_results(job, "crashed", detail)


def stranded_results(job: Job, detail: str) -> tuple[SegmentResult | Calibration | Score, ...]:
    """A job's card or node went away: no segment of it is to blame, and each is issued again."""
    return failed_results(job, "stranded" if isinstance(job, TrainJob) else "crashed", detail)
