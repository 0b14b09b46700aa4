"""The jobs under way: which they are, how many more there is room for, and the watchdog over each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from budgetsearch.core.ports import Clock, Engine
from budgetsearch.core.records import Job, JobEnded, TrainJob


@dataclass
class Flight:
    """A job under way."""

    job: Job
    started: float
    told: float | None = None
    """When it was told to stop."""


@dataclass(frozen=True)
class Landing:
    """The end of a job that is no training."""

    job: Job
    report: JobEnded
    seconds: float
    """How long it took."""


@dataclass
class Flights:
    """Every job that the engine was given and that has not ended."""

    engine: Engine
    clock: Clock
    patience: Callable[[Job], float]
    """How long a job that was told to stop may take to do so, in seconds."""
    under_way: dict[int, Flight] = field(default_factory=dict)
    _landings: list[Landing] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.under_way)

    @property
    def free(self) -> int:
        """How many more jobs can run now; none where workers went away faster than their jobs."""
        return max(0, self.engine.slots - len(self.under_way))

    def launch(self, job: Job) -> None:
        """Give a job to the engine."""
        self.under_way[job.job_id] = Flight(job, self.clock.now())
        self.engine.submit(job)

    def end(self, report: JobEnded) -> Flight:
        """A job has ended."""
        return self.under_way.pop(report.job_id)

    def keep(self, flight: Flight, report: JobEnded) -> None:
        """Keep the answer of a job until somebody asks for it."""
        self._landings.append(Landing(flight.job, report, self.clock.now() - flight.started))

    def landings(self) -> Iterator[Landing]:
        """The answers since the last call."""
        found, self._landings = self._landings, []
        yield from found

    def watch(self) -> None:
        """A job beyond its limit is told to stop, then killed."""
        now = self.clock.now()
        for flight in self.under_way.values():
            if now - flight.started <= flight.job.limit_seconds:
                continue
            if flight.told is None:
                flight.told = now
                self.engine.cancel(flight.job.job_id)
            elif now - flight.told > self.patience(flight.job):
                self.engine.kill(flight.job.job_id)

    def stop(self) -> None:
        """Tell what trains to checkpoint and stop, and end the rest at once: half a measurement is worth
        nothing, and there is no answer to wait for."""
        for flight in list(self.under_way.values()):
            if isinstance(flight.job, TrainJob):
                self.engine.cancel(flight.job.job_id)
            else:
                self.engine.kill(flight.job.job_id)
                del self.under_way[flight.job.job_id]
