"""Reading one dimension of a search space from plain values, with errors that say where and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from budgetsearch.core.errors import SpaceError, nearest
from budgetsearch.core.records import ParamValue
from budgetsearch.core.space.dimensions import (
    Choice,
    Constant,
    Dimension,
    Normal,
    Number,
    Tied,
    When,
    holds,
    is_number,
)

KEYS: Mapping[str, tuple[str, ...]] = {
    "float": ("low", "high", "log", "prior"),
    "int": ("low", "high", "log", "prior"),
    "choice": ("values", "ordered", "prior"),
    "constant": ("value",),
    "tied": ("to", "factor"),
}
"""What each kind takes beside the keys that all kinds take."""
COMMON_KEYS = ("kind", "when", "source", "unit")
FOLLOWED, FOLLOWER = "model", "learning_rate"
"""What the centre of a prior may follow, and of which dimension."""
REACH = 6.0
"""Spreads between a prior's centre and the end of its range, at most: nobody samples beyond."""


def read_dimension(name: str, raw: Any, where: str) -> Dimension:
    """Read one dimension; ``where`` begins every message.

    Raises:
        SpaceError: an unknown kind or key, a missing key, or a value out of range.
    """
    reader = _Reader(raw, f"{where}, dimension {name!r}")
    kind = reader.kind()
    texts = {key: reader.text(key) for key in ("source", "unit")}
    common: dict[str, Any] = {"name": name, "when": reader.when(), **texts}
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
    prior = reader.prior(("center", "spread", "follows"))
    if prior is None:
        return None
    follows = prior.text("follows")
    if follows not in ("", FOLLOWED):
        prior.fail(f"follows takes {FOLLOWED}, not {follows!r}; or leave it out")
    if follows and number.name != FOLLOWER:
        prior.fail(f"only the centre of {FOLLOWER} is known to follow the {FOLLOWED}; leave follows out")
    center, spread = float(prior.number("center")), float(prior.number("spread"))
    if not number.low <= center <= number.high:
        prior.fail(f"center {center:g} must lie inside the range {number.low:g} to {number.high:g}")
    scale = math.log10 if number.log else float
    reach = max(scale(center) - scale(number.low), scale(number.high) - scale(center))
    if spread <= 0 or reach > REACH * spread:
        unit = " decades" if number.log else ""
        prior.fail(f"spread must be at least {reach / REACH:.3g}{unit} for this range, not {spread:g}")
    return Normal(center, spread, follows)


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
        kind = str(self.raw.get("kind"))
        if kind not in KEYS:
            found = f"unknown kind {kind!r}{nearest(kind, KEYS)}" if "kind" in self.raw else "no kind"
            self.fail(f"{found}; use one of {', '.join(KEYS)}")
        self.keys((*COMMON_KEYS, *KEYS[kind]), f"a {kind}")
        return kind

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
            if holds(values[:index], value):
                self.fail(f"{key} names {value!r} twice; take one out")
        return tuple(values)
