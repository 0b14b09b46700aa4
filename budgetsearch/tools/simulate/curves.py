"""Recorded learning curves: one table of configurations, cumulative seconds and a metric.

The file is a NumPy archive (``.npz``, nothing pickled) with

=========  ==========================================================================================
``hp``     (n, d) the configurations; of a category the index of its choice
``val``    (n, T) the metric at each recorded point; NaN after a run's own end, and NaN inside a run
           where it diverged
``sec``    (n, T) seconds from the run's start to each point, rising; NaN after its own end
``space``  JSON: name -> ``{"type": "float" | "int", "low": ..., "high": ..., "log": true | false}`` or
           ``{"type": "cat", "choices": [...]}``, in the order of the columns of ``hp``
``meta``   JSON: ``{"direction": "minimize" | "maximize"}`` and whatever else describes the data
=========  ==========================================================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import DataError
from budgetsearch.core.records import Params

Array = NDArray[np.float64]


class Curves(Protocol):
    """Where a simulation takes its learning curves from; lower values are better."""

    name: str
    count: int
    """How many configurations there are."""
    points: int
    """Recorded points of the longest run."""
    mean_cost: float
    """Mean seconds of a run to its own end."""
    point_cost: float
    """Mean seconds from one point to the next."""
    best: float
    """The best value there is."""
    median: float
    """The median of the configurations' best values."""
    worst: float
    """What stands for a diverged run: no finite value is worse."""
    own_lengths: bool
    """Runs that did not diverge end at lengths of their own, as under schedules that end there."""

    @property
    def space(self) -> dict[str, Any]:
        """The search space as ``Space.parse`` reads it."""
        ...

    def nearest(self, params: Params, taken: set[int]) -> tuple[Params, int]:
        """What can be run in place of ``params``, and its number; never one that is taken."""
        ...

    def curve(self, params: Params) -> tuple[Array, Array]:
        """Seconds and values of a run; a value that is not finite ends it."""
        ...

    def left(self, taken: set[int]) -> bool:
        """Whether there is a configuration that nobody has taken."""
        ...


class CurveTable:
    """A table of recorded runs; a configuration that is not in it is replaced by its nearest free row."""

    def __init__(
        self,
        name: str,
        rows: Array,
        seconds: Array,
        values: Array,
        dimensions: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """``values`` are lower-is-better: of a metric to maximise, its negative."""
        self.name, self.dimensions = name, dimensions
        self._seconds, self._values = seconds, values
        self._lengths = np.isfinite(seconds).sum(axis=1)
        everyone = np.arange(len(rows))
        costs = seconds[everyone, self._lengths - 1]
        self.count = len(rows)
        self.points = int(values.shape[1])
        ended = self._lengths[np.isfinite(values[everyone, self._lengths - 1])]
        self.own_lengths = len(np.unique(ended)) > 1
        self.mean_cost = float(costs.mean())
        self.point_cost = float(costs.mean() / self._lengths.mean())
        self.worst = float(values[np.isfinite(values)].max())
        bests = np.array([np.nanmin(v) if np.isfinite(v).any() else self.worst for v in values])
        self.best = float(bests.min())
        self.median = float(np.median(bests))
        self._unit = self._units(rows)
        self._configurations = [self._params(row) for row in rows]
        self._numbers = {_key(params): k for k, params in enumerate(self._configurations)}

    @property
    def space(self) -> dict[str, Any]:
        """The search space as ``Space.parse`` reads it."""
        return space_of(self.name, self.dimensions)

    def nearest(self, params: Params, taken: set[int]) -> tuple[Params, int]:
        """The nearest row that is not taken, by distance in the unit cube; a category counts 1."""
        away = self._unit - self._units(np.array([self._row(params)]))
        for j, dimension in enumerate(self.dimensions.values()):
            if dimension["type"] == "cat":
                away[:, j] = away[:, j] != 0
        distance = (away * away).sum(axis=1)
        distance[list(taken)] = np.inf
        number = int(distance.argmin())
        return self._configurations[number], number

    def curve(self, params: Params) -> tuple[Array, Array]:
        """Seconds and values of the row with exactly these parameters."""
        number = self._numbers[_key(params)]
        length = self._lengths[number]
        return self._seconds[number, :length], self._values[number, :length]

    def left(self, taken: set[int]) -> bool:
        """Whether there is a row that nobody has taken."""
        return len(taken) < len(self._configurations)

    def _row(self, params: Params) -> list[float]:
        return [
            float(d["choices"].index(params[name])) if d["type"] == "cat" else float(params[name])
            for name, d in self.dimensions.items()
        ]

    def _params(self, row: Array) -> Params:
        found: dict[str, Any] = {}
        for value, (name, d) in zip(row, self.dimensions.items(), strict=True):
            if d["type"] == "cat":
                found[name] = d["choices"][int(value)]
            else:
                inside = min(max(float(value), float(d["low"])), float(d["high"]))
                found[name] = round(inside) if d["type"] == "int" else inside
        return found

    def _units(self, rows: Array) -> Array:
        unit = np.array(rows, dtype=float)
        for j, d in enumerate(self.dimensions.values()):
            if d["type"] == "cat":
                continue
            low, high = float(d["low"]), float(d["high"])
            if d.get("log"):
                unit[:, j] = np.log(np.maximum(rows[:, j], low) / low) / math.log(high / low)
            else:
                unit[:, j] = (rows[:, j] - low) / (high - low)
        return unit


def _key(params: Params) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items()))


