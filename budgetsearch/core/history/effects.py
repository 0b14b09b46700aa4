"""What parameters do to the cost of a unit where nobody knows it beforehand: learned from measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from budgetsearch.core.records import Params
from budgetsearch.core.space.dimensions import Choice
from budgetsearch.core.space.space import Space

NOISE = 0.15
"""Standard deviation of a measured cost's logarithm around what the parameters say."""
SPREAD = 1.0
"""Standard deviation, before anything was measured, of what one end of a dimension costs over the other, as a
logarithm: the field's usual dimensions (width, depth) do as much, and most others nothing."""


@dataclass
class Effects:
    """The logarithm of a cost as a sum: one term for each dimension, linear along its prior, and one for each
    value of a choice without an order. A ridge regression (Bayesian linear regression with the two constants
    above), so that few measurements say little."""

    space: Space
    _moments: dict[tuple[str, str], float] = field(default_factory=dict)
    """Sums of the products of two terms."""
    _targets: dict[str, float] = field(default_factory=dict)
    """Sums of a term times the measured logarithm."""
    _seen: list[tuple[Mapping[str, float], float]] = field(default_factory=list)
    """Terms and ratios of all measurements: the terms are found once."""

    def add(self, params: Params, ratio: float) -> None:
        """A configuration's unit took ``ratio`` times the reference."""
        terms, measured = self._terms(params), math.log(ratio)
        self._seen.append((terms, ratio))
        for name, value in terms.items():
            self._targets[name] = self._targets.get(name, 0.0) + value * measured
            for other, more in terms.items():
                key = (name, other)
                self._moments[key] = self._moments.get(key, 0.0) + value * more
        self.__dict__.pop("_weights", None)

    def factor(self, params: Params) -> float:
        """How many times the reference a unit of the configuration is expected to take."""
        return self._factor(self._terms(params))

    def __len__(self) -> int:
        """Measurements."""
        return len(self._seen)

    def residuals(self) -> list[float]:
        """All measured ratios over what the parameters say, sorted."""
        return sorted(ratio / self._factor(terms) for terms, ratio in self._seen)

    def _factor(self, terms: Mapping[str, float]) -> float:
        weights = self._weights
        return math.exp(math.fsum(weights.get(name, 0.0) * value for name, value in terms.items()))

    @cached_property
    def _weights(self) -> Mapping[str, float]:
        names, ridge = list(self._targets), (NOISE / SPREAD) ** 2
        rows = [[self._moments.get((a, b), 0.0) + ridge * (a == b) for b in names] for a in names]
        return dict(zip(names, solved(rows, [self._targets[name] for name in names]), strict=True))

    def _terms(self, params: Params) -> dict[str, float]:
        """What a configuration's cost is a sum of; "" is the same for all."""
        terms = {"": 1.0}
        for name, position in self.space.to_unit(params).items():
            dimension = self.space[name]
            if isinstance(dimension, Choice) and not dimension.ordered:
                terms[f"{name} {params[name]}"] = 1.0
            else:
                terms[name] = position - 0.5
        return terms


def solved(rows: list[list[float]], right: list[float]) -> list[float]:
    """The solution of a symmetric positive definite system, by elimination (no pivots are needed)."""
    rows, right = [list(row) for row in rows], list(right)
    size = len(right)
    for k in range(size):
        for i in range(k + 1, size):
            share = rows[i][k] / rows[k][k]
            right[i] -= share * right[k]
            for j in range(k, size):
                rows[i][j] -= share * rows[k][j]
    found = [0.0] * size
    for k in reversed(range(size)):
        rest = math.fsum(rows[k][j] * found[j] for j in range(k + 1, size))
        found[k] = (right[k] - rest) / rows[k][k]
    return found
