"""How long a plan takes, from a cold start of Python: every shipped model on every card.

python -m benchmarks.plan.speed
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from budgetsearch.machine.configs import known_models
from budgetsearch.machine.profiles import PROFILES


def seconds(gpu: str, model: str) -> float:
    """Wall time of one command, the interpreter's start included."""
    command = [sys.executable, "-m", "budgetsearch", "plan", "--gpu", gpu, "--model", model, "--hours", "24"]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    taken = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"no plan for {model} on {gpu}: exit code {done.returncode}")
    return taken


def main() -> None:
    """Print the median and the slowest."""
    cards = [name for name in PROFILES if name not in ("auto", "cpu")]
    models = [name for name in known_models() if "/" in name and "135M" not in name]
    found = {(gpu, model): seconds(gpu, model) for gpu in cards for model in models}
    slowest = max(found, key=lambda key: found[key])
    empty = time.perf_counter()
    subprocess.run([sys.executable, "-c", ""], check=True)
    empty = time.perf_counter() - empty
    print(f"{len(found)} plans: median {statistics.median(found.values()):.2f} s, slowest")
    print(f"{found[slowest]:.2f} s ({slowest[1]} on {slowest[0]}); Python alone starts in {empty:.2f} s")


if __name__ == "__main__":
    main()
