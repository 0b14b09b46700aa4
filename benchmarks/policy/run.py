"""Compare budget policies on recorded curves, with one command: see README.md in this folder.

    python benchmarks/policy/run.py --curves FOLDER --out results.json

``FOLDER`` holds one folder of tables (``*.npz``) per family; a family folder with ``model.onnx`` is asked
through its surrogate instead (``lcbench.py``).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from budgetsearch.simulate.contest import OURS, outcome_of
from budgetsearch.simulate.curves import Curves, load
from budgetsearch.simulate.peers import PEERS

PACKAGES = (
    "budgetsearch", "optuna", "syne-tune", "smac", "dehb", "neural-pipeline-search", "numpy", "scipy",
    "onnxruntime",
)  # fmt: skip


@lru_cache(maxsize=16)
def curves_of(path: str) -> Curves:
    """The table at ``path``, or its family's surrogate."""
    table = Path(path)
    if (table.parent / "model.onnx").is_file():
        from lcbench import Surrogate

        return Surrogate(table.parent, table.stem)
    return load(table)


def one(path: str, method: str, seed: int, multiple: float) -> dict[str, Any]:
    """One run of one method, timed."""
    if method not in (OURS, *PEERS):
        import external

        PEERS.update(external.PEERS)
    start = time.perf_counter()
    where = {"family": Path(path).parent.name, "table": Path(path).stem}
    row: dict[str, Any] = {**where, "method": method, "seed": seed, "multiple": multiple}
    try:
        row["regret"] = round(outcome_of(curves_of(path), method, seed, multiple).regret, 5)
    except Exception as error:  # a peer that fails on one table is reported, not hidden
        if method == OURS:
            raise
        row["error"] = f"{type(error).__name__}: {error}"[:200]
    return {**row, "wall_seconds": round(time.perf_counter() - start, 2)}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By method, family and budget: mean regret x 100 and its standard error over seeds; average rank."""
    good = [row for row in rows if "regret" in row]
    found: dict[str, Any] = {}
    for method in dict.fromkeys(row["method"] for row in good):
        families: dict[str, dict[str, Any]] = {}
        for family in sorted({row["family"] for row in good}):
            for multiple in sorted({row["multiple"] for row in good}):
                by_seed: dict[int, list[float]] = {}
                for row in good:
                    if (row["method"], row["family"], row["multiple"]) == (method, family, multiple):
                        by_seed.setdefault(row["seed"], []).append(100 * row["regret"])
                means = [statistics.fmean(values) for values in by_seed.values()]
                if len(means) > 1:
                    error = statistics.stdev(means) / math.sqrt(len(means))
                    cell = {"mean": round(statistics.fmean(means), 2), "error": round(error, 2)}
                    families.setdefault(family, {})[f"{multiple:g}x"] = {**cell, "seeds": len(means)}
        found[method] = families
    return found


def main() -> None:
    """Run what the arguments name and add it to the file of results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curves", type=Path, required=True)
    parser.add_argument("--methods", default=",".join((OURS, *PEERS)))
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
    kept = [row for row in known if row["method"] not in methods]
    tasks = [
        (str(path), method, seed, float(multiple))
        for seed in range(options.seeds)
        for method in methods
        for multiple in options.budgets.split(",")
        for path in tables
    ]
    rows = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for done, future in enumerate(as_completed([pool.submit(one, *task) for task in tasks]), start=1):
            rows.append(future.result())
            if done % 50 == 0 or done == len(tasks):
                print(f"{done} of {len(tasks)} runs", file=sys.stderr, flush=True)
    write(options.out, [*kept, *rows], before["versions"])


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
    print(summary)


if __name__ == "__main__":
    main()
