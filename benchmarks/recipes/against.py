"""The same recipe, the same wall time: budgetsearch against a careful loop around Optuna, side by side.

The loop is what people write: TPE proposes, SuccessiveHalvingPruner stops what falls behind, for 60% of the
time, or for longer where a run of the recipe's greatest length needs less; then the best configuration is
trained again from the beginning with all that is left, with the same schedule (warmup, trunk, cooldown). The
length of a trial in the search is a tenth of what the whole time would hold. Both sides get one core each and
change cores every second pair; what counts is the validation loss of what each hands out, by the recipe's own
``evaluate``. Each pair is a JSON file; a run adds those that are missing.

    python -m benchmarks.recipes.against --recipe examples/recipes/digits.py:Digits --pairs 10 --seconds 120
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the pairs that are missing, then print what all of them say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--loop", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.loop:
        print(json.dumps(loop(options.recipe, options.seconds, options.seed)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    name = options.recipe.rpartition(":")[2].lower()
    pairs = []
    for seed in range(options.pairs):
        path = options.out / f"{name}-{options.seconds:g}s-{seed}.json"
        if not path.exists():
            path.write_text(json.dumps(pair(options.recipe, options.seconds, seed), indent=1) + "\n")
        pairs.append(json.loads(path.read_text()))
        print(line(pairs[-1]), flush=True)
    print(verdict(pairs))


def pair(recipe: str, seconds: float, seed: int) -> dict[str, Any]:
    """Both sides at once, each on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if seed % 2:
        cores.reverse()
    with tempfile.TemporaryDirectory() as folder:
        ours = ["-m", "budgetsearch", "run", "--recipe", recipe, "--gpu", "cpu", "--hours", f"{seconds:g}s"]
        ours += ["--seed", str(seed), "--out", f"{folder}/run", "--fresh-calibration"]
        theirs = ["-m", "benchmarks.recipes.against", "--recipe", recipe, "--seconds", f"{seconds:g}"]
        theirs += ["--seed", str(seed), "--loop"]
        began = time.monotonic()
        sides = [_start(ours, cores[0]), _start(theirs, cores[-1])]
        printed = [side.communicate()[0] for side in sides]
        took = time.monotonic() - began
        found = _evaluated(recipe, Path(folder) / "run")
    return {
        "recipe": recipe,
        "seed": seed,
        "seconds": seconds,
        "cores": cores,
        "took_seconds": took,
        "processor": platform.processor() or platform.machine(),
        "budgetsearch": found,
        "optuna": json.loads(printed[1].strip().splitlines()[-1]),
    }


def _start(arguments: list[str], core: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["taskset", "-c", str(core), sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _evaluated(recipe: str, run: Path) -> dict[str, Any]:
    """What the run handed out, evaluated here."""
    import budgetsearch as bs
    from budgetsearch.training.recipes.loading import find_recipe, load_recipe
    from budgetsearch.training.recipes.running import losses_of, mean

    found = bs.open(run)
    assert found.best is not None
    assert found.adapter_path is not None
    own = load_recipe(find_recipe(recipe))
    own.setup("cpu")
    manifest = json.loads((found.adapter_path / "budgetsearch.json").read_text())
    trial = own.load(manifest["params"], manifest["seed"], found.adapter_path)
    return {
        "loss": mean(losses_of(own.evaluate(trial))),
        "params": manifest["params"],
        "units": manifest["units"],
        "trials": len(found.trials),
        "spent_seconds": found.spent_seconds,
    }


def loop(recipe: str, seconds: float, seed: int) -> dict[str, Any]:
    """The loop around Optuna; its seconds count from here, imports of the recipe included."""
    began = time.monotonic()
    from benchmarks.recipes.loop import Loop

    return Loop.around(recipe, seconds, seed, began).run()


def line(found: Mapping[str, Any]) -> str:
    """One pair in a line."""
    ours, theirs = found["budgetsearch"], found["optuna"]
    return (
        f"seed {found['seed']}: budgetsearch {ours['loss']:.4f} ({ours['trials']} trials, "
        f"{ours['spent_seconds']:.0f} s), optuna {theirs['loss']:.4f} ({theirs['trials']} trials, "
        f"{theirs['spent_seconds']:.0f} s)"
    )


def verdict(pairs: Sequence[Mapping[str, Any]]) -> str:
    """How often each side was better, by how much at the median, and whether all were in time."""
    ratios = [pair["budgetsearch"]["loss"] / pair["optuna"]["loss"] for pair in pairs]
    won = sum(ratio < 1.0 for ratio in ratios)
    late = sum(pair["budgetsearch"]["spent_seconds"] > pair["seconds"] for pair in pairs)
    return (
        f"budgetsearch is better in {won} of {len(pairs)} pairs; its loss over the other's: median "
        f"{statistics.median(ratios):.3f}; {late} after the deadline"
    )


if __name__ == "__main__":
    main()
