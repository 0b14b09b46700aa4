"""Recorded curves as a world for the simulator: training is reading on in a row."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from budgetsearch.core.records import CalibrateJob, Calibration, Job, Score, ScoreJob, Segment, SegmentResult
from budgetsearch.engines.simulator import Result, VirtualClock
from budgetsearch.tools.simulate.curves import Curves


@dataclass
class Trace:
    """Every value that was seen, and when: what a deadline would have left."""

    moments: list[tuple[float, float]] = field(default_factory=list)

    def best_at(self, seconds: float) -> float:
        """The best value seen up to then; infinite if there is none."""
        return min((value for at, value in self.moments if at <= seconds), default=math.inf)

    def regret(self, curves: Curves, seconds: float) -> float:
        """(best seen - best there is) / (median configuration's best - best there is), 0 to 1."""
        seen = self.best_at(seconds)
        return float(min(1.0, max(0.0, (seen - curves.best) / (curves.median - curves.best))))


@dataclass
class CurveWorld:
    """Executes jobs by looking their curves up. One token is one recorded point."""

    curves: Curves
    clock: VirtualClock
    scale: float = 1.0
    """Virtual seconds to a recorded one; the trace is in recorded seconds."""
    trace: Trace = field(default_factory=Trace)

    def perform(self, job: Job) -> tuple[tuple[Result, ...], float]:
        """The results of a job, and the seconds until they are there."""
        if isinstance(job, CalibrateJob):
            return (Calibration(job.quantization, "ok", 1.0 / (self.curves.point_cost * self.scale)),), 0.0
        if isinstance(job, ScoreJob):
            return (Score("ok", job.quantization),), 0.0
        (segment,) = job.segments
        result, seconds = self._train(segment)
        times, values = self.curves.curve(segment.params)
        begun = self._begun(segment)
        now = self.clock.now() / self.scale
        for p in range(segment.start_tokens, result.tokens):
            if math.isfinite(values[p]):
                self.trace.moments.append((now + float(times[p]) - begun, float(values[p])))
        return (result,), seconds

    def interrupt(self, job: Job, share: float) -> tuple[Result, ...] | None:
        """A stopped segment keeps the points that it had reached."""
        if isinstance(job, (CalibrateJob, ScoreJob)):
            return self.perform(job)[0]
        (segment,) = job.segments
        whole, seconds = self._train(segment)
        times, _ = self.curves.curve(segment.params)
        until = self._begun(segment) + share * seconds / self.scale
        reached = int(np.searchsorted(times, until, side="right"))
        reached = max(segment.start_tokens, min(reached, whole.tokens))
        now = self.clock.now() / self.scale
        self.trace.moments = [(at, value) for at, value in self.trace.moments if at <= now]
        name = f"{segment.trial_id}-{reached}" if reached > segment.start_tokens else None
        cut = replace(whole, status="cancelled", tokens=reached, loss=None, checkpoint_out=name)
        return (replace(cut, seconds={"train": share * seconds}),)

    def _begun(self, segment: Segment) -> float:
        """Recorded seconds at which the segment goes on."""
        times, _ = self.curves.curve(segment.params)
        return float(times[segment.start_tokens - 1]) if segment.start_tokens else 0.0

    def _train(self, segment: Segment) -> tuple[SegmentResult, float]:
        times, values = self.curves.curve(segment.params)
        start, stop = segment.start_tokens, min(segment.stop_tokens, len(times))
        broken = [p for p in range(start, stop) if not math.isfinite(values[p])]
        end = broken[0] + 1 if broken else stop
        seconds = (float(times[end - 1]) - self._begun(segment)) * self.scale if end > start else 0.0
        result = SegmentResult(
            segment.trial_id,
            segment.rung,
            "diverged" if broken else "ok",
            tokens=end,
            loss=None if broken else float(values[end - 1]),
            seconds={"train": seconds},
            checkpoint_out=None if broken else f"{segment.trial_id}-{end}",
        )
        return result, seconds
