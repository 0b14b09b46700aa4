"""Textbook schedulers that pause and resume, which no package offers with one worker and a fixed budget.

Promotion ASHA (Li et al. 2020, arXiv 1810.05934), Hyperband (Li et al. 2018, arXiv 1603.06560) and
successive halving sized to what is left of the budget, each with random configurations or with Optuna's
TPE, which learns of every paused trial at the highest rung that it has reached.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.policy.peers import ETA, Clockwork, Peer, Run, rungs_of
from budgetsearch.core.records import Params
from budgetsearch.core.space.space import Space


class Source(Protocol):
    """Where configurations come from."""

    def ask(self) -> Params:
        """A new configuration."""
        ...

    def tell(self, params: Params, values: dict[int, float]) -> None:
        """The values of a configuration at the rungs that it has reached."""
        ...


class Chance:
    """Uniform configurations."""

    def __init__(self, clock: Clockwork, seed: int) -> None:
        self._space, self._rng = Space.parse(clock.curves.space), random.Random(seed)

    def ask(self) -> Params:
        """See ``Source``."""
        return self._space.from_unit({name: self._rng.random() for name in self._space.searched})

    def tell(self, params: Params, values: dict[int, float]) -> None:
        """Nothing is learned."""


class Tpe:
    """Optuna's TPE on a study that is rebuilt from what is known: a paused trial is a pruned one."""

    def __init__(self, clock: Clockwork, seed: int) -> None:
        import optuna

        from budgetsearch.views.study.distributions import shown

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        space = Space.parse(clock.curves.space)
        self._distributions = shown(space, space.default())
        self._sampler = optuna.samplers.TPESampler(seed=seed)
        self._known: dict[str, Any] = {}

    def ask(self) -> Params:
        """See ``Source``."""
        import optuna

        study = optuna.create_study(sampler=self._sampler)
        study.add_trials(list(self._known.values()))
        return dict(study.ask(self._distributions).params)

    def tell(self, params: Params, values: dict[int, float]) -> None:
        """See ``Source``."""
        import optuna

        self._known[repr(params)] = optuna.trial.create_trial(
            state=optuna.trial.TrialState.PRUNED,
            params=dict(params),
            distributions=self._distributions,
            intermediate_values=values,
        )


@dataclass
class Contender:
    """A trial that may be paused."""

    run: Run
    params: Params
    values: dict[int, float] = field(default_factory=dict)
    over: bool = False


class Field:
    """All trials of one search, and the source that learns from them."""

    def __init__(self, clock: Clockwork, source: Source) -> None:
        self.clock, self.source = clock, source
        self.rungs = rungs_of(clock.curves.points)

    def enter(self, rung: int) -> Contender:
        """A new configuration, trained to a rung.

        Raises:
            OutOfBudget: the deadline came first, or every configuration is in use.
        """
        params = self.source.ask()
        contender = Contender(self.clock.start(params), params)
        self.advance(contender, rung)
        return contender

    def advance(self, contender: Contender, rung: int) -> None:
        """Train on to a rung; a run that is over stands for all higher ones."""
        value, contender.over, _ = contender.run.advance(self.rungs[rung])
        contender.values[self.rungs[rung]] = value
        self.source.tell(contender.params, contender.values)


def _asha(field_: Field) -> None:
    """Promotion ASHA: the best third of any rung goes on as soon as it is known, highest rungs first."""
    top = len(field_.rungs) - 1
    at: list[list[Contender]] = [[] for _ in field_.rungs]
    promoted: list[set[int]] = [set() for _ in field_.rungs]

    def record(contender: Contender, rung: int) -> None:
        at[rung].append(contender)
        if contender.over:
            for higher in range(rung + 1, top + 1):
                promoted[higher - 1].add(id(contender))
                contender.values[field_.rungs[higher]] = contender.values[field_.rungs[rung]]
                at[higher].append(contender)

    def promotion() -> tuple[Contender, int] | None:
        for rung in range(top - 1, -1, -1):
            seen = field_.rungs[rung]
            ranked = sorted(at[rung], key=lambda c: c.values[seen])
            for contender in ranked[: len(ranked) // ETA]:
                if id(contender) not in promoted[rung]:
                    promoted[rung].add(id(contender))
                    return contender, rung + 1
        return None

    while True:
        found = promotion()
        contender, rung = found or (field_.enter(0), 0)
        if found:
            field_.advance(contender, rung)
        record(contender, rung)


def _bracket(field_: Field, count: int, first: int) -> None:
    """Synchronous halving of so many new trials from one rung to the top."""
    living = [field_.enter(first) for _ in range(count)]
    for rung in range(first + 1, len(field_.rungs)):
        ranked = sorted(living, key=lambda c: min(c.values.items(), key=lambda kv: -kv[0])[1])
        living = ranked[: max(1, len(ranked) // ETA)]
        for contender in living:
            field_.advance(contender, rung)


def _hyperband(field_: Field) -> None:
    """Brackets of falling width, over and over."""
    levels = len(field_.rungs)
    while True:
        for depth in range(levels - 1, -1, -1):
            _bracket(field_, math.ceil(levels / (depth + 1) * ETA**depth), levels - 1 - depth)


def _sized(field_: Field) -> None:
    """Halving with as many trials as the rest of the budget holds at the mean cost of a point."""
    clock = field_.clock
    while True:
        left, count = clock.deadline - clock.now, 1
        while _cost(field_.rungs, count + 1) * clock.curves.point_cost <= left:
            count += 1
        _bracket(field_, min(count, clock.curves.count), 0)


def _cost(rungs: Sequence[int], count: int) -> float:
    """Points that a bracket of ``count`` trials trains."""
    total, before = 0.0, 0
    for rung in rungs:
        total += count * (rung - before)
        before, count = rung, max(1, count // ETA)
    return total


def _peer(schedule: Callable[[Field], None], source: type[Chance] | type[Tpe]) -> Peer:
    def play(clock: Clockwork, seed: int) -> None:
        schedule(Field(clock, source(clock, seed)))

    return play


BASELINES: dict[str, Peer] = {
    "asha-random": _peer(_asha, Chance),
    "asha-tpe": _peer(_asha, Tpe),
    "hyperband-random": _peer(_hyperband, Chance),
    "halving-random": _peer(_sized, Chance),
    "halving-tpe": _peer(_sized, Tpe),
}
"""By the names that ``run.py --methods`` takes."""
SIZED = ("halving-random", "halving-tpe")
"""These know the deadline, and are played for each budget."""
