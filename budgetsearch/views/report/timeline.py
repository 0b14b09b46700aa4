"""When everything happened: segments, phases, losses and memory along the ledger.

Wall seconds are those of the run, from its beginning. Charged seconds are what the budget was charged with.
Worker seconds are those of all workers together, so with several of them they are more than the wall's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from budgetsearch.core.decisions import Run
from budgetsearch.core.events import (
    CardWatched,
    Charged,
    Decided,
    Entry,
    Event,
    Heartbeat,
    SegmentEnded,
    SegmentStarted,
)
from budgetsearch.core.history.accounts import Accounts
from budgetsearch.core.records import PHASES, Revision, Segment, SegmentResult
from budgetsearch.views.words import CUT_OFF

MAX_SAMPLES = 400
"""Points of memory over time: more than a screen can show."""
EPSILON = 1e-6
SHORTEST_SHARE = 1e-4
"""Of the run: a phase's stretch below it cannot be seen, and is counted but not drawn."""


@dataclass(frozen=True)
class Span:
    """One segment as it ran: a trial from one token count to another."""

    job_id: int
    trial_id: int
    worker: int
    """From 0: the first that was free."""
    member: int
    """Its place among the ``members`` trials that trained at once."""
    members: int
    rung: int
    start_seconds: float
    stop_seconds: float
    """Wall seconds; of one that still runs, the last that is known."""
    start_tokens: int
    stop_tokens: int
    status: str
    """As it ended; else ``running``, or ``cut off`` where no process works on the run any more."""
    loss_nats_per_token: float | None
    peak_bytes: int
    promotion: bool
    reason: str
    train_seconds: float = 0.0
    """Of training alone; a gang's members share theirs by the tokens that each has seen."""
    revisions: tuple[Revision, ...] = ()
    """How the end of a full run was moved on the way."""


@dataclass(frozen=True)
class PhaseSpan:
    """A stretch of the run that was charged to one phase."""

    phase: str
    start_seconds: float
    stop_seconds: float


@dataclass(frozen=True)
class LossPoint:
    """A validation loss and when it was known."""

    wall_seconds: float
    charged_seconds: float
    trial_id: int
    rung: int
    tokens: int
    loss_nats_per_token: float
    best_nats_per_token: float
    """The lowest loss of any checkpoint so far."""
    worker_seconds: float = 0.0
    """Of all workers together until then."""


@dataclass(frozen=True)
class MemorySample:
    """Memory and utilization around one moment."""

    wall_seconds: float
    used_bytes: int
    """The most that was in use."""
    utilization: float | None
    """Mean share of the time that the card computed, 0 to 1; None where nobody can say."""


@dataclass(frozen=True)
class Timeline:
    """Everything that has a time."""

    spans: tuple[Span, ...]
    phases: tuple[PhaseSpan, ...]
    """In the order of their charges; empty where several workers ran at once, for then charges overlap."""
    losses: tuple[LossPoint, ...]
    memory: tuple[MemorySample, ...]
    memory_bin_seconds: float
    """Each memory sample stands for so many seconds; 0: every heartbeat is there."""
    workers: int
    """The most jobs that ran at once."""


def timeline_of(entries: Iterable[Entry], *, going: bool = True) -> Timeline:
    """Walk along the ledger once; ``going``: a process works on the run."""
    walk = _Walk(unended="running" if going else CUT_OFF)
    for entry in entries:
        walk.take(entry)
    return walk.timeline()


def is_promotion(segment: Segment, reason: str) -> bool:
    """Tell whether a segment takes a trial to a higher rung; what only goes on was decided when it began."""
    return segment.rung > 0 and segment.start_tokens > 0 and "goes on" not in reason


