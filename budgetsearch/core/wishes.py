"""A person's hand on a search: first guesses before it, and wishes while it goes.

A wish becomes events, and all decisions follow from those: a configuration to try is a trial like any other,
with the origin ``hand``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import SpaceError
from budgetsearch.core.records import Params, ParamValue
from budgetsearch.core.space.dimensions import is_number
from budgetsearch.core.space.space import Choice, Constant, Number, Space

HAND = "hand"
"""The origin of a trial that a person asked for."""
Action = Literal["try", "drop", "promote"]


@dataclass(frozen=True)
class Wish:
    """What a person asks of a run that goes."""

    action: Action
    trial_id: int | None = None
    """Whose; None for a configuration to try."""
    guess: str = ""
    """The configuration: ``rank=16,learning_rate=2e-4``; what it leaves out is the likeliest of the space."""


def read_guess(text: str, space: Space) -> Params:
    """A configuration of a space from what a person wrote.

    Raises:
        SpaceError: a name or a value that the space does not have; names what it has.
    """
    named: dict[str, str] = {}
    for part in filter(str.strip, text.split(",")):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not value:
            raise SpaceError(f"{text!r}: {part.strip()!r} is no NAME=VALUE, such as rank=16.")
        named[name] = value
    if not named:
        raise SpaceError("a configuration to try is empty; write for example rank=16,learning_rate=2e-4.")
    unit = {d.name: d.position_of(d.default()) for d in space.dimensions if isinstance(d, (Number, Choice))}
    for name, value in named.items():
        dimension = space[name]
        if not isinstance(dimension, (Number, Choice, Constant)):
            raise SpaceError(f"{text!r}: {name} is tied to {dimension.to} in the space; leave it out.")
        known = _value(value)
        if problem := dimension.problem(known):
            raise SpaceError(f"{text!r}: {name} {problem}. Give a value of the search space {space.name}.")
        if isinstance(dimension, (Number, Choice)):
            unit[name] = dimension.position_of(known)
    found = space.from_unit(unit)
    exact = {name: _value(value) for name, value in named.items() if name in found}
    return {name: _like(exact.get(name, value), value) for name, value in found.items()}


def _value(text: str) -> ParamValue:
    try:
        value = read_json(text)
    except ValueError:
        return text
    plain = isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else text


def _like(exact: ParamValue, rounded: ParamValue) -> ParamValue:
    """What the person wrote, where the way through the prior has rounded it."""
    if not (is_number(exact) and is_number(rounded)):
        return rounded
    return exact if math.isclose(float(exact), float(rounded), rel_tol=1e-6) else rounded


def as_guess(params: Params, space: Space) -> str:
    """A configuration as a person would write it."""
    return ",".join(f"{name}={_text(params[name])}" for name in space.searched if name in params)


def _text(value: ParamValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def guesses_of(tries: str | None) -> Sequence[str]:
    """The configurations that a setting holds, one a line."""
    return [line for line in (tries or "").splitlines() if line.strip()]
