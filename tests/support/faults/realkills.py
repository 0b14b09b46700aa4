"""Kill the command line's real run on a tiny model: driver, worker or both, at random moments; resume it.

``python -m tests.support.faults.realkills --kills 3``
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from budgetsearch.core.events import Entry
from budgetsearch.storage.ledger import read_history
from tests.support.faults.proofs import check_after_kill, check_end
from tests.support.faults.realrun import Workplace, await_free

BUDGET = 80.0
KILLS_PER_RUN = 4
"""Each costs the budget a start of the program."""
LONGEST_WAIT = 16.0
VICTIMS = ("driver", "worker", "both")


def one(place: Workplace, number: int, kills: int, rng: random.Random) -> Counter[str]:
    """One run, killed so often, to its end."""
    run, log = place.path / "runs" / f"{number}", place.path / f"{number}.log"
    seen: list[Entry] = []
    done: Counter[str] = Counter()
    for _ in range(3 * kills + 3):
        process = _start(place, run, number, log)
        if done.total() < kills:
            victim = rng.choice(VICTIMS)
            if _kill(process, victim, rng.uniform(3.0, LONGEST_WAIT)):
                done[victim] += 1
        code = process.wait(timeout=3 * BUDGET)
        await_free(run)
        seen = check_after_kill(run, seen)
        if code == 0:
            break
        assert code == -9, log.read_text(encoding="utf-8")[-3000:]
    check_end(run)
    return done


def _start(place: Workplace, run: Path, number: int, log: Path) -> subprocess.Popen[bytes]:
    begun = (run / "ledger.sqlite").is_file() and read_history(run / "ledger.sqlite").opened
    new = ["run", "--out", str(run), "--hours", str(BUDGET / 3600), "--seed", str(number)]
    return place.start(*(["resume", str(run)] if begun else new), log=log)


def _kill(process: subprocess.Popen[bytes], victim: str, delay: float) -> bool:
    """Whether there was somebody to kill after so many seconds."""
    until = time.monotonic() + delay
    while time.monotonic() < until:
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    hit = False
    with suppress(psutil.NoSuchProcess):
        workers = psutil.Process(process.pid).children()
        if victim != "driver":
            for worker in workers:
                worker.kill()
                hit = True
        if victim != "worker":
            process.kill()
            hit = True
    return hit


def campaign(kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill so often; raises where a promise is broken."""
    rng = random.Random(seed)
    victims: Counter[str] = Counter()
    runs = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        place = Workplace(Path(scratch)).make()
        while victims.total() < kills:
            victims += one(place, runs, min(KILLS_PER_RUN, kills - victims.total()), rng)
            runs += 1
            print(f"{victims.total()} kills, {runs} runs", file=sys.stderr, flush=True)
    return {
        "kills": victims.total(),
        "runs": runs,
        "by victim": dict(victims),
        "seconds": round(time.monotonic() - start, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    print(json.dumps(campaign(given.kills, given.seed), indent=1))


if __name__ == "__main__":
    main()
