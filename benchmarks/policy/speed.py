"""What one decision and one proposal cost, and how that grows with the number of trials.

python benchmarks/policy/speed.py
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import random
import statistics
import time

from budgetsearch.core.events import Entry, Event, Opened, Planned, SegmentEnded, SegmentStarted, TrialAdded
from budgetsearch.core.history.fold import apply
from budgetsearch.core.history.history import History
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.decide import decide
from budgetsearch.core.policy.jobs import new_trial
from budgetsearch.core.ports import Proposal
from budgetsearch.core.records import Schedule, Segment, SegmentResult
from budgetsearch.core.space.space import Space
from budgetsearch.sampler.sampler import OptunaSampler

SIZES = (10, 30, 100, 300, 1000)
REPEATS = 5
SPACE = {
    "name": "speed",
    "dimensions": {
        "quantization": {"kind": "choice", "values": ["bf16", "nf4"]},
        "rank": {"kind": "choice", "values": [8, 16, 32, 64, 128], "ordered": True},
        "learning_rate": {"kind": "float", "low": 1e-5, "high": 1e-3, "log": True},
        "dropout": {"kind": "choice", "values": [0.0, 0.05]},
    },
}
GAINS = (1.0, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9)
LADDER = (40.0, 120.0, 360.0, 1080.0)


def plan() -> Plan:
    """A day on one card."""
    return Plan(
        budget_seconds=86400.0, gpu="a100", space=SPACE, seed=0, eta=5, ladder=LADDER,
        reference_rates={"bf16": 3000.0, "nf4": 2000.0}, micro_batches={"bf16": 8, "nf4": 8},
        overheads={"bf16": 4.0, "nf4": 6.0}, checkpoint_seconds={"bf16": 1.0, "nf4": 1.0},
        load_seconds={"bf16": 20.0, "nf4": 30.0},
        gang_gains={"bf16": GAINS, "nf4": GAINS},
        max_tokens=100_000_000, batch_size=16, step_tokens=8000.0, eval_examples=256, task_examples=0,
        reserve_seconds=600.0, score_seconds=300.0, checkpoint_every_seconds=864.0, max_trials=10_000,
    )  # fmt: skip


def history_of(count: int) -> History:
    """``count`` trials, of which fewer have gone on than were earned, and none with nf4: ``decide`` must
    choose, and compare examples for ties."""
    history, space, rng = History(), Space.parse(SPACE), random.Random(0)

    def add(event: Event) -> None:
        apply(history, Entry(0, 0.0, 0.0, event))

    add(Opened(86400.0, {}))
    add(Planned(plan()))
    job = 0
    for number in range(count):
        unit = {name: rng.random() for name in space.searched}
        trial = new_trial(plan(), number, Proposal(space.from_unit(unit), "prior"))
        add(TrialAdded(trial))
        rungs = 1
        if trial.params["quantization"] == "bf16":
            rungs += (number % 4 == 0) + (number % 40 == 0)
        for rung in range(rungs):
            start = trial.rung_tokens[rung - 1] if rung else 0
            stop = trial.rung_tokens[rung]
            schedule = Schedule(trial.warmup_tokens, stop)
            segment = Segment(number, trial.params, number, rung, start, stop, schedule, 16, 8)
            add(SegmentStarted(job, segment))
            loss = 1.0 + rng.random() - 0.1 * rung
            seconds = {"train": 40.0 * rng.uniform(0.8, 1.3), "evaluate": 3.0, "checkpoint": 1.0}
            losses = tuple(loss + rng.gauss(0.0, 0.5) for _ in range(256))
            name = f"{number}-{rung}"
            done = SegmentResult(number, rung, "ok", stop, loss, losses, seconds=seconds, checkpoint_out=name)
            add(SegmentEnded(job, done))
            job += 1
    return history


def _propose(history: History, number: int) -> float:
    """Seconds; a fresh sampler, so that nothing is remembered."""
    start = time.perf_counter()
    OptunaSampler().propose(history, 0, number, 1)
    return time.perf_counter() - start


def main() -> None:
    """Print the median milliseconds of each, as a table in JSON."""
    rows = []
    for size in SIZES:
        start = time.perf_counter()
        history = history_of(size)
        replay = time.perf_counter() - start
        decisions, proposals = [], []
        for _ in range(REPEATS):
            start = time.perf_counter()
            decide(plan(), history, history.candidates, 1000.0, 1)
            decisions.append(time.perf_counter() - start)
            proposals.append(max(_propose(history, size + k) for k in range(1, 5)))
        rows.append(
            {
                "trials": size,
                "replay_ms": round(1000 * replay, 1),
                "decide_ms": round(1000 * statistics.median(decisions), 2),
                "propose_ms": round(1000 * statistics.median(proposals), 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
