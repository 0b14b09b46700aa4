"""The dimension that several base models make of a search space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from budgetsearch.core.bases import DIMENSION
from budgetsearch.core.errors import SpaceError
from budgetsearch.core.space.dimensions import Choice
from budgetsearch.core.space.space import MODELS, Space


def with_models(space: Space, labels: Sequence[str]) -> Space:
    """The same space with a choice between several models, above everything else.

    Raises:
        SpaceError: it has such a dimension already.
    """
    if DIMENSION in space.named:
        raise SpaceError(
            f"search space {space.name!r}: dimension {DIMENSION!r}: the models are those of --model; take "
            "it out."
        )
    several = Choice(name=DIMENSION, values=tuple(labels), source=MODELS)
    return replace(space, dimensions=(several, *space.dimensions))


def without_models(space: Space) -> Space:
    """The same space as each of the models has it."""
    return replace(space, dimensions=tuple(d for d in space.dimensions if d.name not in space.own))
