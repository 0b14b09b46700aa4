"""How sure a number is: 95% intervals, the same at every call.

Losses are resampled (BCa bootstrap: Efron 1987, JASA 82), accuracies have Wilson's interval, and their
difference Newcombe's, which is built from the two (Newcombe 1998, Statistics in Medicine 17: method 10 of the
paper on independent shares, p. 873, and of the one on paired shares, p. 2635).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
Z = 1.959963984540054
"""The normal distribution's quantile at (1 + CONFIDENCE) / 2."""
RESAMPLES = 9999
SEED = 0
MIN_EXAMPLES = 8
"""With fewer examples a bootstrap says too little to be shown."""
MIN_ANSWERS = 20
"""With fewer answers an accuracy has no interval: it would reach over half of the scale, or hide that."""
BATCH = 500
"""Resamples that are held in memory at once."""


@dataclass(frozen=True)
class Estimate:
    """A number and its interval; without ends where too little was measured to give one."""

    value: float
    low: float | None = None
    high: float | None = None


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """The mean in which each value counts as often as its weight says."""
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)


def bootstrapped(values: Sequence[float], weights: Sequence[float]) -> Estimate:
    """The weighted mean of examples; value and weight of an example are drawn together."""
    mean = weighted_mean(values, weights)
    if len(values) < MIN_EXAMPLES or len(set(values)) == 1:
        return Estimate(mean)  # an interval of no width would claim a certainty that nobody has
    import numpy as np
    from scipy.stats import bootstrap

    def statistic(some: Any, weight: Any, axis: int = -1) -> Any:
        return np.sum(some * weight, axis=axis) / np.sum(weight, axis=axis)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a degenerate sample has no BCa interval: then there is none
        found = bootstrap(
            (np.asarray(values, float), np.asarray(weights, float)),
            statistic,
            n_resamples=RESAMPLES,
            batch=BATCH,
            paired=True,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return Estimate(mean, low, high) if math.isfinite(low) and math.isfinite(high) else Estimate(mean)


def wilson(share: float, count: int) -> Estimate:
    """A share of ``count`` answers; with partial grades the interval is a little too wide."""
    if count < 1:
        return Estimate(share)
    scale = 1 + Z * Z / count
    middle = (share + Z * Z / (2 * count)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def newcombe(before: Estimate, after: Estimate, correlation: float = 0.0) -> Estimate:
    """``after - before``, of two shares with Wilson's intervals.

    Without their ``correlation`` over the answers the two are taken for independent: where they are right on
    the same answers the interval is a little too wide then.
    """
    difference = after.value - before.value
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Estimate(difference)
    down = _joined(after.value - after.low, before.high - before.value, correlation)
    up = _joined(after.high - after.value, before.value - before.low, correlation)
    return Estimate(difference, max(-1.0, difference - down), min(1.0, difference + up))


def _joined(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))


def paired_shares(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """``after - before``, of the grades (0 to 1) of the same answers."""
    count = len(before)
    one, other = (wilson(math.fsum(grades) / count, count) for grades in (before, after))
    return newcombe(one, other, agreement(before, after))


def agreement(before: Sequence[float], after: Sequence[float]) -> float:
    """The correlation of grades of the same answers, a positive one made smaller as Newcombe does."""
    count = len(before)
    product = count * math.fsum(a * b for a, b in zip(before, after, strict=True))
    shared = product - math.fsum(before) * math.fsum(after)
    shared = max(0.0, shared - count / 2) if shared > 0 else shared
    spread = [count * math.fsum(x * x for x in some) - math.fsum(some) ** 2 for some in (before, after)]
    return shared / math.sqrt(spread[0] * spread[1]) if min(spread) > 0 else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """The same p-values, corrected so that one false finding among all is as rare as each was alone.

    Holm 1979, Scandinavian Journal of Statistics 6: the smallest times their number, the next times one less.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted
