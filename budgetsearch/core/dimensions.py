"""The dimensions of a search space: what each kind takes, and how a prior bends the unit interval.

A dimension maps a number from 0 to 1 to a value through the inverse distribution function of its
prior, so a uniform sampler on the unit cube follows the priors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, NoReturn, Union

from budgetsearch.core.errors import SpaceError, nearest
from budgetsearch.core.records import Params, ParamValue

KEYS: Mapping[str, tuple[str, ...]] = {
    "float": ("low", "high", "log", "prior"),
    "int": ("low", "high", "log", "prior"),
    "choice": ("values", "ordered", "prior"),
    "constant": ("value",),
    "tied": ("to", "factor"),
}
"""What each kind takes beside the keys that all kinds take."""
COMMON_KEYS = ("kind", "when", "source", "unit")
REACH = 6.0
"""Spreads between a prior's centre and the end of its range, at most: nobody samples beyond."""

When = tuple[tuple[str, tuple[ParamValue, ...]], ...]


@dataclass(frozen=True)
class Normal:
    """A normal distribution, cut at the ends of the range."""

    center: float
    spread: float
    """Standard deviation in the unit of the dimension; in decades where it is logarithmic."""


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
        left, right = self._ends()
        return self._value(self._scale(self.prior.center) if self.prior else (left + right) / 2)

    def value_at(self, position: float) -> ParamValue:
        """The value below which ``position`` (0 to 1) of the prior lies."""
        left, right = self._ends()
        if self.prior is None:
            return self._value(left + position * (right - left))
        normal = NormalDist(self._scale(self.prior.center), self.prior.spread)
        below, upto = normal.cdf(left), normal.cdf(right)
        return self._value(normal.inv_cdf(below + position * (upto - below)))

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
        """Plain JSON values that ``parse_dimension`` reads back."""
        low, high = self.corners()
        body = {**self._common("int" if self.integer else "float"), "low": low, "high": high, "log": self.log}
        if self.prior:
            body["prior"] = {"center": self.prior.center, "spread": self.prior.spread}
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
        if _holds(self.values, value):
            return ""
        known = [str(item) for item in self.values]
        return f"takes {', '.join(known)}, not {value!r}{nearest(str(value), known)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that ``parse_dimension`` reads back."""
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
        return "" if _holds((self.value,), value) else f"is fixed at {self.value!r}, not {value!r}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that ``parse_dimension`` reads back."""
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
        """Plain JSON values that ``parse_dimension`` reads back."""
        return {**self._common("tied"), "to": self.to, "factor": self.factor}


Own = Union[Number, Choice, Constant]
"""The kinds that have a value of their own."""
Dimension = Union[Number, Choice, Constant, Tied]


def is_number(value: object) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def parse_dimension(name: str, raw: Any, where: str) -> Dimension:
    """Read one dimension; ``where`` begins every message.

    Raises:
        SpaceError: an unknown kind or key, a missing key, or a value out of range.
    """
    reader = _Reader(raw, f"{where}, dimension {name!r}")
    kind = reader.kind()
    common = {"name": name, "when": reader.when(), "source": reader.text("source"), "unit": reader.text("unit")}
    if kind == "choice":
        return _choice(reader, common)
    if kind == "constant":
        return Constant(value=reader.scalar("value"), **common)
    if kind == "tied":
        return Tied(to=reader.text("to", required=True), factor=reader.number("factor", 1), **common)
    return _number(reader, kind == "int", common)


def _number(reader: _Reader, integer: bool, common: dict[str, Any]) -> Number:
    low, high, log = reader.number("low"), reader.number("high"), reader.flag("log")
    if integer and not (float(low).is_integer() and float(high).is_integer()):
        reader.fail("low and high of an int are whole numbers; write them so, or use kind: float")
    if low >= high:
        reader.fail(f"low {low:g} must be less than high {high:g}; for one value use kind: constant")
    if log and low <= 0:
        reader.fail(f"a logarithmic range starts above 0, not at {low:g}; raise low or drop log")
    number = Number(low=float(low), high=float(high), log=log, integer=integer, **common)
    return replace(number, prior=_normal(reader, number))


def _normal(reader: _Reader, number: Number) -> Normal | None:
    prior = reader.prior(("center", "spread"))
    if prior is None:
        return None
    center, spread = float(prior.number("center")), float(prior.number("spread"))
    if not number.low <= center <= number.high:
        prior.fail(f"center {center:g} must lie inside the range {number.low:g} to {number.high:g}")
    scale = math.log10 if number.log else float
    reach = max(scale(center) - scale(number.low), scale(number.high) - scale(center))
    if spread <= 0 or reach > REACH * spread:
        unit = " decades" if number.log else ""
        prior.fail(f"spread must be at least {reach / REACH:.3g}{unit} for this range, not {spread:g}")
    return Normal(center, spread)


def _choice(reader: _Reader, common: dict[str, Any]) -> Choice:
    values, ordered = reader.values("values"), reader.flag("ordered")
    numbers = [value for value in values if is_number(value)]
    if ordered and len(numbers) == len(values) and sorted(numbers) != numbers:
        reader.fail(f"ordered numbers must rise, not {list(values)}; sort them")
    choice = Choice(values=values, ordered=ordered, **common)
    prior = reader.prior(("weights", "center"))
    if prior is None:
        return choice
    if len(prior.raw) != 1:
        prior.fail("a choice takes either weights or center")
    if "center" in prior.raw:
        center = prior.scalar("center")
        if choice.problem(center):
            prior.fail(f"center {choice.problem(center)}")
        return replace(choice, center=values[values.index(center)])
    return replace(choice, weights=_weights(prior, len(values)))


def _weights(prior: _Reader, count: int) -> tuple[float, ...]:
    weights = prior.raw["weights"]
    if not isinstance(weights, (list, tuple)) or len(weights) != count:
        prior.fail(f"weights must be a list of {count} numbers, one for each value, not {weights!r}")
    if not all(is_number(weight) and weight > 0 for weight in weights):
        prior.fail(f"weights must be more than 0, not {list(weights)}; take out a value that you do not want")
    return tuple(float(weight) for weight in weights)


def _holds(values: Sequence[ParamValue], value: ParamValue) -> bool:
    # True equals 1 in Python, but nobody who writes `true` means the number.
    return any(item == value and isinstance(item, bool) == isinstance(value, bool) for item in values)


@dataclass(frozen=True)
class _Reader:
    """Typed access to one mapping; every complaint says where it is."""

    raw: Any
    where: str

    def fail(self, problem: str) -> NoReturn:
        raise SpaceError(f"{self.where}: {problem}.")

    def kind(self) -> str:
        if not isinstance(self.raw, Mapping):
            self.fail(f"takes a mapping with a kind, not {self.raw!r}; for one value write kind: constant")
        kind = self.raw.get("kind")
        if kind not in KEYS:
            found = f"unknown kind {kind!r}{nearest(str(kind), KEYS)}" if "kind" in self.raw else "no kind"
            self.fail(f"{found}; use one of {', '.join(KEYS)}")
        self.keys((*COMMON_KEYS, *KEYS[kind]), f"a {kind}")
        return str(kind)

    def keys(self, known: Sequence[str], what: str) -> None:
        for key in self.raw:
            if key not in known:
                hint = nearest(str(key), known)
                self.fail(f"unknown key {key!r}{hint}; {what} takes {', '.join(known)}")

    def prior(self, known: Sequence[str]) -> _Reader | None:
        raw = self.raw.get("prior")
        if raw is None:
            return None
        if not isinstance(raw, Mapping):
            self.fail(f"prior takes a mapping with {' and '.join(known)}, not {raw!r}")
        prior = _Reader(raw, f"{self.where}, prior")
        prior.keys(known, "it")
        return prior

    def need(self, key: str) -> Any:
        if key not in self.raw:
            self.fail(f"the key {key!r} is missing; add it")
        return self.raw[key]

    def number(self, key: str, default: float | None = None) -> float:
        value = self.need(key) if default is None else self.raw.get(key, default)
        if not is_number(value):
            self.fail(f"{key} must be a number, not {value!r}")
        return value  # type: ignore[no-any-return]

    def flag(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            self.fail(f"{key} must be true or false, not {value!r}")
        return value

    def text(self, key: str, required: bool = False) -> str:
        value = self.need(key) if required else self.raw.get(key, "")
        if not isinstance(value, str):
            self.fail(f"{key} must be text, not {value!r}")
        return value

    def scalar(self, key: str) -> ParamValue:
        return self._scalar(key, self.need(key))

    def values(self, key: str) -> tuple[ParamValue, ...]:
        return self._values(key, self.need(key))

    def when(self) -> When:
        raw = self.raw.get("when", {})
        if not isinstance(raw, Mapping):
            self.fail(f"when takes a mapping such as {{quantization: [nf4]}}, not {raw!r}")
        return tuple((str(name), self._values(f"when {name}", values)) for name, values in raw.items())

    def _scalar(self, key: str, value: Any) -> ParamValue:
        if isinstance(value, (str, bool)) or is_number(value):
            return value  # type: ignore[no-any-return]
        self.fail(f"{key} takes text, a finite number, true or false, not {value!r}")

    def _values(self, key: str, raw: Any) -> tuple[ParamValue, ...]:
        if not isinstance(raw, (list, tuple)) or not raw:
            self.fail(f"{key} must be a list of at least one value, not {raw!r}")
        values = [self._scalar(key, item) for item in raw]
        if all(is_number(value) for value in values) and any(isinstance(value, float) for value in values):
            values = [float(value) for value in values]  # [0, 0.05] means two real numbers
        for index, value in enumerate(values):
            if _holds(values[:index], value):
                self.fail(f"{key} names {value!r} twice; take one out")
        return tuple(values)
