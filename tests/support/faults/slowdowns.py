"""Simulated runs of the real driver on a machine that misbehaves: no deadline is passed, no adapter is lost.

``FaultyWorld`` slows down in the middle of a segment, hangs, does not hear that it is told to stop, diverges,
runs out of memory, loses its worker, and has a slow disk; in calibrations and final scores too. Everything
follows from one seed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from budgetsearch.core.errors import BudgetError, BudgetsearchError
from budgetsearch.core.events import Opened
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.ports import Proposal
from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Job,
    Score,
    Segment,
    SegmentResult,
    Status,
    TrainJob,
)
from budgetsearch.engines.simulator import Result, SimulatorEngine, VirtualClock
from budgetsearch.run.driver import Driver
from budgetsearch.storage.ledger import MemoryLedger
from budgetsearch.tools.simulate.invariants import check
from tests.support.simulation import SPACE, RandomSampler
from tests.support.worlds import SyntheticWorld

MOODS = ("calm", "slow", "throttled", "rough", "hostile")
"""How bad the world is; a run has one. Slow is each job for itself; throttled is the whole machine, from
some moment on for good."""
LEAVE_SECONDS = 0.3
"""Writing the report and ending the process, on a machine that is not throttled."""
FACTORS = (1.0, 1.3, 2.0, 3.0, 5.0, 10.0)
STATUSES: tuple[Status, ...] = ("diverged", "out_of_memory", "crashed")


@dataclass(frozen=True)
class Fault:
    """What becomes of one attempt at one job."""

    slow: float = 1.0
    """From ``since`` on everything takes so many times as long."""
    since: float = 0.0
    """As a share of the job's work."""
    hangs: bool = False
    """At ``since`` it stops for good."""
    deaf: bool = False
    """It does not hear that it is told to stop."""
    status: Status = "ok"

    def seconds(self, work: float) -> float:
        """How long so many seconds of work take."""
        if self.hangs:
            return math.inf
        return work * (self.since + (1.0 - self.since) * self.slow)

    def done(self, seconds: float, work: float) -> float:
        """The share of the work that is done after so many seconds."""
        if work <= 0.0:
            return 1.0
        before = self.since * work
        if seconds <= before:
            return seconds / work
        return min(1.0, self.since + (0.0 if self.hangs else (seconds - before) / self.slow / work))


@dataclass
class FaultyWorld:
    """A synthetic world in which things go wrong; a pure function of its seed and what it is asked."""

    seed: int
    mood: str
    clock: VirtualClock
    inner: SyntheticWorld = field(default_factory=SyntheticWorld)
    faults: Counter[str] = field(default_factory=Counter)
    started: dict[int, float] = field(default_factory=dict)
    throttled_from: float = math.inf
    factor: float = 1.0

    def machine(self) -> float:
        """How many times as long everything takes now."""
        return self.factor if self.clock.now() >= self.throttled_from else 1.0

    def fault(self, job: Job) -> Fault:
        """The same job has the same fault."""
        rng = random.Random(f"{self.seed}/{_name(job)}")
        if self.mood == "calm":
            return Fault()
        if self.mood == "throttled":
            work = max(1e-9, self._planned(job))
            return Fault(
                self.factor, min(1.0, max(0.0, (self.throttled_from - self.started[job.job_id]) / work))
            )
        slow = rng.choice(FACTORS) if rng.random() < 0.5 else 1.0
        if self.mood == "slow":
            return Fault(slow, rng.random())
        bad = {"rough": 0.06, "hostile": 0.25}[self.mood]
        hangs = rng.random() < bad
        deaf = rng.random() < 0.5
        status = rng.choice(STATUSES) if rng.random() < 2 * bad else "ok"
        return Fault(slow, rng.random(), hangs, deaf, status)

    def perform(self, job: Job) -> tuple[tuple[Result, ...], float]:
        """See ``World``."""
        self.started[job.job_id] = self.clock.now()
        fault = self.fault(job)
        self._count(fault)
        results, seconds = self._performed(job, fault)
        work = self._planned(job)
        if fault.status != "ok":
            results = _failed(job, fault.status)
            seconds = fault.seconds(work * fault.since)
        return tuple(_taking(r, seconds / max(1, len(results))) for r in results), seconds

    def interrupt(self, job: Job, share: float) -> tuple[Result, ...] | None:
        """See ``World``; ``share`` is of the time that the job would have taken."""
        fault = self.fault(job)
        if fault.deaf or not isinstance(job, TrainJob):
            return None  # calibrations and scores do not look whether they were told to stop
        passed = self.clock.now() - self.started[job.job_id]
        share = fault.done(passed, self._planned(job))
        if job.segments[0].landing is not None and not fault.hangs:
            share = min(1.0, passed / max(1e-9, self._performed(job, fault)[1]))
        cut = self.inner.interrupt(job, share)
        assert cut is not None
        return tuple(_taking(result, passed / len(cut)) for result in cut)

    def _planned(self, job: Job) -> float:
        """Seconds of the job on a machine without faults, to where it was planned to end."""
        if isinstance(job, TrainJob):
            job = replace(job, segments=tuple(replace(s, landing=None) for s in job.segments))
        return self.inner.perform(job)[1]

    def _performed(self, job: Job, fault: Fault) -> tuple[tuple[Result, ...], float]:
        """What comes of the job, and the seconds that it takes; one that lands itself sees its own pace."""
        if not isinstance(job, TrainJob) or job.segments[0].landing is None:
            results, work = self.inner.perform(job)
            return results, fault.seconds(work)
        began = self.started[job.job_id]

        def pace(segment: Segment, tokens: int, elapsed: float) -> float:
            if self.mood == "throttled":
                return self.factor if began + elapsed >= self.throttled_from else 1.0
            share = (tokens - segment.start_tokens) / max(1, segment.stop_tokens - segment.start_tokens)
            return fault.slow if share >= fault.since else 1.0

        self.inner.pace = pace
        results, work = self.inner.perform(job)
        train = sum(r.seconds.get("train", 0.0) for r in results if isinstance(r, SegmentResult))
        return results, math.inf if fault.hangs else train + (work - train) * fault.slow

    def _count(self, fault: Fault) -> None:
        if fault.slow > 1.0 and fault.since < 1.0:
            self.faults[f"slowed {fault.slow:g} times"] += 1
        if fault.hangs:
            self.faults["hung"] += 1
        if fault.deaf:
            self.faults["deaf"] += 1
        if fault.status != "ok":
            self.faults[fault.status] += 1


