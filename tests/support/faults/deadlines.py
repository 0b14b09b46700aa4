"""Real runs under load: each has ended before its deadline, and how much of its budget was left.

The time is taken outside, from the start of the command to its exit:
``python -m tests.support.faults.deadlines``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from budgetsearch.storage.ledger import read_history
from tests.support.faults.proofs import check_adapter, check_loads
from tests.support.faults.realrun import Workplace, competitors

SHORTEST, LONGEST = 45.0, 180.0
EXIT_BUDGET = 2
"""The exit code of a budget that is refused at the start."""
LOAD = max(1, (os.cpu_count() or 2) // 2)
"""Processes that compete for the processor."""
GOAL_SHARE, GOAL_SECONDS = 0.03, 10.0
"""Of the budget at most this share is idle at the end, or so many seconds where that is more."""


def one(place: Workplace, number: int, budget: float, load: int) -> dict[str, Any]:
    """One run; what came of it."""
    run, log = place.path / "runs" / f"{number}", place.path / f"{number}.log"
    with competitors(load):
        start = time.monotonic()
        process = place.start(
            "run", "--out", str(run), "--hours", str(budget / 3600), "--seed", str(number), log=log
        )
        code = process.wait(timeout=3 * budget)
        seconds = time.monotonic() - start
    found = {
        "budget": round(budget, 1),
        "wall": round(seconds, 2),
        "slack": round(budget - seconds, 2),
        "competitors": load,
        "exit_code": code,
    }
    if code == EXIT_BUDGET:
        return {**found, "state": "refused", "why": log.read_text(encoding="utf-8").splitlines()[-1]}
    history = read_history(run / "ledger.sqlite")
    assert history.closed is not None
    well = sum(r.status == "ok" and r.loss is not None for _, r in history.results)
    found |= {"state": history.closed.state, "segments": len(history.results), "well": well}
    found["leaving"] = round(seconds - history.spent, 2)  # after the last entry: report, sweep, exit
    found["adapter"] = (run / "adapter").is_dir()
    found["charged"] = {k: round(v, 2) for k, v in history.charged.items()}
    if well:
        check_adapter(run / "adapter")
        check_loads(run / "adapter")
    return found


def campaign(budgets: Sequence[float], load: int) -> dict[str, Any]:
    """Run them one after the other."""
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        place = Workplace(Path(scratch)).make()
        found = []
        for number, budget in enumerate(budgets):
            found.append(one(place, number, budget, load))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return summary(found)


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The promises as numbers, and the distribution of what was left."""
    ran = [run for run in found if run["state"] != "refused"]
    slack = sorted(run["slack"] for run in ran)
    small = [r for r in ran if r["slack"] <= max(GOAL_SECONDS, GOAL_SHARE * r["budget"])]
    return {
        "runs": len(found),
        "refused at the start": len(found) - len(ran),
        "after their deadline": sum(run["slack"] < 0 for run in found),
        "without an adapter though a segment finished well": sum(
            bool(r["well"]) and not r["adapter"] for r in ran
        ),
        "slack in s": {
            "least": slack[0],
            "median": round(statistics.median(slack), 2),
            "most": slack[-1],
        }
        if slack
        else {},
        "with at most 3% or 10 s left": len(small),
        "each": list(found),
    }


def budgets_of(runs: int, longest: float = LONGEST, seed: int = 0) -> list[float]:
    """Lengths from 45 to 180 s, evenly spread, in random order."""
    step = (longest - SHORTEST) / max(1, runs - 1)
    budgets = [SHORTEST + step * i for i in range(runs)]
    random.Random(seed).shuffle(budgets)
    return budgets


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--load", type=int, default=LOAD)
    parser.add_argument("--longest", type=float, default=LONGEST, help="Budget of the longest run, in s.")
    given = parser.parse_args(arguments)
    print(json.dumps(campaign(budgets_of(given.runs, given.longest), given.load), indent=1))


if __name__ == "__main__":
    main()
