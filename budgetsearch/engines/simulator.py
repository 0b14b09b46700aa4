"""An engine on virtual time: the same jobs and reports, and no second passes.

What a job does is up to a ``World``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from budgetsearch.core.errors import EngineError
from budgetsearch.core.records import Calibration, Job, Score, Segment, SegmentResult
from budgetsearch.core.reports import JobEnded, Report
from budgetsearch.core.results import crashed_results

Result = SegmentResult | Calibration | Score


class VirtualClock:
    """A clock that only the simulator moves."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        """Virtual seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self._now += max(0.0, seconds)


class World(Protocol):
    """What jobs come to, and how long they take."""

    def perform(self, job: Job) -> tuple[tuple[Result, ...], float]:
        """The results, and the virtual seconds until they are there."""
        ...

    def interrupt(self, job: Job, share: float) -> tuple[Result, ...] | None:
        """The results of a job that was stopped after ``share`` of its time; None if it is deaf."""
        ...


@dataclass
class _Running:
    job: Job
    results: tuple[Result, ...]
    started: float
    ends: float


class SimulatorEngine:
    """Runs up to ``slots`` jobs at once on a virtual clock."""

    def __init__(self, world: World, clock: VirtualClock, slots: int = 1) -> None:
        self.world, self.clock, self.slots = world, clock, slots
        self._running: dict[int, _Running] = {}
        self._ready: list[Report] = []

    def submit(self, job: Job) -> None:
        """Start a job; see the port."""
        if len(self._running) >= self.slots:
            raise EngineError(f"job {job.job_id} was submitted while no slot is free")
        results, seconds = self.world.perform(job)
        now = self.clock.now()
        self._running[job.job_id] = _Running(job, results, now, now + seconds)

    def poll(self, timeout: float) -> Sequence[Report]:
        """Reports that have arrived; moves the clock to the first end, at most ``timeout`` on."""
        if not self._ready:
            until = self.clock.now() + timeout
            first = min((r.ends for r in self._running.values()), default=until)
            self.clock.advance(min(until, first) - self.clock.now())
            for running in [r for r in self._running.values() if r.ends <= self.clock.now()]:
                self._end(running, running.results)
        found, self._ready = self._ready, []
        return found

    def cancel(self, job_id: int) -> None:
        """Stop a job where it is."""
        running = self._running.get(job_id)
        if running is None:
            return
        length = running.ends - running.started
        share = (self.clock.now() - running.started) / length if math.isfinite(length) and length else 0.0
        results = self.world.interrupt(running.job, min(1.0, share))
        if results is not None:
            self._end(running, results)

    def kill(self, job_id: int) -> None:
        """Stop a job that does not answer."""
        running = self._running.get(job_id)
        if running is not None:
            self._end(running, crashed_results(running.job, "killed"))

    def close(self) -> None:
        """Nothing is left running; safe to call twice."""
        self._running.clear()

    def _end(self, running: _Running, results: tuple[Result, ...]) -> None:
        del self._running[running.job.job_id]
        self._ready.append(JobEnded(running.job.job_id, results))


def usual_loss(segment: Segment, tokens: int, seed: int = 0) -> float:
    """A validation loss after so many tokens: a power law towards a floor that the configuration decides."""
    rate = math.log10(float(segment.params.get("learning_rate", 2e-3)))
    floor = 0.5 + 0.3 * (rate + 2.7) ** 2 + 0.2 / math.log2(1 + int(segment.params.get("rank", 1)))
    noise = random.Random(f"{seed}/{segment.trial_id}/{tokens}").gauss(0.0, 0.01)
    return floor + 3.0 * math.pow(1 + tokens / 1000.0, -0.7) + noise
