"""Simulated runs of the real driver in which all kinds of things go wrong; each follows from its number.

Its budget, its workers and gangs, what its world does to it, when it is killed and goes on: ``setup_of``
draws them, ``play`` gives the events. A calm world is among them, and some runs have the real sampler.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from budgetsearch.core.errors import BudgetsearchError, CheckpointError, DiskError, UnreadableError
from budgetsearch.core.events import Entry, Opened
from budgetsearch.core.footprint import Footprint
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.policy.planning import PlanRequest
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
from tests.support.worlds import Change, ChangingEngine, SyntheticWorld

DAY = 86_400.0


@dataclass(frozen=True)
class Mood:
    """What goes wrong in a world. Shares are of trials where they stay so, else of attempts."""

    slow: tuple[float, ...] = (1.0,)
    """A segment takes one of these times as long as calibrated."""
    throttle: float = 1.0
    """From some moment on everything takes so many times as long."""
    noise: float = 0.0
    """Standard deviation of what is added to a loss."""
    bias: float = 0.0
    """The same for a trial, as long as it has seen few tokens."""
    overfits: float = 0.0
    """Share of trials whose loss rises in the end."""
    diverges: float = 0.0
    """Share of a trial's rungs."""
    cramped: float = 0.0
    """Share of trials that run out of memory, some of them at every micro-batch."""
    shrinks: float = 0.0
    """Share of attempts that end with half of their micro-batch."""
    crowd: int = 64
    """Gangs with more members than this run out of memory."""
    crashes: float = 0.0
    hangs: float = 0.0
    """Half of the trials do not hear either that they are to stop."""
    fatal: float = 0.0
    """Share of attempts that lose their worker three times in a row."""
    damaged: float = 0.0
    """Share of checkpoints."""
    unreadable: float = 0.0
    """Share of checkpoints that cannot be read for a while."""
    full: float = 0.0
    """Share of exports for which there is no room; for a while there is none for checkpoints either."""


MOODS: Mapping[str, Mood] = {
    "calm": Mood(),
    "noisy": Mood((0.8, 1.0, 1.25), noise=0.1, bias=1.0, overfits=0.3),
    "slow": Mood((1.0, 1.0, 1.3, 3.0, 10.0), throttle=2.0, noise=0.02),
    "failing": Mood((0.9, 1.0, 1.1), noise=0.02, diverges=0.1, crashes=0.1, fatal=0.02),
    "tight": Mood((1.0, 1.1), noise=0.02, cramped=0.25, shrinks=0.05, crowd=2),
    "hanging": Mood((1.0, 1.0, 2.0), noise=0.02, hangs=0.06, crashes=0.02),
    "frail": Mood(noise=0.02, damaged=0.08, unreadable=0.08, full=0.2),
    "hostile": Mood(
        slow=(0.7, 1.0, 3.0),
        throttle=1.5,
        noise=0.1,
        bias=0.5,
        overfits=0.1,
        diverges=0.1,
        cramped=0.1,
        shrinks=0.05,
        crowd=3,
        crashes=0.1,
        hangs=0.04,
        fatal=0.02,
        damaged=0.04,
        unreadable=0.04,
        full=0.1,
    ),
}
RANKS = [4, 8, 16, 32, 64]
RATE = {"kind": "float", "low": 1e-4, "high": 1e-2, "log": True}
SPACES: Mapping[str, Mapping[str, Any]] = {
    name: {
        "name": name,
        "dimensions": {
            "quantization": {"kind": "choice", "values": quantizations},
            "rank": {"kind": "choice", "values": ranks, "ordered": True},
            "learning_rate": RATE,
            "dropout": {"kind": "choice", "values": [0.0, 0.05]},
        },
    }
    for name, quantizations, ranks in (
        ("one", ["fp32"], RANKS[:3]),
        ("two", ["fp32", "nf4"], RANKS[:3]),
        ("three", ["bf16", "int8", "nf4"], RANKS),
    )
}
GAINS: Sequence[Mapping[int, float]] = ({}, {2: 1.6, 4: 2.4}, {2: 1.9, 4: 3.4, 8: 5.0})
NEEDS: Mapping[str, Footprint] = {
    name: Footprint(fixed, per_rank=30.0, per_token=2.0, per_token_recompute=0.5)
    for name, fixed in (("fp32", 1_000.0), ("bf16", 800.0), ("int8", 600.0), ("nf4", 400.0))
}
"""Bytes, as foreseen."""
CARDS = (900, 1_200, 1_200, 2_000, 2_000)
"""Bytes: on the smallest fp32 does not fit at all, on none the largest ranks with a whole batch."""
LONGEST = 64
"""Tokens of the longest row."""


def draw(*parts: object) -> random.Random:
    """Chance of its own for whatever the parts name."""
    return random.Random("/".join(map(str, parts)))


# ------------------------------------------------------------------------ the runs


@dataclass(frozen=True)
class Process:
    """One process of a run, and how it ends if the run is not over before."""

    budget: float
    """Of the whole run, as it is told to this process."""
    killed_after: int = 0
    """So many events; 0: it is not."""
    stopped_at: float = math.inf
    """Seconds of the run after which it is asked to stop."""
    down: float = 0.0
    """What passed before it and counts."""


