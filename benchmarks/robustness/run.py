"""Real runs of quickstart's size beside other work, each a file of JSON; a run adds those that are missing.

python -m benchmarks.robustness.run [--regimes quiet half busy late bursts faster] [--seeds 3] [--hours 0.2]

On a machine that is quiet itself: the regimes are what makes it busy. Six regimes of three seeds at 0.2 hours
take three and a half hours.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import budgetsearch
from benchmarks.robustness.figures import figures_of, summary
from benchmarks.robustness.regimes import HOURS_SHARE, REGIMES, beside
from benchmarks.training.common import DATA, MODEL, device_name, say, write
from budgetsearch.core.errors import BudgetsearchError
from budgetsearch.core.history.history import History
from budgetsearch.storage.ledger import read_history

RESULTS = Path(__file__).parent / "results"


def play(regime: str, seed: int, hours: float, model: str, data: str) -> dict[str, Any]:
    """One run, and what it came to."""
    given = hours * HOURS_SHARE.get(regime, 1.0)
    told: dict[str, Any] = {"regime": regime, "seed": seed, "hours": given, "model": model, "data": data}
    with tempfile.TemporaryDirectory(prefix="budgetsearch-") as folder:
        out = Path(folder) / "run"
        try:
            with beside(out / "ledger.sqlite", REGIMES[regime]):
                budgetsearch.run(
                    model=model, data=data, gpu="cpu", hours=given, seed=seed, out=out, fresh_calibration=True
                )
        except BudgetsearchError as error:
            told["error"] = str(error)
        ledger = out / "ledger.sqlite"
        history = read_history(ledger) if ledger.is_file() else History()  # it was refused
        return {**told, **figures_of(history), "machine": device_name("cpu")}


def name_of(regime: str, seed: int, hours: float) -> str:
    """Of a run's file, without its end."""
    return f"{regime}-{hours:g}h-seed{seed}"


def main() -> None:
    """Run what is missing, then print the summary of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--seeds", type=int, default=3, help="so many, from 0 on")
    parser.add_argument("--hours", type=float, default=0.2)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    found = []
    for seed in range(asked.seeds):
        for regime in asked.regimes:
            name = name_of(regime, seed, asked.hours)
            path = asked.out / f"{name}.json"
            if not path.is_file():
                say(name)
                write(name, play(regime, seed, asked.hours, asked.model, asked.data), asked.out)
            found.append(json.loads(path.read_text(encoding="utf-8")))
    print(json.dumps(summary(found), indent=1))


if __name__ == "__main__":
    main()
