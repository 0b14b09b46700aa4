"""Worker seconds of a run with several workers: the budget is wall time, a bill is often GPU time.

A fold of the ledger beside the charged seconds. Those add up to the run's wall time whatever runs at once;
these add up to the time of all workers together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from budgetsearch.core.history.history import History
from budgetsearch.views.card import device_of


@dataclass
class _Job:
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
    _jobs: dict[int, _Job] = field(default_factory=dict)
    _first: float | None = None

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
            self._jobs.setdefault(event.job_id, _Job(entry.at)).open += 1
            if self._first is None:
                self._first = self.total
        elif isinstance(event, SegmentEnded):
            self._ended(event, entry.at)
        elif isinstance(event, Charged) and event.phase == "down":
            self._leave_out(event.seconds)

    def _leave_out(self, seconds: float) -> None:
        """Nobody worked, though the time counts, for there is a deadline."""
        self.total -= self.workers * seconds
        for job in self._jobs.values():
            job.started += seconds

    def _ended(self, event: SegmentEnded, at: float) -> None:
        job = self._jobs.get(event.job_id)
        if job is None:  # these accounts began in the middle of the run, and this job before them
            return
        job.open -= 1
        job.crashed |= event.result.status in ("crashed", "stranded")
        for phase, seconds in event.result.seconds.items():
            job.phases[phase] = job.phases.get(phase, 0.0) + seconds
        if job.open:
            return
        del self._jobs[event.job_id]
        lasted, known = at - job.started, sum(job.phases.values())
        scale = min(1.0, lasted / known) if known else 0.0
        for phase, seconds in job.phases.items():
            self._add({phase: seconds * scale}, phase)
        # What a worker did not tell of: the way there and back, or everything if it or the driver was lost.
        self._add({"": lasted - known * scale}, "crash" if job.crashed or not known else "overhead")
        self.search_busy += lasted
        self.search_total = self.total - (self._first or 0.0)

    def _add(self, seconds: Mapping[str, float], phase: str) -> None:
        some = sum(seconds.values())
        if some > 0:
            self.phases[phase] = self.phases.get(phase, 0.0) + some

    def worker_seconds(self) -> dict[str, float]:
        """By phase; with ``idle``, which nobody used, they add up to all that there was when no job runs."""
        busy = sum(self.phases.values()) + sum(self.at - job.started for job in self._jobs.values())
        return {**self.phases, "idle": max(0.0, self.total - busy)}


def account(entries: Iterable[Entry]) -> Accounts:
    """The accounts of a ledger."""
    found = Accounts()
    for entry in entries:
        found.apply(entry)
    return found


MUCH_IDLE = 0.2
"""A larger share of the workers' time that nobody used is explained."""
LEAST_SECONDS = 1e-3
"""Less is what is left over from adding up."""


@dataclass(frozen=True)
class WorkerSeconds:
    """The account of a run's workers; with a GPU each, a worker second is a GPU second."""

    most_workers: int
    """As many as there were at any time."""
    worker_seconds: float
    """Workers times wall seconds. With one worker it is the wall time."""
    worker_seconds_by_phase: Mapping[str, float]
    """What the workers did with them, most first; ``idle`` is what nobody used."""
    search_idle_share: float | None
    """Of the workers' time from the first segment's beginning to the last one's end, what they waited, 0 to
    1; None before the first end."""
    search_idle_seconds: float = 0.0
    """The same in worker seconds."""


def worker_seconds_of(entries: Iterable[Entry]) -> WorkerSeconds:
    """The account of a run, finished or not."""
    found = account(entries)
    parts = sorted(found.worker_seconds().items(), key=lambda one: -one[1])
    return WorkerSeconds(
        most_workers=found.most_workers,
        worker_seconds=found.total,
        worker_seconds_by_phase={phase: seconds for phase, seconds in parts if seconds > LEAST_SECONDS},
        search_idle_share=found.search_idle_share if found.search_total else None,
        search_idle_seconds=found.search_idle_share * found.search_total,
    )


def seconds_word(device: str) -> str:
    """Name of a worker's second."""
    return "worker seconds" if device == "cpu" else "GPU seconds"


def shares_text(found: WorkerSeconds) -> str:
    """``train 96.5%, evaluate 2.9%, ...``"""
    whole = found.worker_seconds or 1.0
    return ", ".join(f"{phase} {part / whole:.1%}" for phase, part in found.worker_seconds_by_phase.items())


def workers_line(found: WorkerSeconds, history: History) -> str:
    """The account in one line; empty for one worker, whose seconds are those of the wall. Where a run is over
    in which they waited much, it says why."""
    if found.most_workers == 1:
        return ""
    seconds = f"{found.worker_seconds:.0f} {seconds_word(device_of(history))}"
    line = f"workers  up to {found.most_workers}, {seconds}: {shares_text(found)}"
    idle = found.worker_seconds_by_phase.get("idle", 0.0)
    if history.closed is None or idle <= MUCH_IDLE * found.worker_seconds:
        return line
    return f"{line}; {idle / found.worker_seconds:.0%} waited: {_why_idle(found, idle, history)}"


def _why_idle(found: WorkerSeconds, idle: float, history: History) -> str:
    if found.search_idle_seconds < idle / 2:
        return "most of it while one prepared the run, measured the base or scored"
    plan = history.plan
    if plan is not None and len(history.trials) >= plan.max_trials:
        return f"all {plan.max_trials} configurations of --max-trials were tried, and fewer are promoted"
    return history.finish.reason if history.finish else history.closed.reason if history.closed else ""
