"""The search space: which parameters are searched, over which values, with which prior belief.

A space is parsed from a plain mapping; reading YAML is the business of ``budgetsearch.run.spaces``::

    dimensions:
      rank: {kind: choice, values: [8, 16, 32], ordered: true}
      learning_rate: {kind: float, low: 1e-5, high: 1e-3, log: true, prior: {center: 2e-4, spread: 0.5}}
      alpha: {kind: tied, to: rank, factor: 2}
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from budgetsearch.core.bases import DIMENSION, Base, cost_class
from budgetsearch.core.errors import SpaceError, nearest
from budgetsearch.core.records import Params, ParamValue
from budgetsearch.core.space.dimensions import (
    Choice,
    Constant,
    Dimension,
    Normal,
    Number,
    Own,
    Tied,
    is_number,
)
from budgetsearch.core.space.knobs import KNOBS, QUANTIZATIONS, SETTINGS
from budgetsearch.core.space.reading import REACH, read_dimension
from budgetsearch.core.targets import words_of

__all__ = ["Choice", "Constant", "Dimension", "Normal", "Number", "Space", "Tied"]

REQUIRED = ("quantization", "rank", "learning_rate")
MODELS = "--model"
"""The source of the dimension that several models make."""
KEYS = ("name", "description", "free", "dimensions")


DEFAULTS: tuple[Dimension, ...] = (
    Tied(name="alpha", to="rank", factor=2, source="default: twice the rank"),
    Constant(name="dropout", value=0.0, source="default: none"),
)


@dataclass(frozen=True)
class Space:
    """A search space whose dimensions have been checked against each other."""

    name: str
    dimensions: tuple[Dimension, ...]
    description: str = ""
    free: bool = False
    """A space of anything, as recorded curves and recipes have it: it needs no LoRA knob."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any], name: str = "") -> Space:
        """Read a space; without ``name`` the mapping's own name counts.

        Raises:
            SpaceError: something is unknown, missing or out of range; it says where.
        """
        label = name or (str(raw.get("name", "")) if isinstance(raw, Mapping) else "")
        where = f"search space {label!r}"
        if not isinstance(raw, Mapping):
            raise SpaceError(f"{where}: takes a mapping with the key dimensions, not {raw!r}.")
        for key in raw:
            if key not in KEYS:
                hint = nearest(str(key), KEYS)
                raise SpaceError(f"{where}: unknown key {key!r}{hint}; it takes {', '.join(KEYS)}.")
        items = list(_items(raw.get("dimensions"), where))
        given = tuple(read_dimension(title, body, where) for title, body in items)
        free = raw.get("free", False) is True
        missing = () if free else _missing(given)
        space = cls(label, (*given, *missing), str(raw.get("description", "")), free)
        space._check(where)
        return space

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``Space.parse(space.to_dict()) == space``.

        The dimensions are a list there, for their order counts and a JSON object has none.
        """
        dimensions = [dimension.to_dict() for dimension in self.dimensions]
        raw: dict[str, Any] = {"name": self.name, "description": self.description, "dimensions": dimensions}
        return {**raw, "free": True} if self.free else raw

    @property
    def searched(self) -> tuple[str, ...]:
        """Names of the dimensions that are free; constant and tied ones are not."""
        return tuple(dimension.name for dimension in self.dimensions if dimension.searched)

    @property
    def extra(self) -> tuple[str, ...]:
        """Names that training does not know."""
        return tuple(one.name for one in self.dimensions if one.name not in (*KNOBS, *SETTINGS, *self.own))

    @property
    def own(self) -> tuple[str, ...]:
        """The dimension that several models make."""
        return tuple(d.name for d in self.dimensions if d.name == DIMENSION and d.source == MODELS)

    @property
    def named(self) -> frozenset[str]:
        """Names of all dimensions."""
        return frozenset(dimension.name for dimension in self.dimensions)

    def largest(self, name: str, usual: float) -> float:
        """The largest value that a configuration can ask for; ``usual`` where no dimension decides it."""
        here = name in self.named
        values = [float(value) for value in self.values_of(name)] if here else []
        always = here and not self[name].when
        return max(values if always else [*values, usual])

    def targets(self, usual: str) -> str:
        """All that configurations may put adapters on, by commas; ``usual`` where no dimension decides it."""
        here = "targets" in self.named
        values = [str(value) for value in self.values_of("targets")] if here else []
        always = here and not self["targets"].when
        every = values if always else [*values, usual]
        return ",".join(dict.fromkeys(word for value in every for word in words_of(value)))

    def __getitem__(self, name: str) -> Dimension:
        """The dimension of this name.

        Raises:
            SpaceError: there is none.
        """
        for dimension in self.dimensions:
            if dimension.name == name:
                return dimension
        known = [dimension.name for dimension in self.dimensions]
        raise self._error(f"has no dimension {name!r}{nearest(name, known)}; it has {', '.join(known)}")

    @property
    def quantizations(self) -> tuple[str, ...]:
        """The quantizations that a configuration can ask for."""
        return tuple(str(value) for value in self.values_of("quantization"))

    @property
    def cost_classes(self) -> tuple[str, ...]:
        """What is calibrated apart: the quantizations; where a free space has none, all in one."""
        if self.free and "quantization" not in self.named:
            return (cost_class({}),)
        if self.free or DIMENSION not in self.named:
            return self.quantizations
        models = [str(value) for value in self.values_of(DIMENSION)]
        return tuple(Base(model, name).name for name in self.quantizations for model in models)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that a configuration can ask for; of a range its ends and its middle."""
        return tuple(int(value) for value in self.values_of("rank"))

    def values_of(self, name: str) -> tuple[ParamValue, ...]:
        """The values of a dimension; of a range its ends and its middle."""
        dimension = self[name]
        if isinstance(dimension, Number):
            middle = dimension.value_at(0.5) if dimension.searched else dimension.default()
            return tuple(dict.fromkeys((*dimension.corners(), middle)))
        return _corners(dimension, {d.name: d for d in self.dimensions}, f"search space {self.name!r}")

    def default(self) -> Params:
        """The likeliest configuration: every prior at its mode."""
        return self._resolve(lambda dimension: dimension.default())

    def size(self, most: int) -> int:
        """How many different configurations there are, ``most`` at the most: a space of short choices may
        hold fewer than a budget could try.
        """
        free = [dimension for dimension in self.dimensions if dimension.searched]
        choices = [dimension for dimension in free if isinstance(dimension, Choice)]
        if len(choices) < len(free):
            return most
        columns = [[d.position_of(value) for value in d.values] for d in choices]
        found: set[tuple[tuple[str, ParamValue], ...]] = set()
        for positions in itertools.product(*columns):
            unit = {d.name: x for d, x in zip(choices, positions, strict=True)}
            found.add(tuple(sorted(self.from_unit(unit).items())))
            if len(found) >= most:
                break
        return len(found)

    def from_unit(self, unit: Mapping[str, float]) -> Params:
        """The configuration at a point of the unit cube, through the priors' quantiles.

        Args:
            unit: a number from 0 to 1 for each searched dimension; one that turns out not to
                count here may be left out, and other names are ignored.

        Raises:
            SpaceError: a number is missing or outside 0 to 1.
        """

        def pick(dimension: Own) -> ParamValue:
            if isinstance(dimension, Constant) or not dimension.searched:
                return dimension.default()
            position = unit.get(dimension.name, math.nan)
            if not 0.0 <= position <= 1.0:
                raise self._error(
                    f"dimension {dimension.name!r} needs a position from 0 to 1, not {position}"
                )
            return dimension.value_at(position)

        return self._resolve(pick)

    def to_unit(self, params: Params) -> dict[str, float]:
        """The inverse of ``from_unit``: a position for each searched dimension that counts here.

        Raises:
            SpaceError: the configuration is none of this space.
        """
        self.validate(params)
        return {
            dimension.name: dimension.position_of(params[dimension.name])
            for dimension in self.dimensions
            if isinstance(dimension, (Number, Choice)) and dimension.searched and dimension.name in params
        }

    def validate(self, params: Params) -> None:
        """Check a configuration.

        Raises:
            SpaceError: a name or a value that this space does not have, or one that is missing.
        """
        for name in params:
            self[name]
        for dimension in self.dimensions:
            if self._counts(dimension, params) != (dimension.name in params):
                state = "does not count here" if dimension.name in params else "is missing"
                raise self._error(f"dimension {dimension.name!r} {state} in {dict(params)}")
            problem = self._problem(dimension, params) if dimension.name in params else ""
            if problem:
                raise self._error(f"dimension {dimension.name!r} {problem}")

    def restrict(self, name: str, allowed: Sequence[ParamValue]) -> Space:
        """The same space with only the ``allowed`` values of one choice.

        Conditions on values that are gone go too, and with them dimensions that can never count.

        Raises:
            SpaceError: nothing remains, or the dimension has no list of values.
        """
        old = self[name]
        if isinstance(old, (Number, Tied)):
            raise self._error(f"dimension {name!r} has no list of values to restrict")
        kept = [value for value in old.corners() if value in allowed]
        if not kept:
            had = ", ".join(map(str, old.corners()))
            raise self._error(f"dimension {name!r} has none of {list(allowed)}; it has {had}")
        new = _narrow(old, kept) if isinstance(old, Choice) else old
        changed = tuple(new if dimension.name == name else dimension for dimension in self.dimensions)
        space = replace(self, dimensions=_prune(changed, name, kept))
        space._check(f"search space {self.name!r}")
        return space

    def centered(self, name: str, center: float, source: str) -> Space:
        """The same space with the prior of a range moved to this centre, or the nearest that the range has;
        it follows nothing any more."""
        old = self[name]
        if not isinstance(old, Number) or old.prior is None:
            raise self._error(f"dimension {name!r} has no prior with a centre")
        reach = old.prior.spread * REACH
        low, high = old.low, old.high
        if old.log:
            low, high = max(low, high / 10**reach), min(high, low * 10**reach)
        prior = Normal(min(max(center, low), high), old.prior.spread)
        new = replace(old, prior=prior, source="; ".join(filter(None, (source, old.source))))
        return replace(self, dimensions=tuple(new if d.name == name else d for d in self.dimensions))

    def _resolve(self, pick: Callable[[Own], ParamValue]) -> Params:
        found: dict[str, ParamValue] = {}
        for dimension in self.dimensions:
            if not isinstance(dimension, Tied) and dimension.active(found):
                found[dimension.name] = pick(dimension)
        for dimension in self.dimensions:
            if isinstance(dimension, Tied) and self._counts(dimension, found):
                found[dimension.name] = dimension.follow(found[dimension.to])
        return {item.name: found[item.name] for item in self.dimensions if item.name in found}

    def _counts(self, dimension: Dimension, params: Params) -> bool:
        return dimension.active(params) and not (isinstance(dimension, Tied) and dimension.to not in params)

    def _problem(self, dimension: Dimension, params: Params) -> str:
        value = params[dimension.name]
        if not isinstance(dimension, Tied):
            return dimension.problem(value)
        wanted = dimension.follow(params[dimension.to])
        same = is_number(value) and math.isclose(float(value), float(wanted))
        return "" if same else f"is tied to {dimension.to} and must be {wanted}, not {value!r}"

    def _error(self, problem: str) -> SpaceError:
        return SpaceError(f"search space {self.name!r}: {problem}.")

    def _check(self, where: str) -> None:
        """What the dimensions require of each other, and the knobs of their values."""
        names = {dimension.name: dimension for dimension in self.dimensions}
        for name in () if self.free else REQUIRED:
            if name not in names:
                hint = nearest(name, [title for title in names if title not in KNOBS])
                raise SpaceError(f"{where}: the dimension {name!r} is missing{hint}; add it.")
        above: dict[str, Dimension] = {}
        for dimension in self.dimensions:
            here = f"{where}, dimension {dimension.name!r}"
            if dimension.name in above:
                raise SpaceError(f"{here}: it is there twice; take one out.")
            _check_when(dimension, above, here)
            corners = _corners(dimension, names, here)
            if not self.free:
                _check_values(dimension, corners, here)
            above[dimension.name] = dimension


