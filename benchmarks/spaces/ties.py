"""Does the best learning rate depend on the rank? Rates x ranks on a real model, alpha fixed or tied to rank.

Every configuration trains alone to the same number of tokens, with a cooldown at its end; its loss is that of
its averaged weights. For each tie the table says which rate is best at each rank, and how far the best
rates of the ranks lie apart: the parametrization in which they lie together can be searched rank by rate.

    python -m benchmarks.spaces.ties --tokens 30000

It needs a quiet machine: on two CPU cores 32 configurations take about an hour and a half.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.common import DATA, device_name, fetch, make_shop, say, tokenized, write
from budgetsearch.core.records import Params, Schedule, Segment
from budgetsearch.training.bases import load_base
from budgetsearch.training.members import Shop
from budgetsearch.training.recipe import GangTraining

TIES: Mapping[str, Any] = {"fixed": lambda rank: 32.0, "tied": lambda rank: 2.0 * rank}
"""alpha as a function of the rank; both are 32 at rank 16."""
RANKS = (4, 8, 16, 32)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
EXAMPLES = 64
RESULTS = Path(__file__).parent / "results"


def configurations(
    ranks: Iterable[int] = RANKS, rates: Iterable[float] = RATES
) -> list[tuple[str, int, float]]:
    """(tie, rank, rate); where both ties are the same configuration it stands once."""
    grid = itertools.product(TIES, ranks, rates)
    return [(tie, rank, rate) for tie, rank, rate in grid if tie == "fixed" or TIES[tie](rank) != 32.0]


def measure(base: Any, shop: Shop, params: Params, tokens: int, batch_size: int) -> float:
    """Validation loss after so many tokens; infinite where training diverged."""
    step = batch_size * shop.data.train_stats.mean_row_tokens
    segment = Segment(
        trial_id=0,
        params=params,
        seed=0,
        rung=0,
        start_tokens=0,
        stop_tokens=tokens,
        schedule=Schedule(int(min(20 * step, tokens / 18)), tokens, tokens // 5),
        batch_size=batch_size,
        micro_batch=batch_size,
    )
    training = GangTraining.set_up(base, [segment], shop)
    training.train()
    training.evaluate(EXAMPLES)
    found = training.evaluated.get(0)
    return found.loss if found is not None else math.inf


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The best rate of each rank under each tie, and how many decades the best rates span."""
    rows = list(rows)
    table: dict[str, Any] = {}
    for tie in TIES:
        own = [row for row in rows if row["alpha"] == TIES[tie](row["rank"]) and math.isfinite(row["loss"])]
        best = {
            rank: min((r for r in own if r["rank"] == rank), key=lambda r: r["loss"])["learning_rate"]
            for rank in sorted({row["rank"] for row in own})
        }
        logs = [math.log10(rate) for rate in best.values()]
        table[tie] = {"best_rate": best, "decades": round(max(logs) - min(logs), 3) if logs else None}
    return table


def main() -> None:
    """Run, and write the JSON after every configuration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="ties-cpu")
    options = parser.parse_args()
    base = fetch()
    shop = make_shop(base, tokenized(base, options.data), options.device)
    model, rows = load_base(str(base.path), "fp32", options.device), []
    for tie, rank, rate in configurations():
        alpha = TIES[tie](rank)
        params: Params = {"quantization": "fp32", "rank": rank, "learning_rate": rate, "alpha": alpha}
        loss = measure(model, shop, {**params, "dropout": 0.0}, options.tokens, options.batch_size)
        rows.append({"rank": rank, "alpha": alpha, "learning_rate": rate, "loss": loss})
        say(f"{rows[-1]}")
        found = {
            "device": device_name(options.device),
            "torch": torch.__version__,
            "model": base.source,
            "data": options.data,
            "tokens": options.tokens,
            "batch_size": options.batch_size,
            "examples": EXAMPLES,
            "summary": summary(rows),
            "rows": [{**row, "loss": row["loss"] if math.isfinite(row["loss"]) else None} for row in rows],
        }
        write(options.name, found, RESULTS)


if __name__ == "__main__":
    main()
