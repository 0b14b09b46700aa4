"""The whole search: which share of a budget is training? Runs the product's main job and reads its ledger.

python -m benchmarks.training.search --minutes 10
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import budgetsearch
from benchmarks.training.common import device_name, fetch, write
from budgetsearch.core.history.history import History
from budgetsearch.storage.ledger import read_history
from budgetsearch.views.tables import padding_share


def summary(history: History, minutes: float, gpu: str) -> dict[str, object]:
    """Phases, the useful share, and what the calibration chose."""
    budget = 60 * minutes
    train = history.charged.get("train", 0.0)
    padding = padding_share(history)
    return {
        "device": device_name("cpu" if gpu == "cpu" else "cuda:0"),
        "torch": torch.__version__,
        "minutes": minutes,
        "spent_seconds": round(history.spent, 1),
        "phases": {phase: round(seconds, 1) for phase, seconds in sorted(history.charged.items())},
        "useful_share_of_budget": round(train / budget, 3),
        "useful_share_of_spent": round(train / history.spent, 3),
        "padding_share": None if padding is None else round(padding, 4),
        "trials": len([t for t in history.trials.values() if t.started]),
        "gangs": {name: found.gang for name, found in history.calibrations.items()},
        "probes": {
            name: [[p.members, p.micro_batch, round(p.tokens_per_second, 1)] for p in found.probes]
            for name, found in history.calibrations.items()
        },
        "best_loss": history.incumbent.best_loss if history.incumbent else None,
    }


def main() -> None:
    """Run once and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--gpu", default="cpu", help="card profile")
    parser.add_argument("--name", default=None, help="of the JSON; default: search-GPU-MINUTESm")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    fetch()  # so that no download is counted, as in every run but the first
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        budgetsearch.run(gpu=options.gpu, hours=options.minutes / 60, out=run)
        found = summary(read_history(run / "ledger.sqlite"), options.minutes, options.gpu)
    name = options.name or f"search-{options.gpu}-{options.minutes:.0f}m"
    print(write(name, found, options.out))


if __name__ == "__main__":
    main()
