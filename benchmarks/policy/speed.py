"""What one decision and one proposal cost, and how that grows with the number of trials.

python -m benchmarks.policy.speed           four dimensions, one model
python -m benchmarks.policy.speed --wide    all dimensions of lora_wide, two models
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import random
import statistics
import time
from collections.abc import Mapping
from typing import Any

from budgetsearch.core.events import Entry, Event, Opened, Planned, SegmentEnded, SegmentStarted, TrialAdded
from budgetsearch.core.history.fold import apply
from budgetsearch.core.history.history import History
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.decide import decide
from budgetsearch.core.policy.jobs import new_trial
from budgetsearch.core.ports import Proposal
from budgetsearch.core.records import Schedule, Segment, SegmentResult
from budgetsearch.core.space.models import with_models
from budgetsearch.core.space.space import Space
from budgetsearch.run.spaces import load_space
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
WIDE = with_models(load_space("lora_wide"), ("one", "two")).to_dict()
GAINS = (1.0, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9)
LADDER = (40.0, 120.0, 360.0, 1080.0)


def plan(space: Mapping[str, Any]) -> Plan:
    """A day on one card."""
    parsed = Space.parse(space)
    names = parsed.cost_classes
    slow = {name for name in names if name.endswith("nf4")}
    return Plan(
        budget_seconds=86400.0, gpu="a100", space=space, seed=0, eta=5, ladder=LADDER,
        reference_rates={name: 2000.0 if name in slow else 3000.0 for name in names},
        micro_batches=dict.fromkeys(names, 8),
        overheads={name: 6.0 if name in slow else 4.0 for name in names},
        checkpoint_seconds=dict.fromkeys(names, 1.0),
        load_seconds={name: 30.0 if name in slow else 20.0 for name in names},
        gang_gains=dict.fromkeys(names, GAINS),
        max_tokens=100_000_000, batch_size=16, step_tokens=8000.0, eval_examples=256, task_examples=0,
        reserve_seconds=600.0, score_seconds=300.0, checkpoint_every_seconds=864.0, max_trials=10_000,
    )  # fmt: skip


def history_of(count: int, raw: Mapping[str, Any]) -> History:
    """``count`` trials, of which fewer have gone on than were earned, and none with nf4: ``decide`` must
    choose, and compare examples for ties."""
    history, space, rng = History(), Space.parse(raw), random.Random(0)

    def add(event: Event) -> None:
        apply(history, Entry(0, 0.0, 0.0, event))

    add(Opened(86400.0, {}))
    add(Planned(made := plan(raw)))
    job = 0
    for number in range(count):
        unit = {name: rng.random() for name in space.searched}
        trial = new_trial(made, number, Proposal(space.from_unit(unit), "prior"))
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


def _propose(history: History, number: int, sampler: OptunaSampler) -> float:
    """Seconds."""
    start = time.perf_counter()
    sampler.propose(history, 0, number, 1)
    return time.perf_counter() - start


def main() -> None:
    """Print the median milliseconds of each, as a table in JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--wide", action="store_true", help="all dimensions of lora_wide, and two models")
    raw = WIDE if parser.parse_args().wide else SPACE
    print(
        json.dumps(
            {"dimensions": len(Space.parse(raw).dimensions), "searched": len(Space.parse(raw).searched)}
        )
    )
    rows = []
    for size in SIZES:
        start = time.perf_counter()
        history = history_of(size, raw)
        replay = time.perf_counter() - start
        decisions, firsts, proposals = [], [], []
        for _ in range(REPEATS):
            start = time.perf_counter()
            decide(plan(raw), history, history.candidates, 1000.0, 1)
            decisions.append(time.perf_counter() - start)
            sampler = OptunaSampler()  # as after a resume: the first proposal has nothing to remember
            firsts.append(_propose(history, size + 1, sampler))
            proposals.append(max(_propose(history, size + k, sampler) for k in range(2, 6)))
        rows.append(
            {
                "trials": size,
                "replay_ms": round(1000 * replay, 1),
                "decide_ms": round(1000 * statistics.median(decisions), 2),
                "first_propose_ms": round(1000 * statistics.median(firsts), 1),
                "propose_ms": round(1000 * statistics.median(proposals), 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
