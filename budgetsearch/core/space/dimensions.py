"""The dimensions of a search space: what each kind takes, and how a prior bends the unit interval.

A dimension maps a number from 0 to 1 to a value through the inverse distribution function of its
prior, so a uniform sampler on the unit cube follows the priors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from budgetsearch.core.errors import nearest
from budgetsearch.core.records import Params, ParamValue

When = tuple[tuple[str, tuple[ParamValue, ...]], ...]


@dataclass(frozen=True)
class Normal:
    """A normal distribution, cut at the ends of the range."""

    center: float
    spread: float
    """Standard deviation in the unit of the dimension; in decades where it is logarithmic."""
    follows: str = ""
    """``model``: the centre is moved to where it suits the base model, as far as that is known."""


@dataclass(frozen=True, kw_only=True)
class _Base:
    name: str
    when: When = ()
    """Which values of which other dimensions make this one count; empty: always."""
    source: str = ""
    unit: str = ""

    def active(self, params: Params) -> bool:
        """Whether the conditions hold, given the dimensions that stand above this one."""
        return all(name in params and params[name] in values for name, values in self.when)

    def _common(self, kind: str) -> dict[str, Any]:
        when = {name: list(values) for name, values in self.when}
        given = {"when": when, "source": self.source, "unit": self.unit}
        return {"name": self.name, "kind": kind, **{key: item for key, item in given.items() if item}}


@dataclass(frozen=True, kw_only=True)
class Number(_Base):
    """A real or whole number from ``low`` to ``high``, both included."""

    low: float
    high: float
    log: bool = False
    integer: bool = False
    prior: Normal | None = None
    """None: uniform, in the logarithm if ``log``."""

    @property
    def searched(self) -> bool:
        """True: a range always leaves something to find."""
        return True

    def corners(self) -> tuple[ParamValue, ...]:
        """The extreme values; what holds for them holds for all."""
        return (int(self.low), int(self.high)) if self.integer else (self.low, self.high)

    def default(self) -> ParamValue:
        """The centre of the prior, or the middle of the range (geometric if ``log``)."""
        if self.prior:
            return round(self.prior.center) if self.integer else self.prior.center
        left, right = self._ends()
        return self._value((left + right) / 2)

    def value_at(self, position: float) -> ParamValue:
        """The value below which ``position`` (0 to 1) of the prior lies."""
        left, right = self._ends()
        if self.prior is None:
            return self._value(left + position * (right - left))
        normal = NormalDist(self._scale(self.prior.center), self.prior.spread)
        below, upto = normal.cdf(left), normal.cdf(right)
        share = below + position * (upto - below)
        return self._value(normal.inv_cdf(min(1.0 - 1e-16, max(1e-300, share))))  # open at both ends

    def position_of(self, value: ParamValue) -> float:
        """The inverse of ``value_at``."""
        left, right = self._ends()
        x = self._scale(float(value))
        if self.prior is None:
            return (x - left) / (right - left)
        normal = NormalDist(self._scale(self.prior.center), self.prior.spread)
        below, upto = normal.cdf(left), normal.cdf(right)
        return min(1.0, max(0.0, (normal.cdf(x) - below) / (upto - below)))

    def problem(self, value: ParamValue) -> str:
        """What is wrong with a value; empty when it is one of this dimension's."""
        if not is_number(value) or (self.integer and not isinstance(value, int)):
            return f"takes a {'whole ' if self.integer else ''}number, not {value!r}"
        inside = self.low <= float(value) <= self.high
        low, high = self.corners()
        return "" if inside else f"takes {low!r} to {high!r}, not {value!r}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that ``read_dimension`` reads back."""
        low, high = self.corners()
        body = {**self._common("int" if self.integer else "float"), "low": low, "high": high, "log": self.log}
        if self.prior:
            body["prior"] = {"center": self.prior.center, "spread": self.prior.spread}
            if self.prior.follows:
                body["prior"]["follows"] = self.prior.follows
        return body

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def _ends(self) -> tuple[float, float]:
        # Half a step more on both sides gives the outermost whole numbers their full share.
        margin = 0.5 if self.integer else 0.0
        return self._scale(self.low - margin), self._scale(self.high + margin)

    def _value(self, scaled: float) -> ParamValue:
        value = min(self.high, max(self.low, 10.0**scaled if self.log else scaled))
        return round(value) if self.integer else value


