"""Which lanes live and what each of them runs: the fleet as the driver knows it. No Ray, no process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from budgetsearch.core.errors import EngineError
from budgetsearch.core.records import Calibration, Job, Score, SegmentResult, TrainJob, WorkerSetup
from budgetsearch.core.reports import JobEnded, Notice, Report
from budgetsearch.core.results import crashed_results, stranded_results
from budgetsearch.engines.local import most_deaths
from budgetsearch.engines.ray.messages import Alive, Gone, Halt, Hello, Said, Strike, Take, ToLane

SILENT_SECONDS = 20.0
"""A lane that was not heard of for so long is presumed lost."""
DELIVERY_SECONDS = 10.0
"""So long a lane may go on saying that it does not run the job that was placed on it."""
EMPTY_SECONDS = 180.0
"""Without a single lane for so long the engine gives up: importing and a busy cluster take a while."""
MAX_FAILED = 4
"""A lane on which so many jobs failed in a row, while others end theirs, rests: its machine lacks the base
model or the folder of the checkpoints, or its card is broken. It would be free again at once, and take one
trial after the other down."""
REST_SECONDS = 300.0
"""... for so long; then one more job shows whether it is well."""
MAX_TRIES = 3
"""A calibration or a score, which no segment repeats, is placed so often."""
LOST = "the worker was lost; the segment starts again from its checkpoint"


@dataclass
class _Flight:
    """A job that was placed on a lane."""

    job: Job
    setup: WorkerSetup
    token: str = ""
    denied_since: float | None = None
    """Since when its lane says that it does not run it; None: it does not say so."""
    tries: int = 0


@dataclass
class _Lane:
    """What is known of a lane."""

    name: str
    number: int
    node: str
    heard: float
    flight: _Flight | None = None
    holds: str = ""
    """The quantization of its last job: its worker process keeps that base resident."""
    stale_since: float | None = None
    """Since when it still runs a job that was given up; None: it does not."""


@dataclass
class Table:
    """Places jobs on lanes, finds out what was lost, and ignores what comes too late.

    ``orders`` collects what is to be said to the lanes; who owns the table sends it.
    """

    size: int
    """How many lanes there are to be."""
    clock: Callable[[], float]
    orders: list[ToLane] = field(default_factory=list)
    _lanes: dict[str, _Lane] = field(default_factory=dict)
    _silent: dict[str, _Lane] = field(default_factory=dict)
    """Lanes that are presumed lost: a network or a machine may only have stood still."""
    _waiting: list[_Flight] = field(default_factory=list)
    """Jobs that came while no lane was free: lanes are still starting, or one has just been lost."""
    _vain: dict[int, int] = field(default_factory=dict)
    """By number: how often a lane was lost since it last ended a job."""
    _proven: set[int] = field(default_factory=set)
    """Numbers of the lanes that have ended a job."""
    _failed: dict[int, int] = field(default_factory=dict)
    """By number: how many of its jobs failed in a row, whether or not their trials are to blame."""
    _rests_until: dict[int, float] = field(default_factory=dict)
    _words: str = ""
    """Why the last lane was lost."""
    _counter: Iterator[int] = field(default_factory=itertools.count)
    _alone_since: float | None = None
    _looked: float | None = None
    """When the clock was last looked at."""

    @property
    def living(self) -> int:
        """How many lanes can be used."""
        return sum(self._usable(lane) for lane in self._lanes.values())

    @property
    def waiting(self) -> bool:
        """Whether a job waits for a lane."""
        return bool(self._waiting)

    # --------------------------------------------------------------------------- jobs

    def place(self, job: Job, setup: WorkerSetup) -> None:
        """Place a job on a free lane, on one that holds its quantization where there is one.

        Raises:
            EngineError: every lane is busy.
        """
        flights = [lane.flight for lane in self._lanes.values() if lane.flight] + self._waiting
        if len(flights) >= max(1, self.size):
            running = ", ".join(str(flight.job.job_id) for flight in flights)
            raise EngineError(f"job {job.job_id} was submitted while job {running} runs")
        self._waiting.append(_Flight(job, setup))
        self._serve()

    def cancel(self, job_id: int) -> list[Report]:
        """Ask a job to checkpoint and stop; one that waits for a lane ends at once."""
        for lane, flight in self._flying(job_id):
            self.orders.append(Halt(lane.name, flight.token))
        return self._forget_waiting(job_id)

    def kill(self, job_id: int) -> list[Report]:
        """End a job: its lane ends its worker process, and a lane that cannot answer is not waited for."""
        reports = self._forget_waiting(job_id)
        for lane, flight in self._flying(job_id):
            self.orders.append(Strike(lane.name, flight.token))
            lane.flight, lane.stale_since, lane.holds = None, self.clock(), ""
            reports.append(JobEnded(job_id, crashed_results(flight.job, "killed")))
        return reports

    def _flying(self, job_id: int) -> list[tuple[_Lane, _Flight]]:
        flying = [(lane, lane.flight) for lane in self._lanes.values()]
        return [(lane, flight) for lane, flight in flying if flight and flight.job.job_id == job_id]

    def _forget_waiting(self, job_id: int) -> list[Report]:
        found = [flight for flight in self._waiting if flight.job.job_id == job_id]
        self._waiting = [flight for flight in self._waiting if flight.job.job_id != job_id]
        return [JobEnded(job_id, stranded_results(flight.job, "it waited for a worker")) for flight in found]

    def _serve(self) -> None:
        """Give jobs that wait to lanes that are free."""
        while self._waiting:
            free = [lane for lane in self._lanes.values() if self._is_free(lane)]
            if not free:
                return
            flight = self._waiting.pop(0)
            wanted = flight.job.quantization
            lane = min(free, key=lambda lane: self._rank(lane, wanted))
            flight.token = f"{flight.job.job_id}.{next(self._counter)}"
            flight.denied_since = None
            flight.tries += 1
            lane.flight, lane.holds = flight, wanted
            self.orders.append(Take(lane.name, flight.token, flight.setup, flight.job))

    def _rank(self, lane: _Lane, quantization: str) -> tuple[int, int, int]:
        """The lower the better: one that failed is tried last, one that holds another base stays as it is."""
        fit = 0 if lane.holds == quantization else 1 if not lane.holds else 2
        return self._vain.get(lane.number, 0), fit, lane.number

    # -------------------------------------------------------------------- what is heard

    def hear(self, message: Hello | Alive | Said | Gone) -> list[Report]:
        """Take in what a lane says; returns what the driver should know."""
        if isinstance(message, Hello):
            reports = self._greet(message)
        elif isinstance(message, Gone) and message.lane not in self._lanes:
            self._silent.pop(message.lane, None)
            self._words = f"worker {message.lane}: {message.reason}"
            return []
        elif (lane := self._lanes.get(message.lane) or self._back(message.lane)) is None:
            return []  # replaced since
        elif isinstance(message, Gone):
            reports = self._lose(lane, message.reason)
        else:
            lane.heard = self.clock()
            reports = self._alive(lane, message) if isinstance(message, Alive) else self._said(lane, message)
        self._serve()
        return reports

    def _greet(self, hello: Hello) -> list[Report]:
        reports: list[Report] = []
        for lane in [lane for lane in self._lanes.values() if lane.number == hello.number]:
            reports += self._lose(lane, "it was started again")
        for name in [name for name, lane in self._silent.items() if lane.number == hello.number]:
            del self._silent[name]
        self._lanes[hello.lane] = _Lane(hello.lane, hello.number, hello.node, self.clock())
        return reports

    def _back(self, name: str) -> _Lane | None:
        """A lane that was presumed lost, if that is what is heard of now. Its job has been given up."""
        lane = self._silent.pop(name, None)
        if lane is not None:
            lane.flight, lane.stale_since, lane.holds = None, self.clock(), ""
            self._lanes[name] = lane
        return lane

    def _alive(self, lane: _Lane, alive: Alive) -> list[Report]:
        flight = lane.flight
        if flight is None:
            if not alive.token:
                lane.stale_since = None
                return []
            lane.stale_since = self.clock() if lane.stale_since is None else lane.stale_since
            self.orders.append(Strike(lane.name, alive.token))
            return []
        if alive.token == flight.token:
            flight.denied_since = None
            return []
        # Counted from when it is first heard: what was said before the order came may be heard late.
        flight.denied_since = self.clock() if flight.denied_since is None else flight.denied_since
        if self.clock() - flight.denied_since <= DELIVERY_SECONDS:
            return []
        lane.flight = None
        return self._lost(flight, lane)

    def _said(self, lane: _Lane, said: Said) -> list[Report]:
        ended = isinstance(said.report, JobEnded)
        if lane.flight is None or said.token != lane.flight.token:
            lane.stale_since = None if ended else lane.stale_since
            return []
        if isinstance(said.report, JobEnded):
            lane.flight = None
            self._vain[lane.number] = 0
            self._proven.add(lane.number)
            return [*self._judge(lane, said.report), said.report]
        return [said.report]

    def _judge(self, lane: _Lane, ended: JobEnded) -> list[Report]:
        """Whether the lane itself is to blame for what became of its last jobs."""
        reasons = [_failure(result) for result in ended.results]
        if not all(reasons):
            self._failed[lane.number] = 0
            return []
        self._failed[lane.number] = self._failed.get(lane.number, 0) + 1
        if self._failed[lane.number] < MAX_FAILED or not self._others_are_well(lane):
            return []
        self._rests_until[lane.number] = self.clock() + REST_SECONDS
        who, count = f"Worker {lane.number} on {lane.node}", self._failed[lane.number]
        text = (
            f"{who} gets no jobs for {REST_SECONDS:.0f} s: its last {count} failed, and others end theirs. "
            f"The last words: {reasons[-1]}"
        )
        return [Notice(ended.job_id, text)]

    def _others_are_well(self, lane: _Lane) -> bool:
        """Whether the last job of another one did not fail."""
        return any(self._failed.get(other.number) == 0 for other in self._lanes.values() if other is not lane)

    # -------------------------------------------------------------------- what is lost

    def tick(self) -> list[Report]:
        """Look at the clock: lanes that are silent are presumed lost.

        Raises:
            EngineError: there has not been a lane for too long.
        """
        now = self.clock()
        reports: list[Report] = []
        if self._looked is not None and now - self._looked > SILENT_SECONDS / 2:
            # Not they were silent: this process stood still, after Ctrl-Z or before a store that hangs.
            for lane in self._lanes.values():
                lane.heard = now
        self._looked = now
        for lane in list(self._lanes.values()):
            if now - lane.heard > SILENT_SECONDS:
                reports += self._lose(lane, f"it was silent for {SILENT_SECONDS:.0f} s")
                self._silent[lane.name] = lane
        self._serve()
        self._check_empty(now)
        return reports

    def lose_all(self, reason: str) -> list[Report]:
        """The fleet is gone: whatever ran is lost."""
        self._silent.clear()
        return [report for lane in list(self._lanes.values()) for report in self._lose(lane, reason)]

    def _lose(self, lane: _Lane, reason: str) -> list[Report]:
        del self._lanes[lane.name]
        self._words = f"worker {lane.number} on {lane.node}: {reason}"
        if lane.flight is None:
            return []
        self._vain[lane.number] = self._vain.get(lane.number, 0) + 1
        text = f"Worker {lane.number} on {lane.node} was lost ({reason}); its job is issued again."
        return [Notice(lane.flight.job.job_id, text), *self._lost(lane.flight, lane)]

    def _lost(self, flight: _Flight, lane: _Lane) -> list[Report]:
        """What becomes of a job whose lane is lost: segments are issued again by the driver."""
        if isinstance(flight.job, TrainJob) or flight.tries >= MAX_TRIES:
            return [JobEnded(flight.job.job_id, stranded_results(flight.job, LOST))]
        self._waiting.append(flight)
        return []

    def _check_empty(self, now: float) -> None:
        if self.living:
            self._alone_since = None
            return
        self._alone_since = now if self._alone_since is None else self._alone_since
        if now - self._alone_since > EMPTY_SECONDS:
            said = f" The last words: {self._words}." if self._words else ""
            raise EngineError(
                f"No worker has been there for {EMPTY_SECONDS:.0f} s.{said} `ray status` shows what the "
                "cluster has. Everything so far is kept, and `budgetsearch resume RUN` goes on."
            )

    def _usable(self, lane: _Lane) -> bool:
        stuck = lane.stale_since is not None and self.clock() - lane.stale_since > DELIVERY_SECONDS
        rests = self.clock() < self._rests_until.get(lane.number, 0.0) and self._others_are_well(lane)
        most = most_deaths(proven=lane.number in self._proven)
        return self._vain.get(lane.number, 0) < most and not stuck and not rests

    def _is_free(self, lane: _Lane) -> bool:
        return lane.flight is None and lane.stale_since is None and self._usable(lane)


def _failure(result: SegmentResult | Calibration | Score) -> str:
    """Why a job came to nothing for which its machine may be to blame; nothing if it did not."""
    return result.detail or result.status if result.status in ("crashed", "unread", "unwritten") else ""
