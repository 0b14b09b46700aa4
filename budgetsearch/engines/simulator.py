"""An engine on virtual time: the same jobs and reports, and no second passes.

What a job does is up to a ``World``; ``SyntheticWorld`` has LoRA-like loss curves, and may be told
to be slow, to diverge, to run out of memory or to crash.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from budgetsearch.core.errors import EngineError
from budgetsearch.core.history.outcomes import BLAMELESS
from budgetsearch.core.policy.planning import gang_gains
from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Job,
    JobEnded,
    Probe,
    Report,
    Score,
    ScoreJob,
    Segment,
    SegmentResult,
    Status,
    TrainJob,
)
from budgetsearch.core.results import crashed_results, stranded_results, untrained

MAX_GANG = 64
"""More than any gang has: a world's gains are those of its own sizes."""
Result = SegmentResult | Calibration | Score
NO_START = ("lost", "unread")
"""Ends of segments that could not begin to train."""


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


@dataclass(frozen=True)
class Change:
    """From ``at`` (virtual seconds) on there are so many workers: a node went away with its, or came back."""

    at: float
    slots: int


class SimulatorEngine:
    """Runs up to ``slots`` jobs at once on a virtual clock; ``changes`` in the order of their times."""

    def __init__(
        self, world: World, clock: VirtualClock, slots: int = 1, changes: Sequence[Change] = ()
    ) -> None:
        self.world, self.clock, self.slots = world, clock, slots
        self._changes = list(changes)
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
            change = self._changes[0].at if self._changes else until
            self.clock.advance(min(until, first, change) - self.clock.now())
            for running in [r for r in self._running.values() if r.ends <= self.clock.now()]:
                self._end(running, running.results)
            while self._changes and self._changes[0].at <= self.clock.now():
                self._resize(self._changes.pop(0).slots)
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

    def _resize(self, slots: int) -> None:
        """The last jobs are on the workers that go away."""
        self.slots = slots
        for job_id in sorted(self._running)[slots:]:
            running = self._running[job_id]
            self._end(running, stranded_results(running.job, "its node went away"))

    def _end(self, running: _Running, results: tuple[Result, ...]) -> None:
        del self._running[running.job.job_id]
        self._ready.append(JobEnded(running.job.job_id, results))


