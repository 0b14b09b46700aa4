"""Tables of synthetic learning curves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from budgetsearch.tools.simulate.curves import CurveTable, load, save

DIMENSIONS = {
    "rate": {"type": "float", "low": 1e-4, "high": 1.0, "log": True},
    "layers": {"type": "int", "low": 1, "high": 5, "log": False},
    "kind": {"type": "cat", "choices": ["a", "b"]},
}


def make_table(
    path: Path,
    count: int = 120,
    points: int = 27,
    seed: int = 0,
    *,
    diverge: float = 0.1,
    short: bool = False,
) -> CurveTable:
    """Power-law curves towards a floor that the configuration decides; some diverge, some are short."""
    rng = np.random.default_rng(seed)
    configurations, curves = [], []
    for _ in range(count):
        params = {
            "rate": float(10 ** rng.uniform(-4, 0)),
            "layers": int(rng.integers(1, 6)),
            "kind": str(rng.choice(["a", "b"])),
        }
        floor = 0.3 * (math.log10(params["rate"]) + 2) ** 2 + 0.05 * params["layers"]
        length = int(rng.choice([points // 3, points])) if short else points
        cost = float(rng.uniform(0.5, 2.0))
        curve = [(cost * (k + 1), floor + 2 * (k + 1) ** -0.7) for k in range(length)]
        if rng.random() < diverge:
            curve[length // 2] = (curve[length // 2][0], math.nan)
        configurations.append(params)
        curves.append(curve)
    save(path, configurations, curves, DIMENSIONS, "minimize")
    return load(path)