@dataclass(frozen=True, kw_only=True)
class Choice(_Base):
    """One of several values; ``ordered`` when neighbours in the list are neighbours in effect."""

    values: tuple[ParamValue, ...]
    ordered: bool = False
    weights: tuple[float, ...] = ()
    """Relative weights of the prior; empty: as ``center`` says, or all alike."""
    center: ParamValue | None = None
    """Counts twice as much as the others; if ordered, the weight halves with every step away."""

    @property
    def searched(self) -> bool:
        """Whether there is more than one value to choose from."""
        return len(self.values) > 1

    def corners(self) -> tuple[ParamValue, ...]:
        """All values."""
        return self.values

    def default(self) -> ParamValue:
        """The likeliest value; among equals the first, or the middle one if ordered."""
        shares = self._shares()
        best = [value for value, share in zip(self.values, shares, strict=True) if share == max(shares)]
        return best[(len(best) - 1) // 2 if self.ordered else 0]

    def value_at(self, position: float) -> ParamValue:
        """The value in whose share of the unit interval ``position`` (0 to 1) lies."""
        upto = 0.0
        for value, share in zip(self.values, self._shares(), strict=True):
            upto += share
            if position < upto:
                return value
        return self.values[-1]

    def position_of(self, value: ParamValue) -> float:
        """The middle of the value's share of the unit interval."""
        index, shares = self.values.index(value), self._shares()
        return sum(shares[:index]) + shares[index] / 2

    def problem(self, value: ParamValue) -> str:
        """What is wrong with a value; empty when it is one of this dimension's."""
        if holds(self.values, value):
            return ""
        known = [str(item) for item in self.values]
        return f"takes {', '.join(known)}, not {value!r}{nearest(str(value), known)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that ``read_dimension`` reads back."""
        body = {**self._common("choice"), "values": list(self.values), "ordered": self.ordered}
        if self.weights:
            body["prior"] = {"weights": list(self.weights)}
        elif self.center is not None:
            body["prior"] = {"center": self.center}
        return body

    def _shares(self) -> list[float]:
        raw = list(self.weights) or [self._nearness(index) for index in range(len(self.values))]
        return [weight / sum(raw) for weight in raw]

    def _nearness(self, index: int) -> float:
        if self.center is None:
            return 1.0
        steps = abs(index - self.values.index(self.center))
        return 2.0 ** -(steps if self.ordered else min(steps, 1))


@dataclass(frozen=True, kw_only=True)
class Constant(_Base):
    """A fixed value."""

    value: ParamValue

    @property
    def searched(self) -> bool:
        """False: there is nothing to find."""
        return False

    def corners(self) -> tuple[ParamValue, ...]:
        """The value alone."""
        return (self.value,)

    def default(self) -> ParamValue:
        """The value."""
        return self.value

    def problem(self, value: ParamValue) -> str:
        """What is wrong with a value; empty when it is the constant."""
        return "" if holds((self.value,), value) else f"is fixed at {self.value!r}, not {value!r}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that ``read_dimension`` reads back."""
        return {**self._common("constant"), "value": self.value}


@dataclass(frozen=True, kw_only=True)
class Tied(_Base):
    """Always ``factor`` times another dimension; absent when that one is."""

    to: str
    factor: float = 1

    @property
    def searched(self) -> bool:
        """False: the other dimension decides."""
        return False

    def follow(self, value: ParamValue) -> ParamValue:
        """The value that belongs to the other dimension's ``value``; whole if both factors are."""
        return self.factor * (value if isinstance(value, int) else float(value))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that ``read_dimension`` reads back."""
        return {**self._common("tied"), "to": self.to, "factor": self.factor}


Own = Number | Choice | Constant
"""The kinds that have a value of their own."""
Dimension = Number | Choice | Constant | Tied


def is_number(value: object) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def holds(values: Sequence[ParamValue], value: ParamValue) -> bool:
    """Whether ``value`` is one of ``values``."""
    # True equals 1 in Python, but nobody who writes `true` means the number.
    return any(item == value and isinstance(item, bool) == isinstance(value, bool) for item in values)