def space_of(name: str, dimensions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The free search space of a table's dimensions."""
    bodies: list[dict[str, Any]] = []
    for title, d in dimensions.items():
        if d["type"] == "cat":
            bodies.append({"name": title, "kind": "choice", "values": list(d["choices"])})
        else:
            log = bool(d.get("log"))
            bodies.append({"name": title, "kind": d["type"], "low": d["low"], "high": d["high"], "log": log})
    return {"name": name, "free": True, "dimensions": bodies}


def load(path: Path) -> CurveTable:
    """Read a table.

    Raises:
        DataError: the file is missing, no archive, or not in the format above; it says what to change.
    """
    if not path.is_file():
        raise DataError(f"There are no curves at {path}.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            parts = {key: archive[key] for key in archive.files}
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not a NumPy archive (.npz) without pickled objects: {error}") from error
    missing = [key for key in ("hp", "val", "sec", "space", "meta") if key not in parts]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; docs/curves.md describes the format.")
    try:
        dimensions, meta = read_json(str(parts["space"])), read_json(str(parts["meta"]))
    except ValueError as error:
        raise DataError(f"{path}: space and meta must be JSON: {error}") from error
    return _checked(str(path), path.stem, parts, dimensions, str(meta.get("direction", "")))


def _checked(
    where: str, name: str, parts: Mapping[str, Any], dimensions: Mapping[str, Any], direction: str
) -> CurveTable:
    rows, values, seconds = (np.asarray(parts[key], dtype=float) for key in ("hp", "val", "sec"))
    if direction not in ("minimize", "maximize"):
        raise DataError(f"{where}: meta must have direction minimize or maximize, not {direction!r}.")
    if values.shape != seconds.shape or values.ndim != 2 or rows.shape != (len(values), len(dimensions)):
        raise DataError(
            f"{where}: hp {rows.shape}, val {values.shape} and sec {seconds.shape} must be (n, d), (n, T) "
            f"and (n, T), with d = {len(dimensions)} dimensions in space."
        )
    lengths = np.isfinite(seconds).sum(axis=1)
    if len(values) < 2 or (lengths == 0).any():
        raise DataError(
            f"{where}: takes two runs or more, each with a recorded time (sec) at its first point."
        )
    for number, length in enumerate(lengths):
        times = seconds[number, :length]
        if not np.isfinite(times).all() or times[0] < 0 or (np.diff(times) < 0).any():
            raise DataError(f"{where}: sec of run {number} must rise without a gap.")
    if not np.isfinite(values).any():
        raise DataError(f"{where}: val holds no finite value.")
    sign = 1.0 if direction == "minimize" else -1.0
    return CurveTable(name, rows, seconds, sign * values, dimensions)


def save(
    path: Path,
    configurations: Sequence[Mapping[str, Any]],
    curves: Sequence[Iterable[tuple[float, float]]],
    dimensions: Mapping[str, Mapping[str, Any]],
    direction: str,
) -> None:
    """Write a table: for each configuration its curve as (cumulative seconds, value) pairs.

    Raises:
        DataError: the curves do not make a table.
    """
    pairs = [list(curve) for curve in curves]
    longest = max((len(p) for p in pairs), default=0)
    values = np.full((len(pairs), longest), np.nan)
    seconds = np.full((len(pairs), longest), np.nan)
    for k, curve in enumerate(pairs):
        for t, (at, value) in enumerate(curve):
            seconds[k, t], values[k, t] = at, value
    rows = np.array(
        [
            [d["choices"].index(c[n]) if d["type"] == "cat" else float(c[n]) for n, d in dimensions.items()]
            for c in configurations
        ]
    )
    parts: dict[str, Any] = {"hp": rows, "val": values, "sec": seconds}
    _checked(str(path), path.stem, parts, dimensions, direction)
    meta = json.dumps({"direction": direction})
    np.savez_compressed(path, space=json.dumps(dict(dimensions)), meta=meta, **parts)
