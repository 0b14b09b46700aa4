"""A Gaussian process over (configuration, length of training), and what it suggests.

The covariance of two observations is ::

    a^2 * M([x, s], [x', s']) + c^2 * M(s, s') + noise^2 * (same observation)

with M the Matern-5/2 covariance and one lengthscale for each dimension. The second term is the curve
that all configurations share. ``s`` is 1 for a full run and falls with the logarithm of the share of it
that was trained. Values are replaced by their normal scores (rank-based), so neither the loss's unit nor
one diverged run matters. The parameters maximise the posterior under log-normal priors (Rasmussen and
Williams, Gaussian Processes for Machine Learning, ch. 5; priors as in Hvarfner et al., arXiv 2402.02229,
which keep many-dimensional fits smooth).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SPAN = 50.0
"""A run of 1 / SPAN of the full length stands at s = 0."""
LENGTHSCALE, LENGTHSCALE_SPREAD = 1.5, 0.7
"""Of a dimension, in units of its whole range: the prior's median and its spread (natural logarithm)."""
PRIORS = {"s": (1.0, 0.7), "a": (1.0, 0.5), "c": (0.5, 0.7), "noise": (0.15, 0.8), "curve": (1.0, 0.7)}
"""Median and spread (natural logarithm) of the other parameters."""
JITTER = 1e-6
MAX_ITERATIONS = 40
FIT_POINTS = 150
"""So many observations decide the parameters at most: the cost of a fit grows with their cube."""
PREDICT_POINTS = 600
"""So many observations, the furthest trained first, enter the prediction at most."""


def fidelity(share: float) -> float:
    """``s`` of a run that was trained for ``share`` (0 to 1) of the full length."""
    return max(0.0, 1.0 + math.log(max(share, 1e-9)) / math.log(SPAN))


def normal_scores(values: Array) -> Array:
    """Each value's rank as a quantile of the standard normal; shape (n,) to (n,). Ties share a rank."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    return np.asarray(ndtri((rankdata(values) - 0.5) / len(values)), dtype=np.float64)


@dataclass(frozen=True)
class Observations:
    """What was seen: ``x`` (n, d) in the unit cube, ``s`` (n,), ``y`` (n,) lower is better."""

    x: Array
    s: Array
    y: Array

    def first(self, count: int) -> Observations:
        """The ``count`` oldest."""
        return Observations(self.x[:count], self.s[:count], self.y[:count])

    def some(self, count: int) -> Observations:
        """At most ``count`` of them: those of the longest training, then the oldest."""
        if len(self.y) <= count:
            return self
        keep = np.sort(np.argsort(-self.s, kind="stable")[:count])
        return Observations(self.x[keep], self.s[keep], self.y[keep])


def fit(seen: Observations) -> Array:
    """The parameters (logarithms): d lengthscales, then s, a, c, noise and curve."""
    from scipy.optimize import minimize

    data = seen.some(FIT_POINTS)
    d = data.x.shape[1]
    center, spread = _prior(d)
    z = normal_scores(data.y)
    found = minimize(
        _loss,
        center,
        args=(data.x, data.s, z, center, spread),
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(center - 4 * spread, center + 4 * spread, strict=True)),
        options={"maxiter": MAX_ITERATIONS},
    )
    return np.asarray(found.x, dtype=np.float64)


def _prior(d: int) -> tuple[Array, Array]:
    medians = [LENGTHSCALE] * d + [median for median, _ in PRIORS.values()]
    spreads = [LENGTHSCALE_SPREAD] * d + [spread for _, spread in PRIORS.values()]
    return np.log(np.array(medians)), np.array(spreads)


def _distances(a: Array, b: Array) -> Array:
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * a @ b.T
    return np.asarray(np.maximum(squares, 0.0))


def _matern(squares: Array) -> tuple[Array, Array]:
    """The covariance, and what it loses per unit of half a squared distance's logarithm."""
    r = np.sqrt(5 * squares + 1e-12)
    decay = np.exp(-r)
    return (1 + r + r * r / 3) * decay, (5 / 3) * (1 + r) * decay


