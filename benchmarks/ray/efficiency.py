"""How much of the lanes' time is work: the same search with 1, 2, 4, 8 and 16 lanes on a real local Ray.

python -m benchmarks.ray.efficiency

Driver, policy, sampler, ledger, engine, Ray Tune and worker processes are the real ones; only the workers
sleep where others train, so a few cores suffice for 16 lanes. Two things are measured: the share of ``lanes x
seconds`` in which lanes worked, from the first segment's beginning to the last one's end, and the seconds
until as much work was done as one lane does in the whole budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.ray import sleeper
from budgetsearch.core.decisions import NeedCandidates, Run
from budgetsearch.core.events import Decided, Entry, Opened
from budgetsearch.core.history.history import History
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.records import WorkerSetup
from budgetsearch.engines.ray.engine import RayEngine
from budgetsearch.engines.ray.messages import FleetSpec
from budgetsearch.machine.clock import RunClock
from budgetsearch.run.driver import Driver
from budgetsearch.run.incumbent import NoExport
from budgetsearch.run.spaces import load_space
from budgetsearch.sampler.sampler import OptunaSampler
from budgetsearch.storage.ledger import Ledger

RESULTS = Path(__file__).parent / "results"
SPACE = "lora_small"


@dataclass(frozen=True)
class Slept:
    """One job of a lane, in seconds of the machine's monotonic clock."""

    lane: str
    start: float
    end: float


@dataclass
class Counter:
    """Counts decisions while a run goes on; a watcher of the ledger."""

    runs: int = 0
    asked: int = 0

    def see(self, entry: Entry, history: History) -> None:
        """See the port."""
        if isinstance(entry.event, Decided):
            self.runs += isinstance(entry.event.decision, Run)
            self.asked += isinstance(entry.event.decision, NeedCandidates)


def search(lanes: int, budget_seconds: float, folder: Path) -> tuple[History, Counter, float]:
    """One search; returns its history, its decisions and the driver's processor seconds."""
    setup = WorkerSetup("", "", "", str(folder), "cpu", "all-linear", 0)
    spec = FleetSpec(
        lanes, str(folder / "ray"), str(folder / "ray" / "worker-{lane}.log"), worker=sleeper.__name__
    )
    engine = RayEngine(setup, spec, folder / "ray.log")
    engine.warm_up()
    while engine.slots < lanes:  # Ray's start is not what is measured here
        engine.poll(0.5)
    space, counter, ledger = load_space(SPACE), Counter(), Ledger(folder / "ledger.sqlite")
    ledger.watch(counter)
    driver = Driver(
        ledger=ledger,
        engine=engine,
        sampler=OptunaSampler(),
        exporter=NoExport(),
        clock=RunClock(),
        request=request(budget_seconds, space.to_dict()),
        opened=Opened(budget_seconds, {}),
        quantizations=space.quantizations,
        grace_seconds=5.0,
    )
    before = processor_seconds()
    try:
        history = driver.run()
    finally:
        ledger.close()
        engine.close()
    return history, counter, processor_seconds() - before


def request(budget_seconds: float, space: Mapping[str, Any]) -> PlanRequest:
    """Data without end, and no answers to grade."""
    return PlanRequest(
        budget_seconds=budget_seconds,
        gpu="cpu",
        space=space,
        seed=0,
        eta=5,
        first_rung=None,
        full_share=0.4,
        max_epochs=4.0,
        eval_share=0.08,
        batch_size=8,
        train_tokens=10_000_000,
        train_rows=100_000,
        valid_rows=64,
        task_examples=0,
        max_trials=2000,
    )


