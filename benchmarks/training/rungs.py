"""Which weights rank configurations best at a rung: raw, averaged, or after a short cooldown branch?

Random configurations train on the real model, each to the end of a full run with its cooldown. At the
rungs the validation loss is measured with the raw weights, with the averaged ones, and at the end of a
branch that cools down over a fifth of the rung's tokens more. What ranks like the ends of the full runs
predicts best. Raw and averaged weights are also measured where the branch ends: it costs that much more.

    python -m benchmarks.training.rungs --trials 10
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.common import DATA, device_name, fetch, make_shop, say, tokenized, write
from budgetsearch.core.policy.evidence import agreement, rank_correlation
from budgetsearch.core.records import Schedule, Segment
from budgetsearch.training.bases import load_base
from budgetsearch.training.evaluate import example_losses, mean_loss
from budgetsearch.training.gang import Gang
from budgetsearch.training.members import Member, Shop
from budgetsearch.training.recipe import GangTraining

RUNGS = {"1/6": 1 / 6, "1/3": 1 / 3}
BRANCH = 0.2
KINDS = ("raw", "average", "branch", "raw later", "average later")
EXAMPLES = 64


class Bench:
    """One trial after the other on one base."""

    def __init__(self, base: Any, shop: Shop, tokens: int, batch_size: int) -> None:
        self.base, self.shop, self.tokens, self.batch_size = base, shop, tokens, batch_size

    def measure(self, number: int, params: dict[str, Any]) -> dict[str, Any]:
        """Losses of one configuration at the rungs and at the end."""
        step = self.batch_size * self.shop.data.train_stats.mean_row_tokens
        first = self.tokens * min(RUNGS.values())
        schedule = Schedule(int(min(20 * step, first / 3)), self.tokens, self.tokens // 5)
        segment = Segment(
            trial_id=number,
            params=params,
            seed=number,
            rung=0,
            start_tokens=0,
            stop_tokens=0,
            schedule=schedule,
            batch_size=self.batch_size,
            micro_batch=self.batch_size,
        )
        training = GangTraining.set_up(self.base, [segment], self.shop)
        found: dict[str, Any] = {}
        for name, share in sorted(RUNGS.items(), key=lambda item: item[1]):
            self._to(training, share * self.tokens)
            member = training.members[0]
            found[name] = {"raw": self.loss(member), "average": self.loss(member, averaged=True)}
            found[name]["branch"] = self._branch(member)
            self._to(training, (1 + BRANCH) * share * self.tokens)
            found[name] |= {"raw later": self.loss(member), "average later": self.loss(member, averaged=True)}
        self._to(training, self.tokens)
        member = training.members[0]
        return found | {"end": {"raw": self.loss(member), "average": self.loss(member, averaged=True)}}

    def _to(self, training: GangTraining, tokens: float) -> None:
        member = training.members[0]
        member.segment = replace(member.segment, stop_tokens=int(tokens))
        member.status = None if member.tokens < tokens else "ok"
        training.train()
        if member.status != "ok":
            raise ArithmeticError(member.detail)

    def _branch(self, member: Member) -> float:
        stop = int((1 + BRANCH) * member.tokens)
        schedule = replace(member.segment.schedule, stop_tokens=stop, cooldown_tokens=stop - member.tokens)
        segment = replace(
            member.segment,
            schedule=schedule,
            start_tokens=member.tokens,
            stop_tokens=stop,
            checkpoint_in=member.save(),
        )
        training = GangTraining.set_up(self.base, [segment], self.shop)
        training.train()
        return self.loss(training.members[0])

    def loss(self, member: Member, *, averaged: bool = False) -> float:
        """Validation loss; infinite where it is not finite."""
        gang = Gang(self.base, [member.adapter])
        with gang.worn():
            if averaged:
                with member.adapter.averaged():
                    return self._loss(gang)
            return self._loss(gang)

    def _loss(self, gang: Gang) -> float:
        data, pad, device = self.shop.data.valid, self.shop.pad, self.shop.device
        (losses,) = example_losses(self.base, data, range(EXAMPLES), pad=pad, device=device, gang=gang)
        targets = [data.targets(row) for row in range(EXAMPLES)]
        return mean_loss(losses, targets)


def configuration(rng: random.Random) -> dict[str, Any]:
    """Uniform over the ranges of search_spaces/lora_small.yaml, in fp32."""
    return {
        "quantization": "fp32",
        "rank": rng.choice([4, 8, 16, 32]),
        "learning_rate": 10 ** rng.uniform(-3.5, -2.0),
        "dropout": rng.choice([0.0, 0.05]),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's correlation with the end, the agreement that weighs good trials most, and what the
    choice by each kind of weights loses against the best end."""
    whole = [row["losses"] for row in rows if "end" in row["losses"]]
    ends = [min(losses["end"].values()) for losses in whole]
    table: dict[str, Any] = {}
    for rung in RUNGS:
        table[rung] = {}
        for kind in KINDS:
            values = [losses[rung][kind] for losses in whole]
            table[rung][kind] = {
                "spearman": round(rank_correlation(values, ends), 3),
                "agreement": round(agreement(values, ends), 3),
                "regret": round(ends[values.index(min(values))] - min(ends), 4),
            }
    return table


def main() -> None:
    """Run, and write the JSON after every trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=30_000, help="tokens of a full run")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="rungs-cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = fetch()
    data = tokenized(base, options.data, options.max_length)
    shop = make_shop(base, data, options.device)
    model = load_base(str(base.path), "fp32", options.device)
    bench = Bench(model, shop, options.tokens, options.batch_size)
    rng, rows = random.Random(0), []
    for number in range(options.trials):
        params = configuration(rng)
        try:
            losses: dict[str, Any] = bench.measure(number, params)
        except ArithmeticError as error:
            losses = {"diverged": str(error)}
        rows.append({"params": params, "losses": losses})
        say(f"{number}: {params} {losses}")
        found = {
            "device": device_name(options.device),
            "torch": torch.__version__,
            "model": base.source,
            "data": options.data,
            "tokens": options.tokens,
            "batch_size": options.batch_size,
            "examples": EXAMPLES,
            "summary": summary(rows) if len(rows) > 2 else {},
            "rows": rows,
        }
        path = write(options.name, found, options.out)
    print(path)


if __name__ == "__main__":
    main()
