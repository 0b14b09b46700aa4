"""Worker seconds of a run with several workers: the budget is wall time, a bill is often GPU time.

A part of the fold beside the charged seconds. Those add up to the run's wall time whatever runs at once;
these add up to the time of all workers together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from budgetsearch.core.events import (
    Calibrated,
    Charged,
    Entry,
    Planned,
    Scored,
    SegmentEnded,
    SegmentStarted,
    WorkersChanged,
)


@dataclass
class OpenJob:
    """A job that runs."""

    started: float
    open: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    crashed: bool = False


@dataclass
class Accounts:
    """Seconds of all workers together."""

    phases: dict[str, float] = field(default_factory=dict)
    """What workers did; ``crash`` is what failed jobs, lost nodes and a killed driver took, ``overhead`` what
    a job took beside what its worker told."""
    workers: int = 1
    total: float = 0.0
    """Workers times wall seconds, as many as there were at each time; none between two processes of it."""
    most_workers: int = 1
    at: float = 0.0
    search_total: float = 0.0
    """From the first segment's beginning to the last one's end."""
    search_busy: float = 0.0
    jobs: dict[int, OpenJob] = field(default_factory=dict)
    """Those that run now."""
    first: float | None = None
    """The total when the first segment began."""

    @property
    def search_idle_share(self) -> float:
        """Of the workers' time in the search, what they waited."""
        return 1.0 - self.search_busy / self.search_total if self.search_total else 0.0

    def apply(self, entry: Entry) -> None:
        """Take one more entry into account."""
        self.total += self.workers * max(0.0, entry.at - self.at)
        self.at = max(self.at, entry.at)
        event = entry.event
        if isinstance(event, Planned):
            self.total, self.workers = self.total * event.plan.workers, event.plan.workers
        elif isinstance(event, WorkersChanged):
            self.workers = event.workers
        self.most_workers = max(self.most_workers, self.workers)
        if isinstance(event, (Planned, WorkersChanged)):
            return
        if isinstance(event, Calibrated):
            self._add(event.calibration.seconds, "calibrate")
        elif isinstance(event, Scored):
            self._add(event.score.seconds, "score")
        elif isinstance(event, SegmentStarted):
            self.jobs.setdefault(event.job_id, OpenJob(entry.at)).open += 1
            if self.first is None:
                self.first = self.total
        elif isinstance(event, SegmentEnded):
            self._ended(event, entry.at)
        elif isinstance(event, Charged) and event.phase == "down":
            self._leave_out(event.seconds)

    def _leave_out(self, seconds: float) -> None:
        """Nobody worked, though the time counts, for there is a deadline."""
        self.total -= self.workers * seconds
        for job in self.jobs.values():
            job.started += seconds

    def _ended(self, event: SegmentEnded, at: float) -> None:
        job = self.jobs.get(event.job_id)
        if job is None:  # these accounts began in the middle of the run, and this job before them
            return
        job.open -= 1
        job.crashed |= event.result.status in ("crashed", "stranded")
        for phase, seconds in event.result.seconds.items():
            job.phases[phase] = job.phases.get(phase, 0.0) + seconds
        if job.open:
            return
        del self.jobs[event.job_id]
        lasted, known = at - job.started, sum(job.phases.values())
        scale = min(1.0, lasted / known) if known else 0.0
        for phase, seconds in job.phases.items():
            self._add({phase: seconds * scale}, phase)
        # What a worker did not tell of: the way there and back, or everything if it or the driver was lost.
        self._add({"": lasted - known * scale}, "crash" if job.crashed or not known else "overhead")
        self.search_busy += lasted
        self.search_total = self.total - (self.first or 0.0)

    def _add(self, seconds: Mapping[str, float], phase: str) -> None:
        some = sum(seconds.values())
        if some > 0:
            self.phases[phase] = self.phases.get(phase, 0.0) + some

    def worker_seconds(self) -> dict[str, float]:
        """By phase; with ``idle``, which nobody used, they add up to all that there was when no job runs."""
        busy = sum(self.phases.values()) + sum(self.at - job.started for job in self.jobs.values())
        return {**self.phases, "idle": max(0.0, self.total - busy)}