def _items(raw: Any, where: str) -> Iterable[tuple[str, Any]]:
    """Name and body of each dimension, from a mapping (as people write) or a list (as JSON keeps)."""
    if isinstance(raw, Mapping) and raw:
        return [(str(name), body) for name, body in raw.items()]
    if isinstance(raw, (list, tuple)) and raw and all(isinstance(item, Mapping) for item in raw):
        bodies = [{key: value for key, value in item.items() if key != "name"} for item in raw]
        return [(str(item.get("name", "")), body) for item, body in zip(raw, bodies, strict=True)]
    raise SpaceError(f"{where}: dimensions must map names to dimensions; add at least {', '.join(REQUIRED)}.")


def _missing(given: Sequence[Dimension]) -> Iterable[Dimension]:
    names = [dimension.name for dimension in given]
    return [dimension for dimension in DEFAULTS if dimension.name not in names]


def _check_when(dimension: Dimension, above: Mapping[str, Dimension], here: str) -> None:
    if dimension.when and dimension.name in KNOBS:
        raise SpaceError(f"{here}: every run needs it, so it takes no when; take the condition out.")
    for name, values in dimension.when:
        parent = above.get(name)
        if not isinstance(parent, (Choice, Constant)):
            hint = nearest(name, above)
            raise SpaceError(
                f"{here}: when names {name!r}{hint}, which is no choice above it; move or mend it."
            )
        for value in values:
            if problem := parent.problem(value):
                raise SpaceError(f"{here}: when: {name} {problem}.")


