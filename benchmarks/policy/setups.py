"""What a simulated run of the real driver follows from: budget, workers, gangs, mishaps, kills.

``setup_of`` draws all of it from a number. A calm world is among them, and some runs have the real sampler.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from budgetsearch.core.footprint import Footprint
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.space.space import Space
from tests.support.worlds import Change

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
