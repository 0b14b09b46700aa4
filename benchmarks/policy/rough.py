"""Simulated runs of the real driver in which all kinds of things go wrong; each follows from its setup.

``play`` gives the events of one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from benchmarks.policy.setups import MOODS, Process, Setup, draw, quantizations
from budgetsearch.core.errors import BudgetsearchError, CheckpointError, DiskError, UnreadableError
from budgetsearch.core.events import Entry, Opened
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.ports import Proposal
from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Job,
    ScoreJob,
    Segment,
    SegmentResult,
    Status,
    TrainJob,
)
from budgetsearch.core.results import crashed_results, stranded_results
from budgetsearch.core.space.space import Space
from budgetsearch.engines.simulator import Result, VirtualClock
from budgetsearch.run.driver import Driver
from budgetsearch.run.incumbent import NoExport
from budgetsearch.sampler.sampler import OptunaSampler
from budgetsearch.storage.ledger import MemoryLedger
from tests.support.worlds import ChangingEngine, SyntheticWorld

# ----------------------------------------------------------------------- the world


class Machine:
    """A world with a mood; it follows from its run's number and what it was asked so far. See ``World``."""

    def __init__(self, setup: Setup, clock: VirtualClock) -> None:
        self.setup, self.clock, self.mood = setup, clock, MOODS[setup.mood]
        self._tries: Counter[tuple[object, ...]] = Counter()
        self._began: dict[int, float] = {}
        self._draw = partial(draw, "machine", setup.number)
        rng, budget = self._draw(), setup.request.budget_seconds
        self._throttled_from = rng.uniform(0.0, budget)
        self._full_from = rng.uniform(0.0, 2 * budget)
        self.inner = SyntheticWorld(
            seed=setup.number,
            tokens_per_second=setup.rate,
            slowdown=self._slowdown,
            fate=self._fate,
            hang=lambda segment: self._struck("hangs", segment),
            deaf=lambda segment: self._draw("deaf", segment.trial_id).random() < 0.5,
            loses=lambda segment: self._struck("damaged", segment),
            balks=lambda segment: self._struck("unreadable", segment, lasts=3),
            full=self._has_no_room,
            mute=rng.random() < 0.05,
            broken=setup.broken,
            gains=setup.gains,
        )

    def perform(self, job: Job) -> tuple[tuple[Result, ...], float]:
        """See ``World``."""
        if not isinstance(job, TrainJob):
            return self._measurement(job)
        for segment in job.segments:
            self._tries[_place(segment)] += 1
            self._began[segment.trial_id] = self.clock.now()
        results, seconds = self.inner.perform(job)
        return self._trained(job, results), seconds

    def interrupt(self, job: Job, share: float) -> tuple[Result, ...] | None:
        """See ``World``; only training looks whether it was told to stop."""
        return self.inner.interrupt(job, share) if isinstance(job, TrainJob) else None

    def _measurement(self, job: CalibrateJob | ScoreJob) -> tuple[tuple[Result, ...], float]:
        name = type(job).__name__, job.quantization
        self._tries[name] += 1
        chance = self._draw(*name, self._tries[name])
        results, seconds = self.inner.perform(job)
        if chance.random() < self.mood.crashes:
            return crashed_results(job, "it crashed"), seconds
        if isinstance(job, ScoreJob):
            return results, math.inf if chance.random() < self.mood.hangs else seconds
        return tuple(self._calibrated(r) if isinstance(r, Calibration) else r for r in results), seconds

    def _calibrated(self, found: Calibration) -> Calibration:
        """What else a worker finds out."""
        if found.status != "ok":
            return found
        rng, batch = self._draw("calibration"), self.setup.request.batch_size
        limit = self.setup.request.limit_bytes or 0
        return replace(
            found,
            micro_batch=rng.choice((2, 4, batch)),
            recompute=rng.random() < 0.3,
            answer_seconds=rng.choice((0.0, 0.5, 20.0)),
            probes=tuple(replace(p, peak_bytes=limit * p.members // 10) for p in found.probes),
        )

    def _struck(self, what: str, segment: Segment, lasts: int = 1) -> bool:
        """Whether a mishap befalls this attempt; one that lasts befalls those that follow it too."""
        attempt = self._tries[_place(segment)] // lasts
        share: float = getattr(self.mood, what)
        return self._draw(what, *_place(segment), attempt).random() < share

    def _slowdown(self, segment: Segment) -> float:
        factor = self._draw("slow", segment.trial_id, segment.rung).choice(self.mood.slow)
        return factor * (self.mood.throttle if self._began[segment.trial_id] > self._throttled_from else 1.0)

    def _has_no_room(self, segment: Segment) -> bool:
        since = self._began[segment.trial_id] - self._full_from
        return bool(self.mood.full) and 0.0 <= since < 0.05 * self.setup.request.budget_seconds

    def _fate(self, segment: Segment) -> Status:
        trial = self._draw("trial", segment.trial_id)
        if trial.random() < self.mood.cramped and segment.micro_batch > trial.choice((0, 1, 2)):
            return "out_of_memory"
        if self._draw("diverges", segment.trial_id, segment.rung).random() < self.mood.diverges:
            return "diverged"
        return "crashed" if self._struck("crashes", segment, lasts=2) else "ok"

    def _trained(self, job: TrainJob, results: Sequence[Result]) -> tuple[Result, ...]:
        """What one member does to its worker all of them feel."""
        if any(self._struck("fatal", segment, lasts=4) for segment in job.segments):
            return stranded_results(job, "its worker went away")
        if any(result.status == "crashed" for result in results):
            return crashed_results(job, "it crashed")
        size = len(job.segments)
        if size > self.mood.crowd and self._draw("crowd", job.job_id).random() < 0.5:
            return tuple(
                SegmentResult(s.trial_id, s.rung, "out_of_memory", s.start_tokens, gang=size)
                for s in job.segments
            )
        return tuple(
            self._measured(s, r) if isinstance(r, SegmentResult) and r.status == "ok" else r
            for s, r in zip(job.segments, results, strict=True)
        )

    def _measured(self, segment: Segment, result: SegmentResult) -> SegmentResult:
        """With a loss that differs from example to example, and what memory made of it."""
        result = replace(result, gang=min(self.mood.crowd, result.gang))
        if self._struck("shrinks", segment):
            result = replace(result, micro_batch=max(1, segment.micro_batch // 2))
        if result.loss is None:
            return result
        trial, here = (self._draw("loss", segment.trial_id, *parts) for parts in ((), (result.tokens,)))
        loss = result.loss + trial.gauss(0.0, self.mood.bias) * math.exp(-result.tokens / 10_000)
        loss += here.gauss(0.0, self.mood.noise)
        if trial.random() < self.mood.overfits:
            loss += result.tokens / 100_000
        loss = max(0.01, loss)
        examples = tuple(loss + here.gauss(0.0, 0.1) for _ in result.example_losses)
        return replace(result, loss=loss, example_losses=examples)


def _place(segment: Segment) -> tuple[object, ...]:
    return segment.trial_id, segment.rung, segment.start_tokens


class Disk(NoExport):
    """An exporter that takes its time and finds some checkpoints damaged; see the port ``Exporter``."""

    def __init__(self, setup: Setup, clock: VirtualClock) -> None:
        self.number, self.clock, self.mood = setup.number, clock, MOODS[setup.mood]
        self.exported = ""

    def export(self, history: History, state: TrialState, *, final: bool) -> str:
        """See the port."""
        self.clock.advance(0.3)
        if why := self.damage(state):
            raise CheckpointError(why)
        if self._struck("full", f"{state.best_checkpoint} {final}"):
            raise DiskError("There is no room for the adapter.")
        self.exported = str(state.best_checkpoint)
        return "adapter"

    def damage(self, state: TrialState) -> str:
        """See the port."""
        name = str(state.best_checkpoint)
        if self._struck("unreadable", name) and not self._struck("damaged", name):
            raise UnreadableError(f"{name} cannot be read now.")
        return f"{name} is damaged" if self._struck("damaged", name) else ""

    def stands(self, checkpoint: str) -> bool:
        """See the port."""
        return self.exported == checkpoint

    def missing(self, names: Iterable[str]) -> Mapping[str, str]:
        """See the port."""
        return {name: "it is missing" for name in names if self._struck("damaged", name)}

    def sweep(self, history: History) -> None:
        """See the port."""
        self.clock.advance(0.05)

    def _struck(self, what: str, checkpoint: str) -> bool:
        share: float = getattr(self.mood, what)
        return draw(self.number, "disk", what, checkpoint).random() < share


class Chance:
    """Uniform configurations of what the calibration left; see the port ``Sampler``."""

    def propose(self, history: History, seed: int, first_number: int, count: int) -> list[Proposal]:
        """See the port."""
        assert history.plan is not None
        space = Space.parse(history.plan.space)
        units = (
            {name: draw(seed, number, name).random() for name in space.searched}
            for number in range(first_number, first_number + count)
        )
        return [Proposal(space.from_unit(unit), "prior") for unit in units]


# ------------------------------------------------------------------------- playing


class Killed(BaseException):
    """Stands for kill -9: nothing of the driver runs after it."""


class Killer:
    """A watcher that kills the process once the ledger has so many entries; see the port ``Watcher``."""

    entries = 0

    def see(self, entry: Entry, history: History) -> None:
        """See the port."""
        if entry.seq == self.entries:
            raise Killed


def play(setup: Setup) -> list[Entry]:
    """Every event of a run, over all its processes."""
    ledger, killer, clock = MemoryLedger(), Killer(), VirtualClock(2.0)
    ledger.watch(killer)
    machine, disk = Machine(setup, clock), Disk(setup, clock)
    for process in setup.processes:
        killer.entries = len(ledger.entries) + process.killed_after if process.killed_after else 0
        try:
            _driver(setup, process, ledger, machine, disk, clock).run()
        except (Killed, BudgetsearchError):
            pass  # why stands in the ledger, or the next process finds out
        ledger.history = fold(ledger.entries)  # which is all that the next process has
        closed = ledger.history.closed
        if closed is not None and closed.state == "finished":
            break
        machine.clock = disk.clock = clock = VirtualClock(ledger.history.spent + 3.0)
    return ledger.entries


def _driver(
    setup: Setup, process: Process, ledger: MemoryLedger, machine: Machine, disk: Disk, clock: VirtualClock
) -> Driver:
    clock.advance(process.down)
    changes = [change for change in setup.changes if change.at > clock.now()]
    return Driver(
        ledger=ledger,
        engine=ChangingEngine(machine, clock, setup.workers, changes),
        sampler=OptunaSampler() if setup.optuna else Chance(),
        exporter=disk,
        clock=clock,
        request=replace(setup.request, budget_seconds=process.budget),
        opened=Opened(process.budget, {}),
        quantizations=quantizations(setup.request),
        stop_requested=lambda: "SIGTERM" if clock.now() > process.stopped_at else "",
        down_seconds=process.down,
        grace_seconds=setup.grace,
    )