@dataclass(frozen=True)
class Setup:
    """All that a run follows from."""

    number: int
    mood: str
    request: PlanRequest
    workers: int
    changes: tuple[Change, ...]
    """When there are more or fewer workers."""
    gains: Mapping[int, float]
    rate: float
    """Tokens per second."""
    broken: tuple[str, ...]
    """Quantizations that cannot be calibrated."""
    grace: float
    optuna: bool
    """Whether the sampler is the real one."""
    processes: tuple[Process, ...]

    def features(self) -> Iterator[str]:
        """What sets the run apart, in words."""
        request, first = self.request, self.processes[0]
        yield f"world: {self.mood}"
        yield f"workers: {self.workers}"
        yield f"eta: {request.eta}"
        yield f"quantizations: {len(quantizations(request))}"
        yield f"gang of at most: {request.max_gang}"
        yield f"sampler: {'Optuna' if self.optuna else 'random'}"
        hours = request.budget_seconds / 3600
        yield "budget: " + next(f"up to {most:g} h" for most in (0.1, 0.5, 2, 8, 24) if hours <= most)
        told = {
            "answers to score": request.task_examples,
            "first rung given": request.first_rung,
            "workers come and go": self.changes,
            "a broken quantization": self.broken,
            "memory foreseen": request.footprints,
            "little room on disk": request.max_held,
            "killed": first.killed_after,
            "stopped": math.isfinite(first.stopped_at),
            "another budget later": len({process.budget for process in self.processes}) > 1,
            "down time counts": any(process.down for process in self.processes),
        }
        yield from (name for name, holds in told.items() if holds)


def setup_of(number: int) -> Setup:
    """The run of this number."""
    rng = draw("run", number)
    optuna = number % 10 == 9
    workers = rng.choice((1, 1, 1, 2, 4, 8))
    budget = DAY if rng.random() < 0.06 else math.exp(rng.uniform(math.log(80.0), math.log(40_000.0)))
    if optuna:  # it takes real time
        workers, budget = min(workers, 4), min(max(budget, 1_200.0), 10_800.0)
    gains = rng.choice(GAINS)
    request = _request(rng, budget, max(gains, default=1))
    names = quantizations(request)
    return Setup(
        number=number,
        mood=list(MOODS)[number % len(MOODS)],
        request=request,
        workers=workers,
        changes=_changes(rng, budget, workers),
        gains=gains,
        rate=rng.choice((100.0, 200.0, 800.0)),
        broken=(rng.choice(names),) if len(names) > 1 and rng.random() < 0.1 else (),
        grace=rng.choice((0.0, 5.0, 30.0)),
        optuna=optuna,
        processes=tuple(_processes(rng, budget)),
    )


def quantizations(request: PlanRequest) -> list[str]:
    """Those that the run may use."""
    return [str(value) for value in Space.parse(request.space).values_of("quantization")]


def _request(rng: random.Random, budget: float, max_gang: int) -> PlanRequest:
    space = Space.parse(rng.choice(list(SPACES.values())))
    rows = int(math.exp(rng.uniform(math.log(60), math.log(50_000))))
    card = rng.choice(CARDS) if rng.random() < 0.15 else None
    return PlanRequest(
        budget_seconds=budget,
        gpu="cpu",
        space=space.to_dict(),
        seed=rng.randrange(1000),
        eta=rng.choice((2, 3, 5)),
        first_rung=rng.choice((None, None, None, 1 / 27, 1 / 9, 1.0)),
        full_share=rng.choice((0.2, 0.4, 0.7)),
        max_epochs=rng.choice((1.0, 4.0)),
        eval_share=0.08,
        batch_size=rng.choice((8, 16)),
        train_tokens=rows * 80,
        train_rows=rows,
        valid_rows=max(1, rows // 10),
        task_examples=rng.choice((0, 32)),
        max_trials=rng.choice((5, 50, 200)),
        limit_bytes=card,
        max_gang=max_gang,
        ranks=space.ranks,
        footprints=NEEDS if card else {},
        longest=LONGEST,
        dropout=0.05,
        max_held=rng.choice((None, None, None, 3)),
    )


def _changes(rng: random.Random, budget: float, workers: int) -> tuple[Change, ...]:
    """Nodes that go and come back in one run of three; all of them in some."""
    if rng.random() > 0.35:
        return ()
    times = sorted(rng.uniform(0.0, budget) * rng.choice((1.0, 1.0, 0.02)) for _ in range(rng.randint(1, 4)))
    return tuple(Change(at, rng.randint(0, workers + 1)) for at in times)


def _processes(rng: random.Random, budget: float) -> Iterator[Process]:
    """One run in four is killed or stopped, once or twice; a process without an end of its own may fail, and
    the run is then resumed once."""
    down = 0.0
    for _ in range(rng.choice((0, 0, 0, 0, 0, 0, 1, 2))):
        if rng.random() < 0.5:
            yield Process(budget, killed_after=int(math.exp(rng.uniform(0.0, math.log(400)))), down=down)
        else:
            yield Process(budget, stopped_at=rng.uniform(0.0, budget), down=down)
        budget *= rng.choice((1.0, 1.0, 0.8, 1.5))
        down = rng.choice((0.0, 0.0, 20.0))
    yield Process(budget, down=down)
    yield Process(budget)


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
