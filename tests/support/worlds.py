"""A world for the simulator: LoRA-like loss curves, whatever goes wrong that it is told to, nodes that go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from budgetsearch.core.history.outcomes import BLAMELESS
from budgetsearch.core.landing import Flight, fly
from budgetsearch.core.policy.planning import gang_gains
from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Job,
    Probe,
    Score,
    ScoreJob,
    Segment,
    SegmentResult,
    Status,
    TrainJob,
)
from budgetsearch.core.reports import Report
from budgetsearch.core.results import stranded_results, untrained
from budgetsearch.engines.simulator import Result, SimulatorEngine, VirtualClock, World, usual_loss

MAX_GANG = 64
"""More than any gang has: a world's gains are those of its own sizes."""
NO_START = ("lost", "unread")
"""Ends of segments that could not begin to train."""


@dataclass(frozen=True)
class Change:
    """From ``at`` (virtual seconds) on there are so many workers: a node went away with its, or came back."""

    at: float
    slots: int


class ChangingEngine(SimulatorEngine):
    """The simulator with workers that go and come; ``changes`` in the order of their times."""

    def __init__(self, world: World, clock: VirtualClock, slots: int, changes: Sequence[Change]) -> None:
        super().__init__(world, clock, slots)
        self._changes = list(changes)

    def poll(self, timeout: float) -> Sequence[Report]:
        """As the simulator does, but never past a change."""
        if self._changes:
            timeout = min(timeout, max(0.0, self._changes[0].at - self.clock.now()))
        found = super().poll(timeout)
        while self._changes and self._changes[0].at <= self.clock.now():
            self._resize(self._changes.pop(0).slots)
        ended, self._ready = self._ready, []
        return [*found, *ended]

    def _resize(self, slots: int) -> None:
        """The last jobs are on the workers that go away."""
        self.slots = slots
        for job_id in sorted(self._running)[slots:]:
            running = self._running[job_id]
            self._end(running, stranded_results(running.job, "its node went away"))


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
    metric: Callable[[Segment, int], Sequence[float | None]] = lambda segment, example: ()
    """What the user's metric gives to so many answers of a segment's checkpoint."""
    answer_seconds: float = 0.0
    """Of one answer with its grade."""
    documents: int = 0
    """Of the task that is the metric."""
    mute: bool = False
    """Whether no answers can be generated."""
    broken: Sequence[str] = ()
    """Quantizations that cannot be calibrated."""
    gains: Mapping[int, float] = field(default_factory=dict)
    """How many times the rate of one alone so many trials reach together."""
    pace: Callable[[Segment, int, float], float] = lambda segment, tokens, elapsed: 1.0
    """How many times longer a token of a segment that lands itself takes, beside ``slowdown``."""
    step_tokens: int = 640
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
        return usual_loss(segment, tokens, self.seed)

    def _calibrate(self, job: CalibrateJob) -> Calibration:
        if job.quantization in self.broken:
            return Calibration(job.quantization, "crashed", detail="broken")
        rate = self.tokens_per_second / (1.5 if job.quantization == "nf4" else 1.0)
        found = Calibration(job.quantization, "ok", rate, 0.05, 0.5, 1.0, micro_batch=job.batch_size)
        found = replace(found, rank=job.ranks[0], answer_seconds=self.answer_seconds)
        found = replace(found, documents=self.documents)
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
        flight = self._flight(segment)
        train = flight.seconds
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
        name = _name(segment, flight.tokens)
        trained = replace(result, tokens=flight.tokens, checkpoint_out=name, revisions=flight.revisions)
        if segment.answers:
            values = tuple(self.metric(segment, segment.answers))
            seconds = {"train": train, "score": segment.answers * self.answer_seconds}
            trained = replace(trained, metric=values, seconds=seconds)
        if segment.only_grades:
            return replace(trained, checkpoint_out=segment.checkpoint_in)
        if not segment.evaluate:
            return trained
        loss, evaluate = self.loss(segment, flight.tokens), self.overhead_seconds
        if segment.landing is not None:  # the first examples must do where the time ends; one part is made
            evaluate = min(evaluate, max(evaluate / 8, segment.landing.seconds - train))
        measured = math.ceil(min(examples, 8) * evaluate / self.overhead_seconds)
        return replace(
            trained,
            loss=loss,
            example_losses=(loss,) * measured,
            seconds={**trained.seconds, "train": train, "evaluate": evaluate},
        )

    def _flight(self, segment: Segment) -> Flight:
        nf4 = 1.5 if segment.params["quantization"] == "nf4" else 1.0
        token = nf4 / self.tokens_per_second * self.slowdown(segment)
        if segment.landing is None:
            tokens = segment.stop_tokens - segment.start_tokens
            return Flight(segment.stop_tokens, tokens * token, ())
        return fly(segment, self.step_tokens, lambda at, elapsed: token * self.pace(segment, at, elapsed))

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
        full = self._train(segment, 0)
        if full.status in BLAMELESS:
            return full
        tokens = segment.start_tokens + int(share * (self._flight(segment).tokens - segment.start_tokens))
        return replace(
            full,
            status="cancelled",
            tokens=tokens,
            loss=None,
            seconds={name: seconds * share for name, seconds in full.seconds.items()},
            revisions=tuple(change for change in full.revisions if change.tokens <= tokens),
            checkpoint_out=_name(segment, tokens) if tokens > segment.start_tokens else None,
        )


def _name(segment: Segment, tokens: int) -> str:
    return f"trial{segment.trial_id:04d}-rung{segment.rung}-tokens{tokens}-attempt{segment.attempt}"