def processor_seconds() -> float:
    """Of this process alone: the fleet, its lanes and their workers are others."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def slept(folder: Path) -> list[Slept]:
    """Every segment or gang that the workers slept through."""
    found = []
    for path in folder.glob("slept-*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["train"]:
                found.append(Slept(path.stem, row["from"], row["to"]))
    return sorted(found, key=lambda job: job.start)


def seconds_until(jobs: Sequence[Slept], work: float) -> float | None:
    """Seconds after which the lanes had worked so long together, to a hundredth; None: they never did."""
    begin = jobs[0].start
    moments = sorted([(job.start, 1) for job in jobs] + [(job.end, -1) for job in jobs])
    done, active, last = 0.0, 0, begin
    for moment, step in moments:
        if active and done + active * (moment - last) >= work - 0.01:
            return max(last, last + (work - done) / active) - begin
        done, active, last = done + active * (moment - last), active + step, moment
    return None


def gaps(jobs: Sequence[Slept]) -> list[float]:
    """Seconds that each lane waited from the end of one job to the beginning of its next."""
    lanes: dict[str, list[Slept]] = {}
    for job in jobs:
        lanes.setdefault(job.lane, []).append(job)
    return [b.start - a.end for mine in lanes.values() for a, b in itertools.pairwise(mine)]


def measure(lanes: int, budget_seconds: float) -> dict[str, Any]:
    """Run one search and say what its lanes did."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="budgetsearch-bench-ray-", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        history, counter, driver_seconds = search(lanes, budget_seconds, folder)
        jobs = slept(folder)
    work = sum(job.end - job.start for job in jobs)
    window = max(job.end for job in jobs) - jobs[0].start
    waits, plan = gaps(jobs), history.plan
    assert plan is not None
    return {
        "lanes": lanes,
        "ladder_seconds": [round(seconds, 2) for seconds in plan.ladder],
        "trials": len(history.trials),
        "jobs": len(jobs),
        "job_seconds_median": round(statistics.median(job.end - job.start for job in jobs), 2),
        "work_seconds": round(work, 2),
        "search_seconds": round(window, 2),
        "efficiency": round(work / (lanes * window), 4),
        "wait_seconds_median": round(statistics.median(waits), 4),
        "wait_seconds_p90": round(statistics.quantiles(waits, n=10)[-1], 4),
        "decisions": counter.runs + counter.asked,
        "driver_cpu_seconds_per_decision": round(driver_seconds / (counter.runs + counter.asked), 4),
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        "_jobs": jobs,
    }


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the seconds to the work of one lane, against those of one lane."""
    alone = next((row for row in rows if row["lanes"] == 1), None)
    work, alone_seconds = (alone["work_seconds"], alone["search_seconds"]) if alone else (0.0, 0.0)
    found = []
    for row in rows:
        until = seconds_until(row.pop("_jobs"), work)
        if alone is not None and until is not None:
            row |= {
                "seconds_to_the_work_of_one": round(until, 2),
                "speedup": round(alone_seconds / until, 2),
                "fixed_work_efficiency": round(alone_seconds / (row["lanes"] * until), 4),
            }
        found.append(row)
    return found


def machine() -> str:
    """What the figures were measured on."""
    return f"{len(os.sched_getaffinity(0))} CPU cores, {platform.system()} {platform.machine()}, no GPU"


def main() -> None:
    """Measure each number of lanes and write the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lanes", default="1,2,4,8,16")
    parser.add_argument("--seconds", type=float, default=300.0, help="the budget of each search")
    parser.add_argument("--out", type=Path, default=RESULTS / "efficiency.json")
    given = parser.parse_args()
    rows = []
    for lanes in map(int, given.lanes.split(",")):
        rows.append(measure(lanes, given.seconds))
        shown = {key: value for key, value in rows[-1].items() if key != "_jobs"}
        print(json.dumps(shown), flush=True)
    found = {
        "machine": machine(),
        "python": platform.python_version(),
        "ray": version("ray"),
        "budget_seconds": given.seconds,
        "efficiency": "seconds in which lanes worked / (lanes x seconds from the first segment's beginning "
        "to the last one's end)",
        "fixed_work_efficiency": "T1 / (lanes x TN), seconds until the lanes had worked as long as one does "
        "in the whole search",
        "rows": compare(rows),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(given.out)


if __name__ == "__main__":
    main()
