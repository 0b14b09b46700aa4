"""The sampler behind the port: the default first, then a spread-out start, then TPE.

It is a pure function of its arguments. Every trial number gets samplers of its own, seeded by the
run's seed and the number, so that a resumed run proposes what the uninterrupted one would have.
Optuna only samples here: it sees a shadow study in memory, which holds what is known of each
configuration at one rung; that configurations pause, go on and are dropped is no business of its.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from budgetsearch.core.dimensions import Choice, Number
from budgetsearch.core.history import History, TrialState
from budgetsearch.core.ports import Proposal
from budgetsearch.core.records import Params
from budgetsearch.core.space import Space
from budgetsearch.study.distributions import from_searched, quiet, searched, to_searched

BLOCK = 6
"""Rows of one latin hypercube: so few trials already show every quantization and several ranks."""
MIN_STARTUP = 8
"""Trials before TPE takes over, or twice the searched dimensions if that is more."""
MIN_RESULTS = 4
"""A rung with fewer results, or fewer than the dimensions and one, says too little to TPE."""
TPE_ATTEMPTS = 8
"""How often TPE may suggest something that exists already before chance takes its place."""
RANDOM_ATTEMPTS = 1000


class OptunaSampler:
    """Proposes configurations; implements the port ``Sampler``."""

    def propose(self, history: History, seed: int, first_number: int, count: int) -> list[Proposal]:
        """``count`` configurations for the trials ``first_number`` and following.

        None of them repeats another or one in the history, as long as the space has a new one.
        """
        view = _View.of(history, seed)
        taken = {_key(state.trial.params) for state in history.trials.values()}
        found: list[Proposal] = []
        for number in range(first_number, first_number + count):
            proposal = _first_new(view.suggestions(number), taken)
            taken.add(_key(proposal.params))
            found.append(proposal)
        return found


@dataclass(frozen=True)
class _View:
    """What one call of ``propose`` looks at."""

    history: History
    seed: int
    space: Space

    @classmethod
    def of(cls, history: History, seed: int) -> _View:
        plan = history.plan
        assert plan is not None, "configurations are proposed after planning"
        return cls(history, seed, Space.parse(plan.space))

    @property
    def startup(self) -> int:
        return max(MIN_STARTUP, 2 * len(self.space.searched))

    def suggestions(self, number: int) -> Iterator[Proposal]:
        """What trial ``number`` may be, the preferred first."""
        if number == 0:
            yield Proposal(self.space.default(), "prior")
        elif number <= self.startup or not (known := shadow_trials(self.history, self.space)):
            yield Proposal(stratified(self.space, self.seed, number), "stratified")
        else:
            for attempt in range(TPE_ATTEMPTS):
                params = _tpe(self.space, known, mixed(self.seed, "tpe", number, attempt))
                yield Proposal(params, "tpe")
        chance = random.Random(mixed(self.seed, "chance", number))
        for _ in range(RANDOM_ATTEMPTS):
            unit = {name: chance.random() for name in self.space.searched}
            yield Proposal(self.space.from_unit(unit), "prior")


def mixed(*parts: object) -> int:
    """A 32-bit seed from everything that it depends on, the same on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


# ------------------------------------------------------------------------ stratified


def stratified(space: Space, seed: int, number: int) -> Params:
    """The configuration of startup trial ``number`` (1 and up): a row of its block's hypercube."""
    block, row = divmod(number - 1, BLOCK)
    unit: dict[str, float] = {}
    for dimension in space.dimensions:
        if isinstance(dimension, (Number, Choice)) and dimension.searched:
            rng = random.Random(mixed(seed, "block", block, dimension.name))
            column = _column(dimension, rng)
            unit[dimension.name] = rng.sample(column, BLOCK)[row]
    return space.from_unit(unit)


def _column(dimension: Number | Choice, rng: random.Random) -> list[float]:
    """One position in each sixth of the prior; of a short choice every value at least once."""
    if isinstance(dimension, Number):
        return [(k + rng.random()) / BLOCK for k in range(BLOCK)]
    if len(dimension.values) > BLOCK:
        shift = rng.random()
        return [(k + shift) / BLOCK for k in range(BLOCK)]
    column = [dimension.value_at((k + 0.5) / BLOCK) for k in range(BLOCK)]
    for value in dimension.values:
        if value not in column:
            column[column.index(max(column, key=column.count))] = value
    return [dimension.position_of(value) for value in column]


# ------------------------------------------------------------------------------- TPE


def shadow_trials(history: History, space: Space) -> list[Any]:
    """Every configuration with what is known of it at the highest useful rung, as Optuna trials.

    Diverged ones count as worse than the worst; those that fit in no memory as infeasible. Empty
    while no rung has enough results.
    """
    rung = useful_rung(history, len(space.searched))
    if rung is None:
        return []
    losses = [state.losses[rung] for state in history.at_rung(rung)]
    bad = max(losses) + max(1.0, max(losses) - min(losses))
    trials = []
    for state in sorted(history.trials.values(), key=lambda state: state.trial_id):
        value = _value(state, rung, bad)
        if value is not None:
            trials.append(_shadow(space, state, value))
    return trials


def useful_rung(history: History, dimensions: int) -> int | None:
    """The highest rung with enough results for TPE, or None."""
    assert history.plan is not None
    enough = max(MIN_RESULTS, dimensions + 1)
    rungs = range(history.plan.top_rung, -1, -1)
    return next((rung for rung in rungs if len(history.at_rung(rung)) >= enough), None)


def _value(state: TrialState, rung: int, bad: float) -> float | None:
    if state.dead in ("diverged", "infeasible"):
        return bad
    return state.losses.get(rung)


def _shadow(space: Space, state: TrialState, value: float) -> Any:
    from optuna.trial import create_trial

    params = to_searched(space, state.trial.params)
    known = searched(space)
    return create_trial(
        value=value,
        params=params,
        distributions={name: known[name] for name in params},
        constraints={"memory": 1.0 if state.dead == "infeasible" else 0.0},
    )


def _tpe(space: Space, trials: Sequence[Any], seed: int) -> Params:
    import optuna

    conditional = any(dimension.when for dimension in space.dimensions)
    with quiet():
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=1, multivariate=True, group=conditional, constant_liar=False
        )
        study = optuna.create_study(direction="minimize", sampler=sampler)
        study.add_trials(trials)
        point = study.ask(fixed_distributions=searched(space)).params
    return from_searched(space, point)


# ------------------------------------------------------------------------- duplicates


def _first_new(suggestions: Iterator[Proposal], taken: set[tuple[Any, ...]]) -> Proposal:
    """The first suggestion that is not taken; the very first if all are."""
    preferred = next(suggestions)
    if _key(preferred.params) not in taken:
        return preferred
    return next((s for s in suggestions if _key(s.params) not in taken), preferred)


def _key(params: Params) -> tuple[Any, ...]:
    return tuple(sorted(params.items()))