@dataclass
class SyntheticWorld:
    """LoRA-like curves: a power law towards a floor that the configuration decides."""

    seed: int = 0
    tokens_per_second: float = 200.0
    slowdown: Callable[[Segment], float] = lambda segment: 1.0
    """How many times longer a segment takes than calibrated."""
    fate: Callable[[Segment], Status] = lambda segment: "ok"
    """What becomes of a segment."""
    hang: Callable[[Segment], bool] = lambda segment: False
    """Whether a segment never ends by itself."""
    deaf: Callable[[Segment], bool] = lambda segment: False
    """Whether a segment does not react when it is told to stop."""
    loses: Callable[[Segment], bool] = lambda segment: False
    """Whether the checkpoint that a segment starts from turns out to be damaged."""
    balks: Callable[[Segment], bool] = lambda segment: False
    """Whether the checkpoint that a segment starts from cannot be read now."""
    full: Callable[[Segment], bool] = lambda segment: False
    """Whether there is no room for a segment's checkpoint."""
    mute: bool = False
    """Whether no answers can be generated."""
    broken: Sequence[str] = ()
    """Quantizations that cannot be calibrated."""
    gains: Mapping[int, float] = field(default_factory=dict)
    """How many times the rate of one alone so many trials reach together."""
    overhead_seconds: float = 2.0
    started: list[Segment] = field(default_factory=list)
    """Every segment that was started."""

    def perform(self, job: Job) -> tuple[tuple[Result, ...], float]:
        """See ``World``."""
        if isinstance(job, CalibrateJob):
            return (self._calibrate(job),), 10.0
        if isinstance(job, ScoreJob):
            return (self._score(job),), min(5.0, job.limit_seconds)
        results = self._together([self._train(s, job.eval_examples) for s in job.segments], job)
        self.started += job.segments
        seconds = sum(sum(result.seconds.values()) for result in results)
        return results, math.inf if any(self.hang(s) for s in job.segments) else seconds

    def interrupt(self, job: Job, share: float) -> tuple[Result, ...] | None:
        """See ``World``: segments keep the tokens that they had reached."""
        if not isinstance(job, TrainJob):
            return self.perform(job)[0]
        if any(self.deaf(segment) for segment in job.segments):
            return None
        return self._together([self._cut(s, share) for s in job.segments], job)

    def loss(self, segment: Segment, tokens: int) -> float:
        """Validation loss of a configuration after so many tokens."""
        rate = math.log10(float(segment.params["learning_rate"]))
        floor = 0.5 + 0.3 * (rate + 2.7) ** 2 + 0.2 / math.log2(1 + int(segment.params["rank"]))
        noise = random.Random(f"{self.seed}/{segment.trial_id}/{tokens}").gauss(0.0, 0.01)
        return floor + 3.0 * math.pow(1 + tokens / 1000.0, -0.7) + noise

    def _calibrate(self, job: CalibrateJob) -> Calibration:
        if job.quantization in self.broken:
            return Calibration(job.quantization, "crashed", detail="broken")
        rate = self.tokens_per_second / (1.5 if job.quantization == "nf4" else 1.0)
        found = Calibration(job.quantization, "ok", rate, 0.05, 0.5, 1.0, micro_batch=job.batch_size)
        found = replace(found, rank=job.ranks[0])
        sizes = [size for size in self.gains if size <= job.max_gang]
        probes = tuple(Probe(n, job.batch_size, False, 64, rate * self.gains[n], 0) for n in sizes)
        return replace(found, gang=max(sizes, default=1), probes=probes)

    def _score(self, job: ScoreJob) -> Score:
        if job.eval_examples:
            return Score("ok", job.quantization, base_loss=3.0, adapter_loss=1.0)
        if self.mute:
            return Score("crashed", job.quantization, detail="mute")
        count = job.task_examples
        return Score("ok", job.quantization, base_accuracy=0.0, adapter_accuracy=0.5, task_examples=count)

    def _train(self, segment: Segment, examples: int) -> SegmentResult:
        if segment.checkpoint_in and self.loses(segment):
            return replace(untrained(segment, "lost", "it is damaged"), seconds={"train": 0.0, "load": 0.5})
        if segment.checkpoint_in and self.balks(segment):
            unread = untrained(segment, "unread", "input/output error")
            return replace(unread, seconds={"train": 0.0, "load": 1.5})
        if self.full(segment):
            return replace(untrained(segment, "unwritten", "no space left on device"), seconds={"train": 1.0})
        nf4 = 1.5 if segment.params["quantization"] == "nf4" else 1.0
        tokens = segment.stop_tokens - segment.start_tokens
        train = tokens * nf4 / self.tokens_per_second * self.slowdown(segment)
        status = self.fate(segment)
        result = SegmentResult(
            segment.trial_id,
            segment.rung,
            status,
            segment.start_tokens,
            seconds={"train": train if status == "ok" else train / 4},
        )
        if status != "ok":
            return result
        name = _name(segment, segment.stop_tokens)
        trained = replace(result, tokens=segment.stop_tokens, checkpoint_out=name)
        if not segment.evaluate:
            return trained
        loss = self.loss(segment, segment.stop_tokens)
        return replace(
            trained,
            loss=loss,
            example_losses=(loss,) * min(examples, 8),
            seconds={"train": train, "evaluate": self.overhead_seconds},
        )

    def _gain(self, job: TrainJob, size: int) -> float:
        """As the calibration measures it, interpolated between its sizes."""
        known = gang_gains(
            self._calibrate(CalibrateJob(0, job.quantization, (1,), 1, 0.0, max_gang=MAX_GANG))
        )
        return known[min(size, len(known)) - 1]

    def _together(self, results: Sequence[SegmentResult], job: TrainJob) -> tuple[SegmentResult, ...]:
        """The results of those that trained at once: without those whose checkpoints could not be had."""
        size = sum(result.status not in NO_START for result in results)
        gain = self._gain(job, max(1, size))
        began = size if size < len(results) else 0
        return tuple(
            result
            if result.status in NO_START
            else replace(
                result,
                seconds={**result.seconds, "train": result.seconds["train"] / gain},
                gang=size,
                began=began,
            )
            for result in results
        )

    def _cut(self, segment: Segment, share: float) -> SegmentResult:
        tokens = segment.start_tokens + int(share * (segment.stop_tokens - segment.start_tokens))
        full = self._train(segment, 0)
        if full.status in BLAMELESS:
            return full
        return replace(
            full,
            status="cancelled",
            tokens=tokens,
            loss=None,
            seconds={name: seconds * share for name, seconds in full.seconds.items()},
            checkpoint_out=_name(segment, tokens) if tokens > segment.start_tokens else None,
        )


def _name(segment: Segment, tokens: int) -> str:
    return f"trial{segment.trial_id:04d}-rung{segment.rung}-tokens{tokens}-attempt{segment.attempt}"
