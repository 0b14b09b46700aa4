"""How sure a mean and a paired difference are: intervals, sign flips, Holm's correction.

Losses are resampled. Accuracies have Wilson's interval and their differences Newcombe's for paired shares: a
bootstrap of a few answers that are all wrong gives no interval, or one that pretends to be sure.

Examples are resampled, not runs: what comes out says how much of a difference is due to the choice of
validation examples. It says nothing of what another seed would have given.
"""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from budgetsearch.views.intervals import holm, paired_shares, wilson

CONFIDENCE = 0.95
ALPHA = 0.05
"""Below this, after Holm's correction, two are told apart."""
RESAMPLES = 9999
"""Resamples of an interval, and sign flips of a test; where there are fewer flips all are taken."""
BATCH = 1000
"""Of them at once, so that some hundred examples do not take gigabytes."""


Ends = tuple[float | None, float | None]


@dataclass(frozen=True)
class Mean:
    """A weighted mean; without an interval where all values are equal, or too few to give one."""

    mean: float
    low: float | None
    high: float | None


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


def mean_of(values: Sequence[float], weights: Sequence[float], seed: int = 0) -> Mean:
    """The weighted mean of some examples with its bootstrap interval (BCa; Efron 1987)."""
    value, weight = np.asarray(values, dtype=float), np.asarray(weights, dtype=float)
    low, high = _interval(value, weight, seed)
    return Mean(float(np.average(value, weights=weight)), low, high)


def share_of(values: Sequence[float]) -> Mean:
    """The mean of grades between 0 and 1 with Wilson's interval."""
    found = wilson(statistics.fmean(values), len(values))
    return Mean(found.value, found.low, found.high)


Interval = Callable[[Sequence[float], Sequence[float]], Ends]
"""Of the mean difference of two that were measured on the same examples."""


def share_interval(first: Sequence[float], second: Sequence[float]) -> Ends:
    """Of the difference of two shares on the same answers."""
    found = paired_shares(second, first)
    return found.low, found.high


def no_interval(first: Sequence[float], second: Sequence[float]) -> Ends:
    """Where there are too few examples."""
    return None, None


def pairs_of(
    values: Mapping[str, Sequence[float]],
    weights: Sequence[float],
    *,
    baseline: str | None = None,
    seed: int = 0,
    interval: Interval | None = None,
) -> list[Pair]:
    """Every pair, or each one against ``baseline``, with p-values corrected for their number.

    ``interval``: of a difference; without it a bootstrap over the examples.
    """
    if baseline is None:
        names = list(itertools.combinations(values, 2))
    else:
        names = [(name, baseline) for name in values if name != baseline]
    weight = np.asarray(weights, dtype=float)
    found = [_pair(one, other, values, weight, seed, interval) for one, other in names]
    adjusted = holm([pair.p for pair in found])
    return [
        Pair(pair.first, pair.second, pair.difference, pair.low, pair.high, pair.p, p)
        for pair, p in zip(found, adjusted, strict=True)
    ]


def _pair(
    one: str,
    other: str,
    values: Mapping[str, Sequence[float]],
    weights: np.ndarray[Any, Any],
    seed: int,
    interval: Interval | None,
) -> Pair:
    first, second = (np.asarray(values[name], dtype=float) for name in (one, other))
    low, high = interval(values[one], values[other]) if interval else _interval(first - second, weights, seed)
    difference = float(np.average(first - second, weights=weights))
    p = _sign_flips(first, second, weights, seed)
    return Pair(one, other, difference, low, high, p, p)


def _interval(values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], seed: int) -> Ends:
    if len(values) < 2 or np.all(values == values[0]):
        return None, None

    def ratio(weighted: Any, weight: Any, axis: int = -1) -> Any:
        return weighted.sum(axis=axis) / weight.sum(axis=axis)

    for method in ("BCa", "percentile"):  # the first has no answer where one example decides everything
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                (values * weights, weights),
                ratio,
                paired=True,
                vectorized=True,
                confidence_level=CONFIDENCE,
                n_resamples=RESAMPLES,
                batch=BATCH,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite(found.low) and np.isfinite(found.high):
            return float(found.low), float(found.high)
    return None, None


def _sign_flips(
    first: np.ndarray[Any, Any], second: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], seed: int
) -> float:
    if np.array_equal(first, second):
        return 1.0

    def difference(one: Any, other: Any, axis: int = -1) -> Any:
        return ((one - other) * weights).sum(axis=axis) / weights.sum()

    found = stats.permutation_test(
        (first, second),
        difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)
