"""Kill a fast run again and again, anywhere; resume it; at its end nothing is lost and nothing counted twice.

``python -m tests.support.faults.kills --kills 25`` does it and prints JSON;
``benchmarks/faults`` has the long form.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from budgetsearch.core.events import Entry
from budgetsearch.core.history.fold import fold
from budgetsearch.core.records import Segment
from budgetsearch.storage.runfolder import RunFolder
from tests.support.faults import fastrun, killing
from tests.support.faults.killing import Shot, Victim
from tests.support.faults.proofs import check_after_kill, check_end

MAX_TRIALS = 10
KILLS_PER_RUN = 8
TIMED_SHARE = 0.3
"""Of the kills: at any moment, from outside."""
VICTIMS: tuple[Victim, ...] = ("driver", "driver", "worker", "both")
RESUMED = "driver: after a statement in storage.ledger.append for run.driver._ended"
"""Where the run dies whose resume is surveyed."""
SPACING = 0.001
"""Real seconds in the middle of a segment, so that timed kills find some."""


@dataclass
class Tally:
    """What was done and what came of it."""

    kills: int = 0
    runs: int = 0
    misses: int = 0
    """Lives that ended before their shot."""
    by_victim: Counter[str] = field(default_factory=Counter)
    by_site: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    """Killed before the run had begun: there was nothing to go on with."""
    seconds: float = 0.0
    sites: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kills": self.kills,
            "runs": self.runs,
            "shots that came too late": self.misses,
            "killed before the run began": self.restarts,
            "by victim": dict(self.by_victim.most_common()),
            "kill points found": self.sites,
            "by kill point": dict(self.by_site.most_common()),
            "seconds": round(self.seconds, 1),
        }


class Campaign:
    """Runs in one place, killed in many."""

    def __init__(self, place: fastrun.Place, seed: int) -> None:
        self.place, self.seed = place, seed
        self.rng = random.Random(seed)
        self.tally = Tally()
        self.sites: dict[str, int] = {}
        self.log = place.log

    def survey(self) -> None:
        """A run that lives, and one that is resumed: which points there are, how often each is passed."""
        path = self.place.path / "points.txt"
        out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        lives: Sequence[Shot | None] = (None, Shot("driver", "driver", RESUMED, 14), None)
        for number, shot in zip((0, 1, 1), lives, strict=True):
            run = self.place.path / "runs" / f"survey{number}"
            self._await_lock(run)
            code = fastrun.wait_for(self._start(run, shot, out))
            assert code == (-signal.SIGKILL if shot else 0), self.log.read_text(encoding="utf-8")[-3000:]
            if not shot:
                check_end(run)
        os.close(out)
        self.sites = dict(Counter(path.read_text(encoding="utf-8").splitlines()))
        self.tally.sites = len(self.sites)
        shutil.rmtree(self.place.path / "runs")

    def run(self, number: int, kills: int) -> None:
        """One run with so many kills, from its start to its end."""
        run = self.place.path / "runs" / f"{number}"
        seen: list[Entry] = []
        done = 0
        for _ in range(4 * kills + 4):
            killed = self._life(run, number, shoot=done < kills)
            entries = check_after_kill(run, seen)
            if killed:
                done += 1
            self.tally.restarts += killed and not entries
            seen = entries
            closed = fold(entries).closed
            if closed is not None and closed.state == "finished" and not killed:
                break
        check_end(run)
        self._check_origin(run)
        self.tally.runs += 1
        shutil.rmtree(run)

    def _life(self, run: Path, number: int, *, shoot: bool) -> bool:
        """One process on the run; returns whether it, or a worker of its, was killed."""
        self._await_lock(run)
        shot, delay = (None, None) if not shoot else self._aim()
        before = time.monotonic()
        pid = self._start(run, shot, -1, number)
        hit = self._shoot_timed(pid, *delay) if delay else None
        status = fastrun.wait_for(pid)
        if status not in (0, -signal.SIGKILL):
            tail = self.log.read_text(encoding="utf-8")[-3000:]
            raise AssertionError(f"a life of {run.name} ended with {status}; shot {shot}; {tail}")
        killed = hit if hit is not None else shot is not None and self._was_shot(shot, status)
        self.tally.seconds += time.monotonic() - before
        if killed and shoot:
            self.tally.kills += 1
            victim = shot.victim if shot else f"{delay[1]}" if delay else "?"
            self.tally.by_victim[victim] += 1
            self.tally.by_site[shot.site if shot else "at any moment"] += 1
        elif shoot:
            self.tally.misses += 1
        return bool(killed)

    def _aim(self) -> tuple[Shot | None, tuple[float, Victim] | None]:
        unseen = [victim for victim in VICTIMS if victim not in self.tally.by_victim]
        victim = self.rng.choice(unseen or VICTIMS)  # even a short campaign kills each once
        if self.rng.random() < TIMED_SHARE:
            return None, (self.rng.uniform(0.0, 2.5), victim)
        process = victim if victim in ("driver", "worker") else self.rng.choice(("driver", "worker"))
        site = self.rng.choice(sorted(s for s in self.sites if s.startswith(process)))
        # Near its first passes rather than its last: a whole run is cut into many lives.
        nth = 1 + int(self.sites[site] * self.rng.random() ** 4)
        return Shot(victim, process, site, nth), None  # type: ignore[arg-type]

    def _start(self, run: Path, shot: Shot | None, out: int, seed: int = 0) -> int:
        marker = self.place.path / "shot"
        marker.unlink(missing_ok=True)

        def arrange() -> None:
            fastrun.KEPT[:] = [out] if out >= 0 else []
            fastrun.BEHAVIOUR.during = _middle
            killing.MARKER = str(marker)
            killing.arm(shot, out)

        return self.place.live(run, arrange, seed=seed, max_trials=MAX_TRIALS)

    def _was_shot(self, shot: Shot, status: int) -> bool:
        return (self.place.path / "shot").exists() if shot.victim == "worker" else status != 0

    def _shoot_timed(self, pid: int, delay: float, victim: Victim) -> bool:
        """Kill from outside after so many seconds; whether there was still somebody."""
        until = time.monotonic() + delay
        while time.monotonic() < until:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return False
            time.sleep(0.005)
        targets = [] if victim == "driver" else psutil.Process(pid).children()
        hit = False
        with suppress(psutil.NoSuchProcess):
            for child in targets:
                child.kill()
                hit = True
        if victim != "worker":
            os.kill(pid, signal.SIGKILL)
            hit = True
        return hit

    def _await_lock(self, run: Path) -> None:
        """A worker whose driver was killed is soon gone, and with it the lock."""
        until = time.monotonic() + 20
        while run.is_dir() and RunFolder(run).in_use():
            assert time.monotonic() < until, "the worker outlived its driver"
            time.sleep(0.005)

    def _check_origin(self, run: Path) -> None:
        """The exported weights are the ones that the best trial had at its best token."""
        from safetensors.torch import load_file

        history = fold(check_after_kill(run, []))
        best = history.incumbent
        assert best is not None
        expected = fastrun.origin(best.trial_id, best.best_tokens)
        for tensor in load_file(run / "adapter" / "adapter_model.safetensors").values():
            assert torch.all(tensor == expected), "the adapter is not the best trial's"


def _middle(segment: Segment) -> None:
    for _ in range(3):
        killing.point("in the middle of a segment")
        time.sleep(SPACING)


def preload() -> None:
    """Import what a run imports, so that a fork has it."""
    import optuna.storages  # noqa: F401


def campaign(kills: int, seed: int = 0, place: Path | None = None) -> Tally:
    """Kill so often; raises AssertionError or InvariantError where a promise is broken."""
    preload()
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        work = Campaign(fastrun.Place(place or Path(scratch)).make(), seed)
        work.survey()
        while work.tally.kills < kills:
            work.run(work.tally.runs, min(KILLS_PER_RUN, kills - work.tally.kills))
            print(f"{work.tally.kills} kills, {work.tally.runs} runs", file=sys.stderr, flush=True)
        return work.tally


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    print(json.dumps(campaign(given.kills, given.seed).as_json(), indent=1))


if __name__ == "__main__":
    main()
