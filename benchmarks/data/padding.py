"""How much of a pass is padding, which is all that packing several rows into one could save.

    python -m benchmarks.data.padding

Rows of made-up lengths (log-normal, as those of instruction data are) go through the order and the passes of
training; what is counted is positions, of which a linear layer's time is a multiple.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy

from budgetsearch.training.batches import CARD_WIDTHS, DataOrder, passes

ROWS, MEAN, MOST = 20_000, 236, 1024
SPREADS = (0.4, 0.8, 1.2)
"""Of the logarithms of lengths: 0.4 is GSM8K, 0.8 instructions of all kinds, 1.2 chats of any length."""
BATCHES = (8, 16, 32)
STEPS = 1000


def padding(spread: float, batch: int, micro_batch: int, step: int) -> float:
    """Share of the positions that hold no token."""
    rng = numpy.random.default_rng(0)
    lengths = rng.lognormal(numpy.log(MEAN) - spread**2 / 2, spread, ROWS).clip(8, MOST).astype(int)
    order = DataOrder(lengths, batch, seed=0)
    tokens = positions = 0
    for number in range(STEPS):
        for rows in passes(order, order.step_rows(number), micro_batch, step):
            width = -(-int(lengths[rows].max()) // step) * step
            tokens += int(lengths[rows].sum())
            positions += width * len(rows)
    return 1 - tokens / positions


def measure() -> list[dict[str, Any]]:
    """All of them, on a card with passes of four of the longest rows."""
    return [
        {"spread": spread, "batch": batch, "padding": round(padding(spread, batch, 4, CARD_WIDTHS), 4)}
        for spread in SPREADS
        for batch in BATCHES
    ]


def main() -> None:
    """Print the result as JSON, and write it where --out says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = json.dumps(measure(), indent=2)
    sys.stdout.write(text + "\n")
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
