"""Results of segments that no worker could report."""

from __future__ import annotations

from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Job,
    Score,
    ScoreJob,
    SegmentResult,
    TrainJob,
)


def lost_results(job: Job, detail: str) -> tuple[SegmentResult | Calibration | Score, ...]:
    """What a job comes to whose card or node went away: a segment is issued again, and it counts for
    nothing."""
    if isinstance(job, TrainJob):
        return tuple(
            SegmentResult(
                *(s.trial_id, s.rung, "cancelled", s.start_tokens),
                checkpoint_out=s.checkpoint_in,
                detail=detail,
                worker_lost=True,
            )
            for s in job.segments
        )
    return crashed_results(job, detail)


def crashed_results(job: Job, detail: str) -> tuple[SegmentResult | Calibration | Score, ...]:
    """What a job comes to whose process is gone."""
    if isinstance(job, TrainJob):
        return tuple(
            SegmentResult(s.trial_id, s.rung, "crashed", s.start_tokens, detail=detail) for s in job.segments
        )
    if isinstance(job, CalibrateJob):
        return (Calibration(job.quantization, "crashed", detail=detail),)
    assert isinstance(job, ScoreJob)
    return (Score("crashed", job.quantization, detail=detail),)
