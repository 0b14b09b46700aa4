"""What a card could do at best: every kernel of the real training step at its peak, no card needed.

``python -m benchmarks.training.roofline``: Mistral-7B in bf16, rank 16. A kernel takes the longer of its
operations at the card's rate and its bytes at the card's bandwidth; there are no launch gaps and no effects
of tiles, so the seconds are for comparisons. Two layers are traced, the others are like them.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from benchmarks.training.common import write
from benchmarks.training.kernels import PACKED, PRODUCTS, Kernel
from benchmarks.training.trace import Setup, traced_step
from budgetsearch.core.footprint import Footprint
from budgetsearch.core.resources.memory import CAUTION
from budgetsearch.machine.configs import known_models
from budgetsearch.machine.memory import Training, footprint
from budgetsearch.machine.profiles import profile
from budgetsearch.machine.shapes import shape_of
from budgetsearch.training.batches import CARD_WIDTHS, DataOrder, passes

LAYERS = 32
FEW = (1, 2)
"""Layers that are traced."""
WIDTH = 208
SIZES = (1, 5, 20)
"""Rows of that width of which passes are traced; between them seconds are interpolated."""
BATCH = 16
LONGEST = 1024
STEPS = 200
HOST_SECONDS = {False: 0.05, True: 0.09}
"""Of a pass, plain and with gradient checkpointing: Python and launches of 32 layers. Estimate: 35 to 42 and
91 to 100 ms of one thread of an AMD EPYC, without launches."""


@dataclass(frozen=True)
class Card:
    """What a card reaches, not its data sheet: products and copies as others measured them."""

    operations: float
    """Of 16-bit products, a second."""
    bandwidth: float
    """Bytes a second."""

    def seconds(self, kernels: Sequence[Kernel]) -> float:
        """Of the kernels, one after the other."""
        return sum(max(k.operations / self.operations, k.bytes / self.bandwidth) for k in kernels)


CARDS = {
    "a100": Card(225e12, 1.32e12),
    "h200": Card(643e12, 3.84e12),
    "rtx4090": Card(140e12, 0.89e12),
}


@dataclass(frozen=True)
class Way:
    """How a pass is made."""

    recompute: bool = False
    dropout: float = 0.0
    fused: bool = True
    quantization: str = "bf16"


@cache
def traced(rows: int, way: Way, layers: int) -> tuple[Kernel, ...]:
    """Kernels of a step in one pass of so many rows."""
    return traced_step(Setup(layers=layers, rows=(WIDTH,) * rows, **asdict(way))).kernels


def whole(rows: int, way: Way, card: Card, *, products: bool = False) -> float:
    """Seconds of the pass with all layers, or of its products alone."""
    few, more = (
        card.seconds([k for k in traced(rows, way, layers) if not products or k.name in (*PRODUCTS, PACKED)])
        for layers in FEW
    )
    return few + (more - few) / (FEW[1] - FEW[0]) * (LAYERS - FEW[0])


def pass_seconds(positions: int, recompute: bool, card: Card) -> float:
    """Of any pass: interpolated, and never less than the host takes."""
    known = [(rows * WIDTH, whole(rows, Way(recompute), card)) for rows in SIZES]
    above = next((i for i, (size, _) in enumerate(known) if size >= positions), len(known) - 1)
    (x0, y0), (x1, y1) = known[max(1, above) - 1], known[max(1, above)]
    slope = (y1 - y0) / (x1 - x0)
    return max(HOST_SECONDS[recompute], y0 + slope * (positions - x0))


def lengths() -> list[int]:
    """Rows like those of dolly: log-normal, median 150, cut at 1024."""
    rng = random.Random(0)
    return [max(16, min(LONGEST, round(rng.lognormvariate(math.log(150), 0.8)))) for _ in range(4000)]


def simulated(card: Card, rule: Footprint, limit: float, *, by_positions: bool) -> dict[str, Any]:
    """Tokens a second with the micro-batches that plan foresees, in rows or in positions."""
    data = lengths()
    order = DataOrder(data, BATCH, 0)
    room = {"rank": 16, "length": LONGEST, "most": BATCH}
    plain, again = (rule.micro_batch(CAUTION * limit, recompute=way, **room) for way in (False, True))
    recompute = plain == 0
    if not by_positions:
        recompute |= plain == 1 and again >= 4  # as it was foreseen then
    micro = again if recompute else plain
    free = rule.positions(CAUTION * limit, rank=16) if recompute and by_positions else 0
    seconds = tokens = 0.0
    count = 0
    for step in range(STEPS):
        rows = order.step_rows(step)
        cut = [rows[i : i + micro] for i in range(0, len(rows), micro)]
        for part in passes(order, rows, micro, CARD_WIDTHS, free) if by_positions else cut:
            positions = len(part) * -(-max(data[row] for row in part) // CARD_WIDTHS) * CARD_WIDTHS
            seconds += pass_seconds(positions, recompute and positions > free, card)
            count += 1
        tokens += sum(data[row] for row in rows)
    return {
        "micro_batch": micro,
        "recompute": recompute,
        "passes_per_step": round(count / STEPS, 2),
        "tokens_per_second": round(tokens / seconds),
    }


def kinds(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Bytes of each kind of kernel, in GB."""
    found: Counter[str] = Counter()
    for kernel in kernels:
        found["products" if kernel.name in PRODUCTS else kernel.name] += kernel.bytes  # type: ignore[assignment]
    return {name: round(size / 1e9, 2) for name, size in found.most_common(12)}


WAYS: Mapping[str, Way] = {
    "": Way(),
    "_with_dropout": Way(dropout=0.05),
    "_nf4": Way(quantization="nf4"),
    "_without_fused_kernels": Way(fused=False),
}
"""By what stands behind a rate's name."""


def per_layer(way: Way) -> float:
    """Kernels that a further layer launches."""
    few, more = (len(traced(BATCH, way, layers)) for layers in FEW)
    return (more - few) / (FEW[1] - FEW[0])


def measure() -> Mapping[str, Any]:
    """Everything that the JSON holds."""
    shape, tokens = shape_of(known_models()[Setup().model]), BATCH * WIDTH
    found: dict[str, Any] = {
        "what": f"{Setup().model} bf16 rank 16, traced without a card; not measured on a GPU. Fused kernels: "
        "stand-ins for Liger's, each with what it reads and writes",
        "kernels_per_layer": {name.strip("_") or "plain": per_layer(way) for name, way in WAYS.items()},
        "gigabytes_two_layers_by_kind": kinds(traced(BATCH, Way(), FEW[1])),
        "cards": {},
    }
    for name, card in CARDS.items():
        limit = float(profile(name).usable_bytes or 0)
        rates = {key: tokens / whole(BATCH, way, card) for key, way in WAYS.items()}
        rates["_products_alone"] = tokens / whole(BATCH, Way(), card, products=True)
        rule = footprint(shape, Training("bf16"))
        found["cards"][name] = {
            **asdict(card),
            **{f"tokens_per_second_{BATCH}x{WIDTH}{key}": round(rate) for key, rate in rates.items()},
            "share_of_products_alone": round(rates[""] / rates["_products_alone"], 3),
            "dolly_like": {
                "micro_batches_in_rows": simulated(card, rule, limit, by_positions=False),
                "micro_batches_in_positions": simulated(card, rule, limit, by_positions=True),
            },
        }
    return found


def main() -> None:
    """Write the JSON and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    print(write("roofline", measure()).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
