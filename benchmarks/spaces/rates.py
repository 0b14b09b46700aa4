"""Which learning rate suits which model: a fit to a published sweep, and what it saves a search.

The sweep holds test losses of LoRA at several rates and ranks for each of many models, with alpha fixed. What
suits a model and rank is the middle of the rates that lose next to nothing: beyond them lies, on one side, a
cliff. Its logarithm is fitted by the width of the model and by the rank, with and without an offset for the
family. Every model is then foreseen from the others alone, and the first trials of a search are read from its
curve: with the space as it was (2e-4, alpha twice the rank) and as it is.

    python -m benchmarks.spaces.rates --table sft_sweep.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training.common import write
from budgetsearch.core.space.space import Space
from budgetsearch.machine.rates import WIDE
from budgetsearch.run.spaces import load_space
from budgetsearch.sampler.sampler import stratified

SIZES: Mapping[str, tuple[int, str]] = {
    "deepseek-ai/DeepSeek-V3.1": (7168, "deepseek"),
    "meta-llama/Llama-3.1-70B": (8192, "llama"),
    "meta-llama/Llama-3.1-8B-Instruct": (4096, "llama"),
    "meta-llama/Llama-3.2-3B": (3072, "llama"),
    "moonshotai/Kimi-K2-Thinking": (7168, "deepseek"),
    "moonshotai/Kimi-K2.6": (7168, "deepseek"),
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16": (4096, "nemotron_h"),
    "openai/gpt-oss-120b": (2880, "gpt_oss"),
    "Qwen/Qwen3-235B-A22B-Instruct-2507": (4096, "qwen3"),
    "Qwen/Qwen3-30B-A3B-Base": (2048, "qwen3"),
    "Qwen/Qwen3-32B": (5120, "qwen3"),
    "Qwen/Qwen3-8B": (4096, "qwen3"),
    "Qwen/Qwen3-VL-235B-A22B-Instruct": (4096, "qwen3"),
    "Qwen/Qwen3.5-27B": (5120, "qwen3_5"),
    "Qwen/Qwen3.5-35B-A3B-Base": (2048, "qwen3_5"),
    "Qwen/Qwen3.5-4B": (2560, "qwen3_5"),
    "Qwen/Qwen3.5-9B-Base": (4096, "qwen3_5"),
    "Qwen/Qwen3.6-35B-A3B": (2048, "qwen3_5"),
}
"""hidden_size of each model's config.json, and the family that its layers are of."""
ALPHA, RANK = 32, 32
"""Alpha of the sweep, and the rank at which the fit stands: the middle one of the space."""
DIVERGED = 2.0
"""A loss that stands for all larger ones."""
NEXT_TO_NOTHING = 0.005
"""Nats above the best rate's loss."""
SHRINK = {"width": 0.1, "rank": 0.3, "family": 2.0}
"""Ridge penalties: a family of two models gets half of its own offset."""
FIXED = 2e-4
"""The centre as it was."""
RANKS = (8, 16, 32, 64, 128)
FIRST, SEEDS = (1, 4, 8), 20
GRID = np.linspace(math.log10(4e-5), math.log10(3e-3), 400)
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Swept:
    """A model of the sweep."""

    name: str
    curves: Mapping[int, Mapping[float, float]]
    """Loss by rank and rate."""

    @property
    def width(self) -> float:
        """log10 over the width at which the fit stands."""
        return math.log10(SIZES[self.name][0] / WIDE)

    @property
    def family(self) -> str:
        """What the fit may have an offset for."""
        return SIZES[self.name][1]

    @property
    def suiting(self) -> dict[int, float]:
        """log10 of the rate that suits, by rank; where three rates were measured."""
        return {rank: _middle(curve) for rank, curve in self.curves.items() if len(curve) >= 3}

    def nearest(self, rank: float) -> Mapping[float, float]:
        """The curve of the measured rank that is nearest."""
        return self.curves[min(self.curves, key=lambda one: abs(math.log(one / rank)))]

    def loss(self, rank: float, rate: float) -> float:
        """Of the nearest measured rank, between measured rates on straight lines."""
        curve = sorted(self.nearest(rank).items())
        return float(np.interp(math.log10(rate), [math.log10(x) for x, _ in curve], [y for _, y in curve]))

    def regret(self, rate: float) -> float:
        """What a rate loses against the best one of each rank, on average over the space's ranks."""
        return float(np.mean([self.loss(rank, rate) - min(self.nearest(rank).values()) for rank in RANKS]))

    @property
    def least(self) -> float:
        """The best loss of all."""
        return min(min(curve.values()) for curve in self.curves.values())


@dataclass(frozen=True)
class Fit:
    """log10 of the rate that suits: a constant, a slope over the width and one over the rank, offsets."""

    constant: float
    per_width: float
    per_rank: float
    families: Mapping[str, float]

    def of(self, model: Swept, rank: float = RANK) -> float:
        """For one model and rank."""
        slopes = self.per_width * model.width + self.per_rank * math.log10(rank / RANK)
        return self.constant + slopes + self.families.get(model.family, 0.0)


def read(path: Path) -> list[Swept]:
    """The models of a sweep's table."""
    found = []
    for one in json.loads(path.read_text(encoding="utf-8"))["models"]:
        curves: dict[int, dict[float, float]] = {}
        for rate, rank, loss in one["rows"]:
            curve = curves.setdefault(int(rank), {})
            curve[rate] = min(loss, curve.get(rate, loss))
        _, rates, ranks = one["diverged"] or ("", "", "")
        for rank in filter(None, ranks.split(",")):
            for rate in rates.split(","):
                curves.setdefault(int(rank), {}).setdefault(float(rate), DIVERGED)
        found.append(Swept(one["model"], curves))
    return found


