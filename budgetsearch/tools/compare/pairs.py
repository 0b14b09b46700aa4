"""Two on the same examples: their difference, its interval, and whether chance explains it.

Examples are resampled, not runs: what comes out says how much of a difference is due to the choice of
validation examples. It says nothing of what another seed would have given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from budgetsearch.views.intervals import BATCH, RESAMPLES, SEED, Estimate, bootstrapped, holm

ALPHA = 0.05
"""Below this, after Holm's correction, two are told apart."""

Values = Sequence[float]


@dataclass(frozen=True)
class Pair:
    """Two that were measured on the same examples."""

    first: str
    second: str
    difference: float
    """Mean of first minus second."""
    low: float | None
    high: float | None
    p: float
    """Two-sided, by flipping the signs of the differences; 1 where nothing differs."""
    adjusted_p: float
    """... by Holm's correction for all pairs of the same measure."""

    @property
    def told_apart(self) -> bool:
        """Whether the difference is more than the choice of examples explains."""
        return self.adjusted_p < ALPHA


def bootstrapped_difference(first: Values, second: Values, weights: Values) -> Estimate:
    """The weighted mean of first minus second, with a bootstrap's interval."""
    return bootstrapped([a - b for a, b in zip(first, second, strict=True)], weights)


def pairs_of(
    values: Mapping[str, Values],
    weights: Values,
    difference: Callable[[Values, Values, Values], Estimate] = bootstrapped_difference,
    baseline: str | None = None,
) -> list[Pair]:
    """Every pair, or each one against ``baseline``, with p-values corrected for their number.

    ``difference``: of the means of first and second, with these weights.
    """
    if baseline is None:
        names = list(itertools.combinations(values, 2))
    else:
        names = [(name, baseline) for name in values if name != baseline]
    p_values = [_sign_flips(values[one], values[other], weights) for one, other in names]
    pairs = []
    for (one, other), p, adjusted in zip(names, p_values, holm(p_values), strict=True):
        found = difference(values[one], values[other], weights)
        pairs.append(Pair(one, other, found.value, found.low, found.high, p, adjusted))
    return pairs


def _sign_flips(first: Values, second: Values, weights: Values) -> float:
    if len(first) < 2 or list(first) == list(second):  # one pair and its mirror say nothing
        return 1.0
    weight = np.asarray(weights, dtype=float)

    def difference(one: Any, other: Any, axis: int = -1) -> Any:
        return ((one - other) * weight).sum(axis=axis) / weight.sum()

    found = stats.permutation_test(
        (np.asarray(first, dtype=float), np.asarray(second, dtype=float)),
        difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=np.random.default_rng(SEED),
    )
    return float(found.pvalue)