def _check_values(dimension: Dimension, corners: Sequence[ParamValue], here: str) -> None:
    known = {**KNOBS, **SETTINGS}
    if dimension.name not in known:
        # A slip of the pen would otherwise be searched in vain while the knob keeps its default.
        if close := difflib.get_close_matches(dimension.name, known, n=1, cutoff=0.8):
            raise SpaceError(f"{here}: unknown (did you mean {close[0]!r}?); correct the name.")
        return
    holds, wanted = known[dimension.name]
    for value in corners:
        if not holds(value):
            hint = nearest(str(value), QUANTIZATIONS) if dimension.name == "quantization" else ""
            raise SpaceError(f"{here}: takes {wanted}, not {value!r}{hint}; change the values.")


def _corners(dimension: Dimension, names: Mapping[str, Dimension], here: str) -> tuple[ParamValue, ...]:
    if not isinstance(dimension, Tied):
        return dimension.corners()
    other = names.get(dimension.to)
    if other is None or isinstance(other, Tied) or not all(map(is_number, other.corners())):
        hint = (
            nearest(dimension.to, [name for name in names if name != dimension.name]) if other is None else ""
        )
        raise SpaceError(f"{here}: tied to {dimension.to!r}{hint}, which is no numeric dimension of its own.")
    return tuple(dimension.follow(value) for value in other.corners())


def _narrow(choice: Choice, kept: Sequence[ParamValue]) -> Choice:
    weights = tuple(w for value, w in zip(choice.values, choice.weights, strict=False) if value in kept)
    center = choice.center if choice.center in kept else None
    return replace(choice, values=tuple(kept), weights=weights, center=center)


def _prune(dimensions: Sequence[Dimension], name: str, kept: Sequence[ParamValue]) -> tuple[Dimension, ...]:
    """Drop what can never count once ``name`` has only the ``kept`` values."""
    result: list[Dimension] = []
    gone: set[str] = set()
    for dimension in dimensions:
        when = tuple(
            (parent, tuple(value for value in values if parent != name or value in kept))
            for parent, values in dimension.when
        )
        dead = any(not values or parent in gone for parent, values in when)
        if dead:
            gone.add(dimension.name)
        else:
            result.append(replace(dimension, when=when))
    return tuple(item for item in result if not (isinstance(item, Tied) and item.to in gone))
