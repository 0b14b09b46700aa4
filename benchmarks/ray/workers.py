"""What a thousand workers cost the driver: the real driver and policy, simulated workers, virtual time.

python -m benchmarks.ray.workers [--workers 1000] [--hours 0.2] [--out benchmarks/ray/simulated.json]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from budgetsearch.core.records import Job
from budgetsearch.core.reports import Report
from budgetsearch.engines.simulator import SimulatorEngine
from budgetsearch.storage.ledger import MemoryLedger
from budgetsearch.tools.simulate.invariants import check
from tests.support.simulation import make_driver


class Timed(SimulatorEngine):
    """Knows how long the simulation itself took: a real engine's work is not done by the driver."""

    seconds = 0.0

    def submit(self, job: Job) -> None:
        """See the port."""
        start = time.process_time()
        super().submit(job)
        self.seconds += time.process_time() - start

    def poll(self, timeout: float) -> Sequence[Report]:
        """See the port."""
        start = time.process_time()
        found = super().poll(timeout)
        self.seconds += time.process_time() - start
        return found


def measure(workers: int, budget: float) -> dict[str, Any]:
    """One run: a day's search in small, every segment's decisions included."""
    driver = make_driver(None, budget=budget, slots=workers, train_rows=200_000, train_tokens=16_000_000)
    simulated = driver.engine
    assert isinstance(simulated, SimulatorEngine)
    engine = Timed(simulated.world, simulated.clock, workers)
    driver.engine = driver._in_flight.engine = engine
    start = time.process_time()
    driver.run()
    taken = time.process_time() - start - engine.seconds
    assert isinstance(driver.ledger, MemoryLedger)
    history = check(driver.ledger.entries, budget)
    spent = driver.history.accounts
    return {
        "workers": workers,
        "budget_seconds": budget,
        "segments": len(history.results),
        "trials": len(history.trials),
        "full_runs": sum(1 for state in history.trials.values() if state.full_losses),
        "driver_cpu_ms_per_segment": 1e3 * taken / len(history.results),
        "idle_share_of_the_search": spent.search_idle_share,
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--hours", type=float, default=0.1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = []
    for workers in asked.workers:
        rows.append(measure(workers, 3600 * asked.hours))
        print(json.dumps(rows[-1]), flush=True)
    counts = " ".join(map(str, asked.workers))
    command = f"python -m benchmarks.ray.workers --workers {counts} --hours {asked.hours:g}"
    machine = f"{os.cpu_count()} CPU cores, shared with other work; processor time of one process"
    if asked.out:
        asked.out.write_text(
            json.dumps({"command": command, "machine": machine, "runs": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
