"""A search space in Optuna's terms: once for people to look at, once for the sampler to search.

People see the values themselves. The sampler searches positions between 0 and 1 on the priors'
quantiles, so that a uniform draw is a draw from the space's prior, and so that ordered choices keep
their order; only choices without an order stay categories.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from budgetsearch.core.records import Params
from budgetsearch.core.space.dimensions import Choice, Number
from budgetsearch.core.space.space import Space


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


_QUIET = threading.Lock()
_BEFORE: list[tuple[int, warnings.catch_warnings[None]]] = []
"""What ``quiet`` found, once for every thread that is inside: the first one out must not undo it."""


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, Optuna tells neither of new studies nor of experimental features, in any thread."""
    import optuna

    with _QUIET:
        _BEFORE.append(_BEFORE[0] if _BEFORE else _hushed())
    try:
        yield
    finally:
        with _QUIET:
            verbosity, caught = _BEFORE.pop()
            if not _BEFORE:
                caught.__exit__(None, None, None)
                optuna.logging.set_verbosity(verbosity)


def _hushed() -> tuple[int, warnings.catch_warnings[None]]:
    import optuna

    before, caught = optuna.logging.get_verbosity(), warnings.catch_warnings()
    caught.__enter__()
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return before, caught