def _loss(p: Array, x: Array, s: Array, z: Array, center: Array, spread: Array) -> tuple[float, Array]:
    """The negative logarithm of the posterior, and its gradient."""
    from scipy.linalg import LinAlgError, cho_solve, cholesky

    n, d = x.shape
    scale = np.exp(p)
    a = x / scale[:d]
    ds = (s[:, None] - s[None, :]) ** 2
    own, own_slope = _matern(_distances(a, a) + ds / scale[d] ** 2)
    shared, shared_slope = _matern(ds / scale[d + 4] ** 2)
    own, own_slope = own * scale[d + 1] ** 2, own_slope * scale[d + 1] ** 2
    shared, shared_slope = shared * scale[d + 2] ** 2, shared_slope * scale[d + 2] ** 2
    try:
        lower = cholesky(
            own + shared + (scale[d + 3] ** 2 + JITTER) * np.eye(n), lower=True, check_finite=False
        )
    except LinAlgError:
        return 1e9, np.zeros(len(p))
    alpha = cho_solve((lower, True), z, check_finite=False)
    weight = 0.5 * (cho_solve((lower, True), np.eye(n), check_finite=False) - np.outer(alpha, alpha))
    away = (p - center) / spread
    value = 0.5 * z @ alpha + np.log(np.diag(lower)).sum() + 0.5 * (away * away).sum()
    gradient: Array = away / spread
    slope = weight * own_slope
    # sum_ij slope_ij (a_i - a_j)^2 for every dimension at once
    gradient[:d] += 2 * (slope.sum(1) @ (a * a) - np.einsum("ik,ik->k", a, slope @ a))
    gradient[d] += (slope * ds).sum() / scale[d] ** 2
    gradient[d + 1] += 2 * (weight * own).sum()
    gradient[d + 2] += 2 * (weight * shared).sum()
    gradient[d + 3] += 2 * np.trace(weight) * scale[d + 3] ** 2
    gradient[d + 4] += (weight * shared_slope * ds).sum() / scale[d + 4] ** 2
    return float(value), gradient


class Surrogate:
    """The posterior of the observations under given parameters."""

    def __init__(self, seen: Observations, parameters: Array) -> None:
        self._p = np.exp(parameters)
        self._seen = seen.some(PREDICT_POINTS)
        self._condition(normal_scores(self._seen.y))
        self._scores = np.sort(self._seen.y), np.sort(self._z)
        """Values, and their normal scores."""

    def believing(self, waiting: Array) -> Surrogate:
        """The same after full runs at ``waiting`` (m, d) that end as expected.

        So points that already wait for their results are not proposed again (the kriging believer,
        Ginsbourger et al. 2010).
        """
        mean, _ = self.predict(waiting)
        more = copy.copy(self)
        s = np.concatenate([self._seen.s, np.ones(len(waiting))])
        x = np.concatenate([self._seen.x, waiting])
        more._seen = Observations(x, s, np.concatenate([self._seen.y, np.zeros(len(waiting))]))
        more._condition(np.concatenate([self._z, mean]))
        return more

    def _condition(self, z: Array) -> None:
        from scipy.linalg import cho_solve, cholesky

        n, self._z = len(z), z
        covariance = self._covariance(self._seen.x, self._seen.s)
        covariance[np.diag_indices(n)] += self._p[self._seen.x.shape[1] + 3] ** 2 + JITTER
        self._lower = cholesky(covariance, lower=True, check_finite=False)
        self._alpha = cho_solve((self._lower, True), z, check_finite=False)

    def predict(self, x: Array, s: float = 1.0) -> tuple[Array, Array]:
        """Mean and standard deviation of the normal score at ``x`` (m, d) after training to ``s``."""
        from scipy.linalg import solve_triangular

        d = x.shape[1]
        cross = self._covariance(x, np.full(len(x), s))
        half = solve_triangular(self._lower, cross.T, lower=True, check_finite=False)
        variance = self._p[d + 1] ** 2 + self._p[d + 2] ** 2 - (half * half).sum(0)
        return cross @ self._alpha, np.sqrt(np.maximum(variance, 1e-9))

    def score(self, value: float) -> float:
        """The normal score of a value of ``y``."""
        return float(np.interp(value, *self._scores))

    def chance(self, x: Array, s: float, score: float) -> float:
        """The probability that an observation of ``x`` (1, d), trained to ``s``, is at most ``score``."""
        from scipy.special import ndtr

        mean, deviation = self.predict(x, s)
        noise = self._p[x.shape[1] + 3]
        return float(ndtr((score - mean[0]) / math.hypot(deviation[0], noise)))

    def _covariance(self, x: Array, s: Array) -> Array:
        """Of the given points with the observations."""
        d, p, seen = x.shape[1], self._p, self._seen
        ds = (s[:, None] - seen.s[None, :]) ** 2
        own, _ = _matern(_distances(x / p[:d], seen.x / p[:d]) + ds / p[d] ** 2)
        shared, _ = _matern(ds / p[d + 4] ** 2)
        return np.asarray(p[d + 1] ** 2 * own + p[d + 2] ** 2 * shared)


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """By how much a normal variable is expected to fall below ``best`` (Jones et al. 1998)."""
    from scipy.special import ndtr

    z = (best - mean) / deviation
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return np.asarray(deviation * (z * ndtr(z) + density))


def as_array(rows: Any) -> Array:
    """A float array of what may be nested lists."""
    return np.asarray(rows, dtype=np.float64)
