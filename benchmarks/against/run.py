"""Pairs of budgetsearch and a careful user, each pair a file of JSON; a run adds those that are missing.

python -m benchmarks.against.run [--rows family_relationships gsm8k] [--hours 0.2 0.5] [--pairs 10 4]

Both sides of a pair run at the same time, each on a core of its own with one thread, and change their cores
with every pair. One script judges both (judge.py). On two cores that do nothing else ten pairs of 0.2 h and
four of 0.5 h take 4.5 hours on each set of rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

from benchmarks.against.rows import TEMPLATE, write_rows
from benchmarks.training.common import MODEL, device_name, fetch, say, write

RESULTS = Path(__file__).parent / "results"
SIDES = ("budgetsearch", "careful")
SPARE_SECONDS = 120.0
"""A side that takes so much longer than its hours is ended."""


def cores_of(pair: int, cores: Sequence[int]) -> dict[str, int]:
    """The core of each side: they change with every pair."""
    first, second = cores[:2]
    return dict(zip(SIDES, (first, second) if pair % 2 == 0 else (second, first), strict=True))


def commands(model: str, folder: Path, train: Path, hours: float, seed: int) -> dict[str, list[str]]:
    """What each side runs; the adapters come to ``folder/SIDE/adapter``."""
    shared = ["--model", model, "--hours", f"{hours}", "--seed", str(seed)]
    template = folder / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    ours = ["run", str(train), "--gpu", "cpu", "--template", str(template), "--fresh-calibration", *shared]
    theirs = ["--rows", str(train), *shared, "--out", str(folder / "careful")]
    return {
        "budgetsearch": [*_python("budgetsearch"), *ours, "--out", str(folder / "budgetsearch")],
        "careful": [*_python("benchmarks.against.careful"), *theirs],
    }


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def play(rows: str, hours: float, pair: int, model: str, test_rows: int) -> dict[str, Any]:
    """One pair, and what the judge says of both and of the base."""
    cores = cores_of(pair, sorted(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory(prefix="budgetsearch-") as scratch:
        folder = Path(scratch)
        train, test = write_rows(folder, rows, pair, test_rows)
        running = {
            side: _started(command, cores[side], folder / f"{side}.log")
            for side, command in commands(model, folder, train, hours, pair).items()
        }
        codes = {side: _ended(process, 3600 * hours + SPARE_SECONDS) for side, process in running.items()}
        losses = {side: _judged(model, test, folder / side / "adapter") for side in SIDES}
        logs = {side: (folder / f"{side}.log").read_text("utf-8", "replace")[-2000:] for side in SIDES}
        base = _judged(model, test, None)
    told = {"rows": rows, "hours": hours, "pair": pair, "model": model, "machine": device_name("cpu")}
    return {**told, "cores": cores, "exit codes": codes, "base": base, "losses": losses, "logs": logs}


def _started(command: Sequence[str], core: int, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as file:
        return subprocess.Popen(
            ["taskset", "--cpu-list", str(core), *command], stdout=file, stderr=file, env=environment
        )


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _judged(model: str, test: Path, adapter: Path | None) -> float | None:
    """None where there is no adapter that PEFT loads."""
    command = [*_python("benchmarks.against.judge"), model, str(test), *([str(adapter)] if adapter else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(json.loads(done.stdout.splitlines()[-1])["loss"]) if done.returncode == 0 else None


def summary(pairs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By rows and hours: wins, the mean difference in nats, and the chance of so many wins among equals."""
    groups: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for pair in pairs:
        ours, theirs = (pair["losses"][side] for side in SIDES)
        infinite = float("inf")
        both = infinite if ours is None else ours, infinite if theirs is None else theirs
        groups.setdefault((pair["rows"], pair["hours"]), []).append(both)
    return [{"rows": rows, "hours": hours, **_together(some)} for (rows, hours), some in groups.items()]


def _together(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    wins = sum(ours < theirs for ours, theirs in pairs)
    known = [ours - theirs for ours, theirs in pairs if max(ours, theirs) < float("inf")]
    return {
        "pairs": len(pairs),
        "lower test loss of budgetsearch": wins,
        "mean difference": sum(known) / len(known) if known else None,
        "chance among equals": sum(comb(len(pairs), n) for n in range(wins, len(pairs) + 1))
        / 2 ** len(pairs),
        "target of nine tenths": wins >= 0.9 * len(pairs),
    }


def main() -> None:
    """Run what is missing, then print the summary of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["family_relationships", "gsm8k"], help="names or paths")
    parser.add_argument("--hours", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--pairs", type=int, nargs="+", default=[10, 4], help="as many for each of the hours")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    base, found = fetch(asked.model), []
    for rows in asked.rows:
        for hours, count in zip(asked.hours, asked.pairs, strict=True):
            for pair in range(count):
                name = f"{Path(rows).stem}-{hours:g}h-pair{pair}"
                path = asked.out / f"{name}.json"
                if not path.is_file():
                    say(name)
                    write(name, play(rows, hours, pair, str(base.path), asked.test_rows), asked.out)
                found.append(json.loads(path.read_text(encoding="utf-8")))
    print(json.dumps(summary(found), indent=1))


if __name__ == "__main__":
    main()