def _name(job: Job) -> str:
    if isinstance(job, TrainJob):
        return "/".join(
            f"{s.trial_id}.{s.rung}.{s.start_tokens}.{s.attempt}.{s.micro_batch}" for s in job.segments
        )
    if isinstance(job, CalibrateJob):
        return f"calibrate/{job.quantization}/{job.job_id}"
    return f"score/{job.eval_examples}"


def _failed(job: Job, status: Status) -> tuple[Result, ...]:
    if isinstance(job, TrainJob):
        return tuple(
            SegmentResult(s.trial_id, s.rung, status, s.start_tokens, gang=len(job.segments))
            for s in job.segments
        )
    kind = Calibration if isinstance(job, CalibrateJob) else Score
    return (kind(quantization=job.quantization, status="crashed", detail=status),)


def _taking(result: Result, seconds: float) -> Result:
    """The result with its training stretched to what it really took."""
    if not isinstance(result, SegmentResult) or not math.isfinite(seconds):
        return result
    rest = sum(v for k, v in result.seconds.items() if k != "train")
    return replace(result, seconds={**result.seconds, "train": max(0.0, seconds - rest)})


class UsableSampler(RandomSampler):
    """Uniform configurations of the quantizations that the calibration left."""

    def propose(self, history: History, seed: int, first_number: int, count: int) -> list[Proposal]:
        """See the port."""
        assert history.plan is not None
        usable = sorted(history.plan.reference_rates)
        found = super().propose(history, seed, first_number, count)
        return [
            p
            if p.params["quantization"] in usable
            else replace(p, params={**p.params, "quantization": usable[0]})
            for p in found
        ]


class SlowDisk:
    """An exporter that takes time, more when the world is bad; remembers whose adapter stands."""

    def __init__(self, world: FaultyWorld, seconds: Sequence[float], seed: int) -> None:
        self.world, self.seconds = world, seconds
        self.rng = random.Random(f"disk/{seed}")
        self.stands: str | None = None

    def export(self, history: History, state: TrialState, *, final: bool) -> str:
        """See the port."""
        self._pass(1.0)
        self.stands = state.best_checkpoint
        return "adapter"

    def damage(self, state: TrialState) -> str:
        """See the port."""
        return ""

    def missing(self, names: Iterable[str]) -> dict[str, str]:
        """See the port."""
        return {}

    def sweep(self, history: History) -> None:
        """See the port."""
        self._pass(0.25)

    def _pass(self, share: float) -> None:
        self.world.clock.advance(share * self.rng.choice(self.seconds) * self.world.machine())


@dataclass(frozen=True)
class Outcome:
    """How one run went."""

    seed: int
    mood: str
    budget: float
    state: str
    spent: float
    well: int
    """Segments that finished well."""
    unexported: float = 0.0
    """Share of the winner's training that is not in its adapter and was never measured."""
    faults: Counter[str] = field(default_factory=Counter)
    refused: bool = False


