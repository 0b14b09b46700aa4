"""The product's model as an Optuna sampler, for any study whose trials report intermediate values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from budgetsearch.sampler.cube import Cube, parameters, suggest
from budgetsearch.sampler.sampler import EXPLORE, REFIT, STARTUP
from budgetsearch.sampler.surrogate import Array, Observations, as_array, fidelity


class FidelityGPSampler(BaseSampler):  # type: ignore[misc]
    """Suggests by a Gaussian process over configuration and step, from complete and pruned trials alike.

    A trial counts at every step that it reported, so pruned trials teach as much as they have shown. It
    takes single-objective studies; conditional parameters are sampled independently.
    """

    def __init__(self, max_resource: int | None = None, seed: int | None = None) -> None:
        """``max_resource``: the step of a complete trial; by default the largest one reported so far."""
        self._max_resource = max_resource
        self._rng = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)
        self._space = IntersectionSearchSpace(include_pruned=True)
        self._fitted: tuple[int, int, Array] | None = None

    def reseed_rng(self) -> None:
        """New random numbers, for processes that share a study."""
        self._rng = np.random.default_rng()
        self._independent.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that all trials had."""
        found = self._space.calculate(study)
        return {name: d for name, d in found.items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A point of highest expected improvement at the full length; empty while chance decides.

        Raises:
            ValueError: the study has several objectives.
        """
        if len(study.directions) > 1:
            raise ValueError("FidelityGPSampler takes studies of one objective.")
        if not search_space or self._rng.integers(EXPLORE) == 0:
            return {}
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        seen = self._observations(ended, search_space, study.direction)
        if len(ended) < STARTUP or len(seen.y) < STARTUP:
            return {}
        categories = [
            len(d.choices) if isinstance(d, CategoricalDistribution) else None for d in search_space.values()
        ]
        cube = Cube(tuple(categories))
        point = suggest(cube, seen, self._parameters(cube, seen), self._rng).points[0]
        return {name: _value(d, float(x)) for (name, d), x in zip(search_space.items(), point, strict=True)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Uniformly."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _parameters(self, cube: Cube, seen: Observations) -> Array:
        count, width = seen.x.shape
        known = self._fitted
        if known is None or known[1] != width or count >= known[0] * REFIT:
            known = self._fitted = (count, width, parameters(cube, seen))
        return known[2]

    def _observations(
        self,
        trials: Sequence[FrozenTrial],
        space: Mapping[str, BaseDistribution],
        direction: StudyDirection,
    ) -> Observations:
        steps = [step for trial in trials for step in trial.intermediate_values]
        longest = self._max_resource or max(steps, default=1)
        rows, lengths, values = [], [], []
        for trial in trials:
            reported = dict(trial.intermediate_values)
            if trial.state == TrialState.COMPLETE and trial.value is not None:
                reported[longest] = trial.value
            point = [_position(d, trial.params[name]) for name, d in space.items()]
            for step, value in sorted(reported.items()):
                if math.isfinite(value):
                    rows.append(point)
                    lengths.append(fidelity(min(1.0, max(1, step) / max(1, longest))))
                    values.append(-value if direction == StudyDirection.MAXIMIZE else value)
        return Observations(as_array(rows).reshape(-1, len(space)), as_array(lengths), as_array(values))


def _position(distribution: BaseDistribution, value: Any) -> float:
    """Where a value stands between 0 and 1; of a category its index."""
    if isinstance(distribution, CategoricalDistribution):
        return float(distribution.choices.index(value))
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    scale = math.log if distribution.log else float
    low, high = scale(distribution.low), scale(distribution.high)
    return (scale(value) - low) / (high - low)


def _value(distribution: BaseDistribution, position: float) -> Any:
    """The inverse of ``_position``, rounded to what the distribution holds."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(position)]
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    scale = math.log if distribution.log else float
    low, high = scale(distribution.low), scale(distribution.high)
    scaled = low + position * (high - low)
    value = math.exp(scaled) if distribution.log else scaled
    if distribution.step:
        steps = round((value - distribution.low) / distribution.step)
        value = distribution.low + steps * distribution.step
    value = min(max(value, distribution.low), distribution.high)
    return int(value) if isinstance(distribution, IntDistribution) else value
