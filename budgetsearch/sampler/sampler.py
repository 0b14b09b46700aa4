"""The sampler behind the port: the default first, then a spread-out start, then a Gaussian process.

It is a pure function of its arguments. Every trial number gets random numbers of its own, seeded by the
run's seed and the number, so that a resumed run proposes what the uninterrupted one would have.

The Gaussian process learns from every loss at every rung (``study.surrogate``); one proposal in ten
ignores it and comes from the prior. That keeps a model that short rungs mislead from spending the whole
budget in the wrong corner, and it is how the prior stays in play as evidence grows.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from budgetsearch.core.history.history import History
from budgetsearch.core.history.outcomes import is_infeasible
from budgetsearch.core.policy.jobs import new_trial
from budgetsearch.core.ports import Proposal
from budgetsearch.core.records import Params
from budgetsearch.core.resources.memory import problem
from budgetsearch.core.space.dimensions import Choice, Number
from budgetsearch.core.space.space import Space
from budgetsearch.sampler.cube import Suggestions, cube_of, from_point, parameters, suggest, to_row
from budgetsearch.sampler.surrogate import Array, Observations, as_array, fidelity

BLOCK = 6
"""Rows of one latin hypercube: so few trials already show every quantization and several ranks."""
STARTUP = 8
"""Trials before the model takes over."""
MIN_RESULTS = 4
"""With fewer losses the model would say nothing."""
EXPLORE = 10
"""One trial in so many comes from the prior."""
HOPELESS, HOPEFUL = 0.1, 0.2
"""A rung at which a configuration's chance to be promoted is smaller than the first is left out, if that to
end best is no smaller than the second."""
GROUPS = 3
"""So many groups of ``eta`` must be known at a rung before anybody leaves it out."""
REFIT = 1.2
"""The model's parameters are fitted anew when the observations have grown by this factor."""
RANDOM_ATTEMPTS = 1000


