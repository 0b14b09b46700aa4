"""The clock of all peers, and on it the schedulers that users would pick otherwise: Optuna's.

Optuna's pruners stop trials and never resume them: that is how they are meant to be used, and how they
are played here. All act at the rungs of a ladder that starts at 1/27 of the longest run (the median
pruner at every point), and may start trials until the deadline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from budgetsearch.core.records import Params
from budgetsearch.core.space.space import Space
from budgetsearch.tools.simulate.curves import Curves
from budgetsearch.tools.simulate.world import Trace

ETA = 3
SMALLEST = 27
"""The first rung is one part in so many of the longest run."""


class OutOfBudget(Exception):
    """The deadline was reached, or there is nothing left to run."""


@dataclass
class Clockwork:
    """One worker that reads curves until its deadline."""

    curves: Curves
    deadline: float
    trace: Trace = field(default_factory=Trace)
    now: float = 0.0

    def __post_init__(self) -> None:
        self._taken: set[int] = set()

    def start(self, params: Params) -> Run:
        """A run at its beginning, of the nearest configuration that is free."""
        if not self.curves.left(self._taken):
            raise OutOfBudget
        found, number = self.curves.nearest(params, self._taken)
        self._taken.add(number)
        seconds, values = self.curves.curve(found)
        return Run(self, [float(t) for t in seconds], [float(v) for v in values])


@dataclass
class Run:
    """One configuration under way."""

    clock: Clockwork
    seconds: list[float]
    values: list[float]
    at: int = 0
    """Points that were read."""

    def advance(self, point: int) -> tuple[float, bool, bool]:
        """Go on to ``point`` or the run's end: (value, whether it is over, whether it diverged).

        Raises:
            OutOfBudget: the deadline came first.
        """
        for k in range(self.at, min(point, len(self.values))):
            then = self.clock.now + self.seconds[k] - (self.seconds[k - 1] if k else 0.0)
            if then > self.clock.deadline:
                self.clock.now = self.clock.deadline
                raise OutOfBudget
            self.clock.now, self.at = then, k + 1
            if not math.isfinite(self.values[k]):
                self.values = self.values[: k + 1]
                break
            self.clock.trace.moments.append((then, self.values[k]))
        return self.value, self.at >= len(self.values), self.diverged

    @property
    def diverged(self) -> bool:
        """Whether it has come to a value that is not finite."""
        return self.at > 0 and not math.isfinite(self.values[self.at - 1])

    @property
    def value(self) -> float:
        """The last value; a diverged run has the worst."""
        return self.clock.curves.worst if self.diverged or not self.at else self.values[self.at - 1]


Peer = Callable[[Clockwork, int], None]
"""Runs what it likes, with a seed, until the clock raises ``OutOfBudget``."""


def rungs_of(points: int) -> list[int]:
    """The ladder of the peers, in points."""
    rungs, point = [], max(1, round(points / SMALLEST))
    while point < points / 1.5:
        rungs.append(point)
        point *= ETA
    return [*rungs, points]


def _optuna(make_pruner: Callable[[Any, list[int], int], Any], *, every_point: bool = False) -> Peer:
    def peer(clock: Clockwork, seed: int) -> None:
        import optuna

        from budgetsearch.views.study.distributions import quiet, shown

        points = clock.curves.points
        rungs = rungs_of(points)
        space = Space.parse(clock.curves.space)
        distributions = shown(space, space.default())
        with quiet():
            study = optuna.create_study(
                direction="minimize",
                sampler=optuna.samplers.TPESampler(seed=seed),
                pruner=make_pruner(optuna.pruners, rungs, points),
            )
            while True:
                _one(study, distributions, clock, range(1, points + 1) if every_point else rungs)

    return peer


def _one(study: Any, distributions: dict[str, Any], clock: Clockwork, steps: Any) -> None:
    """One trial of an Optuna study, up to its pruning or its end."""
    from optuna.trial import TrialState

    trial = study.ask(distributions)
    run = clock.start(trial.params)
    value = clock.curves.worst
    for step in steps:
        value, over, diverged = run.advance(step)
        trial.report(value, step)
        if diverged or (not over and trial.should_prune()):
            study.tell(trial, state=TrialState.PRUNED)
            return
        if over:
            break
    study.tell(trial, value)


PEERS: dict[str, Peer] = {
    "optuna-sha": _optuna(
        lambda pruners, rungs, points: pruners.SuccessiveHalvingPruner(
            min_resource=rungs[0], reduction_factor=ETA
        )
    ),
    "optuna-hyperband": _optuna(
        lambda pruners, rungs, points: pruners.HyperbandPruner(
            min_resource=rungs[0], max_resource=points, reduction_factor=ETA
        )
    ),
    "optuna-median": _optuna(lambda pruners, rungs, points: pruners.MedianPruner(), every_point=True),
    "optuna-tpe": _optuna(lambda pruners, rungs, points: pruners.NopPruner()),
}
"""By the names that ``run.py --methods`` takes."""


def play_peer(peer: Peer, curves: Curves, multiple: float, seed: int) -> Trace:
    """What a peer sees within ``multiple`` mean full runs."""
    clock = Clockwork(curves, multiple * curves.mean_cost)
    try:
        peer(clock, seed)
    except OutOfBudget:
        pass
    return clock.trace
