"""The unit cube in which the surrogate looks for configurations.

Each searched dimension is one column: the position (0 to 1) on its prior's quantiles, or for a choice
without an order the index of the value. A dimension that does not count in a configuration stands at
the middle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from budgetsearch.core.records import Params
from budgetsearch.core.space.dimensions import Choice
from budgetsearch.core.space.space import Space
from budgetsearch.sampler.surrogate import Array, Observations, Surrogate, expected_improvement, fit

SPREAD_OUT = 300
"""Random candidates."""
NEIGHBOURS, CENTRES = 100, 5
"""Candidates around each of the configurations that are expected to end best."""
STEPS = (0.05, 0.2)
"""Standard deviations of a step from a centre, in units of the whole range."""
CATEGORY = 0.7
"""Two categories are 0.7 * sqrt(2), about one whole range, apart."""


@dataclass(frozen=True)
class Cube:
    """Which columns are categories, and of how many values."""

    categories: tuple[int | None, ...]
    """For each column None, or the number of its values."""

    def features(self, points: Array) -> Array:
        """What the surrogate sees: categories one-hot; shape (n, columns) to (n, features)."""
        columns = []
        for j, count in enumerate(self.categories):
            column = points[:, j : j + 1]
            columns.append(column if count is None else (column == np.arange(count)[None, :]) * CATEGORY)
        return np.concatenate(columns, axis=1)

    def random(self, rng: np.random.Generator, count: int) -> Array:
        """Uniform points."""
        points = rng.random((count, len(self.categories)))
        for j, values in enumerate(self.categories):
            if values is not None:
                points[:, j] = rng.integers(values, size=count)
        return points

    def around(self, rng: np.random.Generator, centre: Array, count: int) -> Array:
        """Points that differ from ``centre`` in some columns, a little or more."""
        points = np.repeat(centre[None, :], count, axis=0)
        width = len(self.categories)
        moved = rng.random((count, width)) < max(0.3, 1.0 / width)
        step = rng.choice(STEPS, size=(count, 1)) * rng.standard_normal((count, width))
        other = self.random(rng, count)
        for j, values in enumerate(self.categories):
            if values is None:
                points[:, j] = np.clip(points[:, j] + moved[:, j] * step[:, j], 0.0, 1.0)
            else:
                points[:, j] = np.where(moved[:, j], other[:, j], points[:, j])
        return points


def parameters(cube: Cube, seen: Observations) -> Array:
    """The surrogate's parameters after these observations (``x`` are points of the cube)."""
    return fit(Observations(cube.features(seen.x), seen.s, seen.y))


@dataclass(frozen=True)
class Suggestions:
    """What the surrogate would try next, the preferred first."""

    points: list[Array]
    surrogate: Surrogate
    best: float
    """Normal score that the best of what is known is expected to end with."""


def suggest(
    cube: Cube,
    seen: Observations,
    fitted: Array,
    rng: np.random.Generator,
    waiting: Array | None = None,
) -> Suggestions:
    """Points by falling expected improvement at the full length over the best expected so far.

    ``waiting``: points that were proposed before and have no result yet, (m, columns).
    """
    surrogate = Surrogate(Observations(cube.features(seen.x), seen.s, seen.y), fitted)
    if waiting is not None and len(waiting):
        surrogate = surrogate.believing(cube.features(waiting))
    known = np.unique(seen.x, axis=0)
    expected, _ = surrogate.predict(cube.features(known))
    centres = known[np.argsort(expected, kind="stable")[:CENTRES]]
    candidates = [cube.random(rng, SPREAD_OUT)]
    candidates += [cube.around(rng, centre, NEIGHBOURS) for centre in centres]
    points = np.concatenate(candidates)
    mean, deviation = surrogate.predict(cube.features(points))
    gain = expected_improvement(mean, deviation, float(expected.min()))
    found = [points[k] for k in np.argsort(-gain, kind="stable")]
    return Suggestions(found, surrogate, float(expected.min()))


def row(columns: Sequence[str], point: Mapping[str, float]) -> list[float]:
    """A point as a row; a column that does not count stands at the middle."""
    return [point.get(name, 0.5) for name in columns]


def cube_of(space: Space) -> Cube:
    """The unit cube that the model searches: positions on the priors, and indices of categories."""
    categories = _categories(space)
    return Cube(
        tuple(len(categories[name].values) if name in categories else None for name in space.searched)
    )


def to_row(space: Space, params: Params) -> list[float]:
    """A configuration as a point of the cube."""
    categories = _categories(space)
    unit = space.to_unit(params)
    point = {
        name: float(categories[name].values.index(params[name])) if name in categories else position
        for name, position in unit.items()
    }
    return row(space.searched, point)


def from_point(space: Space, point: Iterable[float]) -> Params:
    """The configuration at a point of the cube."""
    categories = _categories(space)
    unit = {}
    for name, value in zip(space.searched, point, strict=True):
        if name in categories:
            choice = categories[name]
            unit[name] = choice.position_of(choice.values[int(value)])
        else:
            unit[name] = float(value)
    return space.from_unit(unit)


def _categories(space: Space) -> dict[str, Choice]:
    return {d.name: d for d in space.dimensions if isinstance(d, Choice) and d.searched and not d.ordered}