def play(seed: int) -> Outcome:
    """One run; raises where a promise is broken."""
    rng = random.Random(f"run/{seed}")
    mood = rng.choice(MOODS)
    budget = math.exp(rng.uniform(math.log(90.0), math.log(40_000.0)))
    gains = rng.choice(({}, {2: 1.6, 4: 2.5}, {2: 1.9, 4: 3.4, 8: 5.0}))
    clock = VirtualClock(2.0)
    world = FaultyWorld(seed, mood, clock, SyntheticWorld(gains=gains, seed=seed))
    if mood == "throttled":
        world.throttled_from, world.factor = rng.uniform(0.0, budget), rng.choice(FACTORS[1:])
    ledger = MemoryLedger()
    disk = SlowDisk(world, (0.1, 0.5, 1.5) if mood in ("rough", "hostile") else (0.05, 0.1, 0.2), seed)
    driver = Driver(
        ledger=ledger,
        engine=SimulatorEngine(world, clock, rng.choice((1, 1, 1, 2))),
        sampler=UsableSampler(),
        exporter=disk,
        clock=clock,
        request=_request(rng, budget, seed, max(gains, default=1)),
        opened=Opened(budget, {}),
        quantizations=["fp32", "nf4"],
        grace_seconds=rng.choice((0.0, 5.0, 30.0)),
    )
    try:
        history = driver.run()
    except (BudgetError, BudgetsearchError) as error:
        return _refused(seed, mood, budget, driver, clock, error)
    check(ledger.entries, budget, replay=True)
    clock.advance(LEAVE_SECONDS * world.machine())
    assert clock.now() <= budget, f"seed {seed} ({mood}): {clock.now():.1f} s of {budget:.1f}"
    well = sum(result.status == "ok" and result.loss is not None for _, result in history.results)
    assert history.closed is not None
    if well:
        assert history.closed.state == "finished", f"seed {seed}: {history.closed}"
        assert history.incumbent is not None
        assert disk.stands == history.incumbent.best_checkpoint, f"seed {seed}: another adapter stands"
    lost = unexported_share(history)
    return Outcome(seed, mood, budget, history.closed.state, clock.now(), well, lost, world.faults)


def unexported_share(history: History) -> float:
    """Of the winner's seconds of training, those that are neither in its adapter nor were measured and found
    to be no better."""
    best = history.incumbent
    if best is None:
        return 0.0
    known = max(best.best_tokens, best.evaluated_tokens)
    results = [result for segment, result in history.results if segment.trial_id == best.trial_id]
    mine = [(result.tokens, result.seconds.get("train", 0.0)) for result in results]
    whole = sum(seconds for _, seconds in mine)
    return sum(seconds for tokens, seconds in mine if tokens > known) / whole if whole else 0.0


def _refused(
    seed: int, mood: str, budget: float, driver: Driver, clock: VirtualClock, error: BudgetsearchError
) -> Outcome:
    """A run that ended before its search: nothing had finished, and there was time left."""
    history = driver.history
    assert not history.results, f"seed {seed}: {error}"
    assert clock.now() <= budget, f"seed {seed}: refused {clock.now() - budget:.1f} s after its deadline"
    assert mood != "calm" or isinstance(error, BudgetError), f"seed {seed}: {error}"
    return Outcome(seed, mood, budget, "refused", clock.now(), 0, refused=True)


def _request(rng: random.Random, budget: float, seed: int, gang: int) -> PlanRequest:
    rows = int(math.exp(rng.uniform(math.log(60), math.log(50_000))))
    return PlanRequest(
        budget_seconds=budget,
        gpu="cpu",
        space=SPACE,
        seed=seed,
        eta=rng.choice((2, 3, 5)),
        first_rung=rng.choice((None, None, 1 / 27, 1 / 9, 1.0)),
        full_share=rng.choice((0.2, 0.4, 0.7)),
        max_epochs=rng.choice((1.0, 4.0)),
        eval_share=0.08,
        batch_size=8,
        train_tokens=rows * 80,
        train_rows=rows,
        valid_rows=max(1, rows // 10),
        task_examples=rng.choice((0, 32)),
        max_trials=rng.choice((5, 50, 200)),
        max_gang=gang,
    )


def play_all(runs: int, first: int = 0) -> dict[str, Any]:
    """Play so many; the promises as numbers."""
    outcomes: list[Outcome] = []
    broken: list[str] = []
    for seed in range(first, first + runs):
        try:
            outcomes.append(play(seed))
        except (AssertionError, BudgetsearchError) as error:
            broken.append(f"seed {seed}: {type(error).__name__}: {error}"[:600])
        if (seed + 1) % 50 == 0:
            print(f"{seed + 1 - first} of {runs}, {len(broken)} broken", file=sys.stderr, flush=True)
    faults: Counter[str] = sum((o.faults for o in outcomes), Counter())
    ran = [o for o in outcomes if not o.refused]
    return {
        "runs": runs,
        "promises broken": len(broken),
        "broken": broken,
        "refused or unusable at the start": len(outcomes) - len(ran),
        "ended by state": dict(Counter(o.state for o in ran)),
        "runs in which a segment finished well": sum(bool(o.well) for o in ran),
        "by mood": dict(Counter(o.mood for o in outcomes)),
        "faults": dict(faults.most_common()),
        "trained and not exported, share of the winner's training": {
            "median": round(statistics.median(o.unexported for o in ran), 4) if ran else 0.0,
            "over 15%": sum(o.unexported > 0.15 for o in ran),
            "largest": sorted(((round(o.unexported, 3), o.mood, o.seed) for o in ran), reverse=True)[:8],
        },
        "least slack in s": round(min((o.budget - o.spent for o in ran), default=math.inf), 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args(arguments)
    print(json.dumps(play_all(given.runs, given.first), indent=1))


if __name__ == "__main__":
    main()


__all__ = ["FaultyWorld", "Outcome", "Segment", "play", "play_all"]
