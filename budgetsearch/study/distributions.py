"""A search space in Optuna's terms: once for people to look at, once for the sampler to search.

People see the values themselves. The sampler searches positions between 0 and 1 on the priors'
quantiles, so that its own uniform prior is the prior of the space, and so that ordered choices keep
their order; only choices without an order stay categories.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from budgetsearch.core.dimensions import Choice, Number
from budgetsearch.core.records import Params, ParamValue
from budgetsearch.core.space import Space


def shown(space: Space, params: Params) -> dict[str, Any]:
    """Distributions of the searched dimensions that count in ``params``, in the values' own units."""
    return {
        dimension.name: _shown(dimension)
        for dimension in space.dimensions
        if isinstance(dimension, (Number, Choice)) and dimension.searched and dimension.name in params
    }


def _shown(dimension: Number | Choice) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    if dimension.integer:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def searched(space: Space) -> dict[str, Any]:
    """Distributions of what the sampler searches: positions, and categories without an order."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    categories = _categories(space)
    return {
        name: CategoricalDistribution(categories[name].values)
        if name in categories
        else FloatDistribution(0.0, 1.0)
        for name in space.searched
    }


def to_searched(space: Space, params: Params) -> dict[str, ParamValue]:
    """A configuration as the sampler sees it."""
    categories = _categories(space)
    unit = space.to_unit(params)
    return {name: params[name] if name in categories else position for name, position in unit.items()}


def from_searched(space: Space, point: Mapping[str, Any]) -> Params:
    """The configuration at a point that the sampler found."""
    categories = _categories(space)
    unit = {
        name: categories[name].position_of(value) if name in categories else value
        for name, value in point.items()
    }
    return space.from_unit(unit)


def _categories(space: Space) -> dict[str, Choice]:
    return {d.name: d for d in space.dimensions if isinstance(d, Choice) and d.searched and not d.ordered}


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, Optuna tells neither of new studies nor of experimental features."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