def _middle(curve: Mapping[float, float]) -> float:
    rates = sorted(curve)
    losses = np.interp(GRID, [math.log10(rate) for rate in rates], [curve[rate] for rate in rates])
    measured = math.log10(rates[-1]) + 1e-9 >= GRID
    good = GRID[measured & (losses <= min(curve.values()) + NEXT_TO_NOTHING)]
    return float(good.min() + good.max()) / 2


def fitted(models: Sequence[Swept], *, families: bool = False) -> Fit:
    """Least squares with ridge penalties; every model counts once, however many ranks it has."""
    names = sorted({model.family for model in models}) if families else []
    rows, targets, weights = [], [], []
    for model in models:
        for rank, best in model.suiting.items():
            own = [float(model.family == name) for name in names]
            rows.append([1.0, model.width, math.log10(rank / RANK), *own])
            targets.append(best)
            weights.append(1.0 / len(model.suiting))
    x, y, weight = np.array(rows), np.array(targets), np.array(weights)[:, None]
    penalty = np.diag([0.0, SHRINK["width"], SHRINK["rank"], *[SHRINK["family"]] * len(names)])
    constant, width, rank, *offsets = np.linalg.solve((x * weight).T @ x + penalty, (x * weight).T @ y)
    shown = {name: round(float(value), 3) for name, value in zip(names, offsets, strict=True)}
    return Fit(round(float(constant), 3), round(float(width), 3), round(float(rank), 3), shown)


def foreseen(models: Sequence[Swept]) -> list[dict[str, Any]]:
    """Every model's centre as the others foresee it, and what it loses; beside the fixed one, at the sweep's
    alpha and as it was with alpha twice the rank."""
    found = []
    for model in models:
        others = [one for one in models if one is not model]
        suits = float(np.mean(list(model.suiting.values())))
        own: dict[str, Any] = {"model": model.name, "suits": _short(10**suits)}
        for way, families in (("width", False), ("width_and_family", True)):
            fit = fitted(others, families=families)
            apart = [fit.of(model, rank) - best for rank, best in model.suiting.items()]
            rate = 10 ** fit.of(model)
            own[way] = {"rate": _short(rate), "decades_off": _rms(apart), "regret": _cut(model.regret(rate))}
        apart = [math.log10(FIXED) - best for best in model.suiting.values()]
        own["fixed"] = {"rate": FIXED, "decades_off": _rms(apart), "regret": _cut(model.regret(FIXED))}
        found.append(own)
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Over all models, by way."""
    return {
        way: {
            "decades_off": _rms([row[way]["decades_off"] for row in rows]),
            "mean_regret": _cut(float(np.mean([row[way]["regret"] for row in rows]))),
            "worst_regret": max(row[way]["regret"] for row in rows),
        }
        for way in ("fixed", "width", "width_and_family")
    }


def first_trials(models: Sequence[Swept], space: Space, *, follows: bool) -> dict[str, float]:
    """Nats above a model's best of the best of its first trials, on average over models and seeds.

    A rate at another alpha than the sweep's is read as the rate times alpha over the sweep's.
    """
    found: dict[int, list[float]] = {count: [] for count in FIRST}
    for model in models:
        own = space
        if follows:
            others = [one for one in models if one is not model]
            own = space.centered("learning_rate", 10 ** fitted(others).of(model), "")
        for seed in range(SEEDS):
            trials = [own.default(), *(stratified(own, seed, n) for n in range(1, max(FIRST)))]
            losses = [
                model.loss(float(t["rank"]), float(t["learning_rate"]) * float(t["alpha"]) / ALPHA)
                for t in trials
            ]
            for count in FIRST:
                found[count].append(min(losses[:count]) - model.least)
    return {f"first {count}": _cut(float(np.mean(values))) for count, values in found.items()}


def before(space: Space) -> Space:
    """The space as it was: alpha twice the rank, the rate around 2e-4."""
    raw = space.to_dict()
    changed = {
        "alpha": {"kind": "tied", "to": "rank", "factor": 2},
        "learning_rate": {
            "kind": "float",
            "low": 1e-5,
            "high": 1e-3,
            "log": True,
            "prior": {"center": FIXED, "spread": 0.5},
        },
    }
    dimensions = [{"name": d["name"], **changed.get(d["name"], d)} for d in raw["dimensions"]]
    return Space.parse({**raw, "dimensions": dimensions})


def _rms(differences: Sequence[float]) -> float:
    return round(float(np.sqrt(np.mean(np.square(differences)))), 3)


def _cut(value: float) -> float:
    return round(value, 4)


def _short(rate: float) -> float:
    return float(f"{rate:.2g}")


def main() -> None:
    """Fit, and write what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", type=Path, required=True, help="the sweep as JSON")
    options = parser.parse_args()
    models = read(options.table)
    rows, space = foreseen(models), load_space("lora")
    found = {
        "table": "thinking-machines-lab/tinker-cookbook 9dfcc3a, chat_sl/results/sft_sweep.md (Apache-2.0)",
        "fit": {"at_width": WIDE, "at_rank": RANK, "alpha": ALPHA, **vars(fitted(models))},
        "left_out": summary(rows),
        "first_trials": {
            "before": first_trials(models, before(space), follows=False),
            "now": first_trials(models, space, follows=True),
        },
        "models": rows,
    }
    print(json.dumps({key: found[key] for key in ("fit", "left_out", "first_trials")}, indent=1))
    write("rates", found, RESULTS)


if __name__ == "__main__":
    main()
