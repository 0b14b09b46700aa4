"""Compare budget policies on recorded curves, with one command: see README.md in this folder.

    python -m benchmarks.policy.run --curves FOLDER --out results.json

``FOLDER`` holds one folder of tables (``*.npz``) per family; a family folder with ``model.onnx`` is asked
through its surrogate instead (``lcbench.py``).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from benchmarks.policy.baselines import BASELINES, SIZED
from benchmarks.policy.peers import PEERS, play_peer
from budgetsearch.tools.simulate.contest import OURS, PLAYERS, Outcome, read_off, standings
from budgetsearch.tools.simulate.curves import Curves, load
from budgetsearch.tools.simulate.world import Trace

PACKAGES = (
    "budgetsearch", "optuna", "syne-tune", "smac", "dehb", "neural-pipeline-search", "numpy", "scipy",
    "onnxruntime",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One play of one method, and the budgets that it is read off at."""

    path: str
    method: str
    seed: int
    multiples: tuple[float, ...]


def tasks_for(
    paths: Sequence[Path], methods: Sequence[str], multiples: Sequence[float], seeds: int
) -> list[Task]:
    """What must be played. A method that does not know its deadline holds the smaller budgets in its play
    of the largest; those that use their budget are played for each."""
    found = []
    for seed, path, method in product(range(seeds), paths, methods):
        plays = [(x,) for x in multiples] if method in (OURS, *SIZED) else [tuple(multiples)]
        found += [Task(str(path), method, seed, play) for play in plays]
    return found


@lru_cache(maxsize=16)
def curves_of(path: str) -> Curves:
    """The table at ``path``, or its family's surrogate."""
    table = Path(path)
    if (table.parent / "model.onnx").is_file():
        from benchmarks.policy.lcbench import Surrogate

        return Surrogate(table.parent, table.stem)
    return load(table)


def one(task: Task) -> list[dict[str, Any]]:
    """One play of one method, timed: a row for each budget."""
    start = time.perf_counter()
    where = {"family": Path(task.path).parent.name, "table": Path(task.path).stem}
    rows = [{**where, "method": task.method, "seed": task.seed, "multiple": x} for x in task.multiples]
    try:
        found: list[dict[str, float | str]] = [
            {"regret": round(o.regret, 5)} for o in outcomes_of(curves_of(task.path), task)
        ]
    except Exception as error:  # a peer that fails on one table is reported, not hidden
        if task.method == OURS:
            raise
        found = [{"error": f"{type(error).__name__}: {error}"[:200]} for _ in rows]
    seconds = round(time.perf_counter() - start, 2)
    return [{**row, **new, "wall_seconds": seconds} for row, new in zip(rows, found, strict=True)]


def outcomes_of(curves: Curves, task: Task) -> list[Outcome]:
    """One play, read off at each budget of its task."""
    trace = _trace(curves, task.method, max(task.multiples), task.seed)
    return [read_off(curves, trace, task.method, task.seed, multiple) for multiple in task.multiples]


def _trace(curves: Curves, method: str, multiple: float, seed: int) -> Trace:
    if method in PLAYERS:
        return PLAYERS[method](curves, multiple, seed)
    if method in (known := PEERS | BASELINES):
        return play_peer(known[method], curves, multiple, seed)
    from benchmarks.policy import external

    return play_peer(external.PEERS[method], curves, multiple, seed)


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By method: average rank over tables and budgets, and by family and budget the mean regret x 100
    with its standard error over seeds."""
    good = [row for row in rows if "regret" in row]
    found: dict[str, Any] = {s.method: {"average_rank": round(s.rank, 3)} for s in standings(_outcomes(good))}
    for family in sorted({row["family"] for row in good}):
        for standing in standings(_outcomes([row for row in good if row["family"] == family])):
            found[standing.method][family] = {
                f"{multiple:g}x": {"mean": round(100 * mean, 2), "error": round(100 * error, 2)}
                for multiple, (mean, error) in standing.regrets.items()
                if not math.isnan(error)
            }
    return found


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table, best average rank first."""
    methods = sorted(summary, key=lambda method: float(summary[method]["average_rank"]))
    columns = [
        (family, budget)
        for family in sorted({name for body in summary.values() for name in body} - {"average_rank"})
        for budget in dict.fromkeys(b for m in methods for b in summary[m].get(family, {}))
    ]
    heads = ["method", "average rank", *[f"{family} {budget}" for family, budget in columns]]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for method in methods:
        found = [summary[method].get(family, {}).get(budget) for family, budget in columns]
        texts = [f"{x['mean']:.1f} ({x['error']:.1f})" if x else "" for x in found]
        lines.append("| " + " | ".join([method, f"{summary[method]['average_rank']:.2f}", *texts]) + " |")
    return "\n".join(lines)


def _outcomes(rows: Sequence[dict[str, Any]]) -> list[Outcome]:
    return [Outcome(r["table"], r["method"], r["seed"], r["multiple"], r["regret"], ()) for r in rows]


def main() -> None:
    """Run what the arguments name and add it to the file of results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curves", type=Path, required=True)
    parser.add_argument("--methods", default=",".join((*PLAYERS, *PEERS, *BASELINES)))
    parser.add_argument("--families", default="")
    parser.add_argument("--budgets", default="4,10,30")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    options = parser.parse_args()
    tables = sorted(options.curves.glob("*/*.npz"))
    if options.families:
        tables = [path for path in tables if path.parent.name in options.families.split(",")]
    if not tables:
        parser.error(f"there are no tables in {options.curves}/FAMILY/*.npz")
    before = json.loads(options.out.read_text()) if options.out.is_file() else {"runs": [], "versions": {}}
    known = before["runs"]
    methods = options.methods.split(",")
    multiples = [float(multiple) for multiple in options.budgets.split(",")]
    tasks = tasks_for(tables, methods, multiples, options.seeds)
    played = {(Path(t.path).parent.name, t.method, multiple) for t in tasks for multiple in t.multiples}
    kept = [row for row in known if (row["family"], row["method"], row["multiple"]) not in played]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for done, future in enumerate(as_completed([pool.submit(one, task) for task in tasks]), start=1):
            rows += future.result()
            if done % 50 == 0 or done == len(tasks):
                print(f"{done} of {len(tasks)} plays", file=sys.stderr, flush=True)
                write(options.out, [*kept, *rows], before["versions"])
    print(table(summarise([*kept, *rows])))


def write(path: Path, rows: list[dict[str, Any]], versions: dict[str, str]) -> None:
    """The results with the versions that they were measured with."""
    versions = dict(versions)
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    rows.sort(key=lambda r: (r["method"], r["family"], r["table"], r["multiple"], r["seed"]))
    body = ",\n".join(json.dumps(row) for row in rows)
    summary = json.dumps(summarise(rows), indent=1)
    path.write_text(
        f'{{"versions": {json.dumps(versions)},\n"regret_x_100": {summary},\n"runs": [\n{body}\n]}}\n'
    )


if __name__ == "__main__":
    main()