@dataclass
class _Walk:
    """State up to an entry."""

    unended: str = "running"
    """What to say of a segment that has no end."""
    at: float = 0.0
    charged: float = 0.0
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)
    started: list[tuple[int, Segment, float]] = field(default_factory=list)
    ended: dict[tuple[int, int], tuple[float, SegmentResult]] = field(default_factory=dict)
    batch: list[tuple[str, float]] = field(default_factory=list)
    """Charges that belong to one moment."""
    phases: list[PhaseSpan] = field(default_factory=list)
    losses: list[LossPoint] = field(default_factory=list)
    best: float = math.inf
    memory: list[MemorySample] = field(default_factory=list)
    accounts: Accounts = field(default_factory=Accounts)

    def take(self, entry: Entry) -> None:
        event: Event = entry.event
        self.at = max(self.at, entry.at)
        self.accounts.apply(entry)
        if isinstance(event, Charged):
            self.batch.append((event.phase, event.seconds))
            return
        if not isinstance(event, (SegmentEnded, CardWatched)):
            self._settle()
        if isinstance(event, Decided) and isinstance(event.decision, Run):
            job = event.decision.job
            for segment, reason in zip(job.segments, event.decision.reasons, strict=True):
                self.reasons[job.job_id, segment.trial_id] = reason
        elif isinstance(event, SegmentStarted):
            self.started.append((event.job_id, event.segment, entry.at))
        elif isinstance(event, SegmentEnded):
            self._end(event, entry.at)
        elif isinstance(event, Heartbeat) and event.beat.used_bytes:
            beat = event.beat
            self.memory.append(MemorySample(entry.at, beat.used_bytes, beat.utilization))

    def _end(self, event: SegmentEnded, at: float) -> None:
        result = event.result
        self.ended[event.job_id, result.trial_id] = (at, result)
        if result.loss is not None and math.isfinite(result.loss) and result.checkpoint_out:
            self.best = min(self.best, result.loss)
            where = (result.trial_id, result.rung, result.tokens)
            # Charged seconds add up to those of the wall, whatever runs at once.
            self.losses.append(LossPoint(at, at, *where, result.loss, self.best, self.accounts.total))

    def _settle(self) -> None:
        """A moment's charges are complete: in the order of the phases, for a gang's members alternate."""
        for phase in PHASES:
            seconds = math.fsum(s for name, s in self.batch if name == phase)
            if seconds:
                self._extend(phase, seconds)
        self.batch.clear()

    def _extend(self, phase: str, seconds: float) -> None:
        start, self.charged = self.charged, self.charged + seconds
        if self.phases and self.phases[-1].phase == phase:
            self.phases[-1] = replace(self.phases[-1], stop_seconds=self.charged)
        else:
            self.phases.append(PhaseSpan(phase, start, self.charged))

    def timeline(self) -> Timeline:
        self._settle()
        spans, workers = self._spans()
        memory, width = binned(self.memory)
        shortest = SHORTEST_SHARE * self.charged
        drawn = [p for p in self.phases if p.stop_seconds - p.start_seconds >= shortest]
        return Timeline(
            spans, () if workers > 1 else tuple(drawn), tuple(self.losses), memory, width, workers
        )

    def _spans(self) -> tuple[tuple[Span, ...], int]:
        jobs: dict[int, list[tuple[Segment, float, float]]] = {}
        for job_id, segment, start in self.started:
            stop, _ = self.ended.get((job_id, segment.trial_id), (self.at, None))
            jobs.setdefault(job_id, []).append((segment, start, stop))
        places = lanes([(j, some[0][1], max(stop for *_, stop in some)) for j, some in jobs.items()])
        spans = [
            self._span(job_id, member, some, places[job_id])
            for job_id, some in jobs.items()
            for member in range(len(some))
        ]
        return tuple(spans), max(places.values(), default=-1) + 1

    def _span(
        self, job_id: int, member: int, some: Sequence[tuple[Segment, float, float]], worker: int
    ) -> Span:
        segment, start, stop = some[member]
        _, result = self.ended.get((job_id, segment.trial_id), (0.0, None))
        reason = self.reasons.get((job_id, segment.trial_id), "")
        return Span(
            job_id=job_id,
            trial_id=segment.trial_id,
            worker=worker,
            member=member,
            members=len(some),
            rung=segment.rung,
            start_seconds=start,
            stop_seconds=stop,
            start_tokens=segment.start_tokens,
            stop_tokens=result.tokens if result else segment.start_tokens,
            status=result.status if result else self.unended,
            loss_nats_per_token=result.loss if result else None,
            peak_bytes=result.peak_bytes if result else 0,
            promotion=is_promotion(segment, reason),
            reason=reason,
            train_seconds=result.seconds.get("train", 0.0) if result else 0.0,
            revisions=result.revisions if result else (),
        )


def lanes(jobs: Iterable[tuple[int, float, float]]) -> dict[int, int]:
    """The worker of each job (its number, start, stop): the first one that is free when it starts."""
    free_at: list[float] = []
    places = {}
    for job, start, stop in sorted(jobs, key=lambda one: (one[1], one[0])):
        lane = next((k for k, until in enumerate(free_at) if until <= start + EPSILON), len(free_at))
        free_at[lane : lane + 1] = [stop]
        places[job] = lane
    return places


def binned(
    samples: Sequence[MemorySample], most: int = MAX_SAMPLES
) -> tuple[tuple[MemorySample, ...], float]:
    """At most so many samples, and the seconds that each stands for: the peak and the mean utilization."""
    if len(samples) <= most:
        return tuple(samples), 0.0
    first, last = samples[0].wall_seconds, samples[-1].wall_seconds
    width = max((last - first) / most, EPSILON)
    bins: dict[int, list[MemorySample]] = {}
    for sample in samples:
        bins.setdefault(min(most - 1, int((sample.wall_seconds - first) / width)), []).append(sample)
    return tuple(_merged(first + (k + 0.5) * width, some) for k, some in bins.items()), width


def _merged(at: float, some: Sequence[MemorySample]) -> MemorySample:
    busy = [s.utilization for s in some if s.utilization is not None]
    return MemorySample(at, max(s.used_bytes for s in some), sum(busy) / len(busy) if busy else None)