class Points:
    """Configurations as points of a space's cube, each computed once: saves time, changes no proposal."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._rows: dict[tuple[Any, ...], list[float]] = {}

    def of(self, params: Params) -> list[float]:
        """The point of a configuration; not to be written into."""
        key = _key(params)
        if key not in self._rows:
            self._rows[key] = to_row(self.space, params)
        return self._rows[key]


class OptunaSampler:
    """Proposes configurations; implements the port ``Sampler``."""

    def __init__(self) -> None:
        # Fitted parameters by what they were fitted to: saves time, changes no proposal.
        self._fitted: dict[bytes, Array] = {}
        self._points: Points | None = None

    def propose(self, history: History, seed: int, first_number: int, count: int) -> list[Proposal]:
        """``count`` configurations for the trials ``first_number`` and following.

        None of them repeats another or one in the history, as long as the space has a new one.
        """
        assert history.plan is not None, "configurations are proposed after planning"
        space = Space.parse(history.plan.space)
        if self._points is None or self._points.space != space:
            self._points = Points(space)
        view = _View(history, seed, self._points, self._fitted)
        taken = {_key(state.trial.params) for state in history.trials.values()}
        found: list[Proposal] = []
        for number in range(first_number, first_number + count):
            proposal = _first_new(view.suggestions(number), taken, view.fits)
            taken.add(_key(proposal.params))
            found.append(proposal)
        return found


@dataclass(frozen=True)
class _View:
    """What one call of ``propose`` looks at."""

    history: History
    seed: int
    points: Points
    fitted: dict[bytes, Array]

    @property
    def space(self) -> Space:
        return self.points.space

    def suggestions(self, number: int) -> Iterator[Proposal]:
        """What trial ``number`` may be, the preferred first."""
        if number == 0:
            yield Proposal(self.space.default(), "prior")
        elif number <= STARTUP or not self.space.searched:
            yield Proposal(stratified(self.space, self.seed, number), "stratified")
        elif random.Random(mixed(self.seed, "explore", number)).randrange(EXPLORE):
            yield from self._modelled(number)
        chance = random.Random(mixed(self.seed, "chance", number))
        for _ in range(RANDOM_ATTEMPTS):
            unit = {name: chance.random() for name in self.space.searched}
            yield Proposal(self.space.from_unit(unit), "prior")

    def fits(self, params: Params) -> bool:
        """Whether nothing is known that keeps a configuration from fitting into memory."""
        assert self.history.plan is not None
        return problem(self.history.plan, self.history.refused, params) is None

    def waiting(self) -> list[Params]:
        """Configurations without any result yet: a gang is proposed one after the other."""
        told = {segment.trial_id for segment, result in self.history.results if result.loss is not None}
        states = self.history.trials.values()
        return [s.trial.params for s in states if s.trial_id not in told and not s.dead]

    def _modelled(self, number: int) -> Iterator[Proposal]:
        seen = observations(self.history, self.points)
        if len(seen.y) < MIN_RESULTS:
            yield Proposal(stratified(self.space, self.seed, number), "stratified")
            return
        cube = cube_of(self.space)
        early = seen.first(_milestone(len(seen.y)))
        key = early.x.tobytes() + early.s.tobytes() + early.y.tobytes()
        if key not in self.fitted:
            self.fitted[key] = parameters(cube, early)
        rng = np.random.default_rng(mixed(self.seed, "model", number))
        waiting = as_array([self.points.of(p) for p in self.waiting()]).reshape(-1, seen.x.shape[1])
        found = suggest(cube, seen, self.fitted[key], rng, waiting)
        for point in found.points:
            proposal = Proposal(from_point(self.space, point), "model")
            yield replace(proposal, entry=self._entry(proposal, cube.features(point[None, :]), found))

    def _entry(self, proposal: Proposal, x: Array, found: Suggestions) -> int:
        """The lowest rung at which a promotion may be hoped for: a slow learner that may well end best would
        else be tried again and again below, and its like never get on."""
        plan, surrogate = self.history.plan, found.surrogate
        assert plan is not None
        if not plan.scouts or surrogate.chance(x, 1.0, found.best) < HOPEFUL:
            return 0  # without the time for scouts there is none for this either
        tokens = new_trial(plan, 0, proposal, self.history.measured).rung_tokens
        for rung in range(plan.top_rung - 1):
            known = self.history.ranks.get(rung, [])
            if len(known) < GROUPS * plan.eta:
                return rung
            worst_promoted, _ = known[len(known) // plan.eta - 1]
            enough, s = surrogate.score(worst_promoted), fidelity(tokens[rung] / tokens[-1])
            if surrogate.chance(x, s, enough) >= HOPELESS:
                return rung
        return max(0, plan.top_rung - 1)


def _milestone(count: int) -> int:
    """The last of a growing sequence of sizes: the same for every history that begins alike."""
    size = MIN_RESULTS
    while math.ceil(size * REFIT) <= count:
        size = math.ceil(size * REFIT)
    return size


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


# ----------------------------------------------------------------------- the model


def observations(history: History, points: Points) -> Observations:
    """Every loss in the order of the ledger.

    What diverged, and what fits at no micro-batch, counts as the worst loss seen: both are to be avoided.
    """
    plan = history.plan
    assert plan is not None
    rows: list[list[float]] = []
    lengths: list[float] = []
    losses: list[float | None] = []
    for segment, result in history.results:
        bad = result.status == "diverged" or is_infeasible(segment, result)
        if result.loss is None and not bad:
            continue
        trial = history.trials[segment.trial_id].trial
        tokens = result.tokens if result.loss is not None else segment.stop_tokens
        share = min(1.0, tokens / trial.rung_tokens[plan.top_rung])
        rows.append(points.of(trial.params))
        lengths.append(fidelity(share))
        losses.append(result.loss)
    worst = max((loss for loss in losses if loss is not None), default=0.0)
    values = [worst if loss is None else loss for loss in losses]
    width = max(1, len(points.space.searched))
    return Observations(as_array(rows).reshape(-1, width), as_array(lengths), as_array(values))


# ------------------------------------------------------------------------- duplicates


def _first_new(
    suggestions: Iterator[Proposal], taken: set[tuple[Any, ...]], fits: Callable[[Params], bool]
) -> Proposal:
    """The first suggestion that is not taken and fits into memory, else the first that fits, else the very
    first: memory is a constraint that the model need not learn."""
    preferred = next(suggestions)
    if fits(preferred.params) and _key(preferred.params) not in taken:
        return preferred
    for proposal in suggestions:
        able = fits(proposal.params)
        if able and _key(proposal.params) not in taken:
            return proposal
        if able and not fits(preferred.params):
            preferred = proposal
    return preferred


def _key(params: Params) -> tuple[Any, ...]:
    return tuple(sorted(params.items()))
