"""A worker process that sleeps where another one trains, and writes down when it did.

``python -m benchmarks.ray.sleeper``: it speaks as ``budgetsearch.engines.worker`` does. Losses and seconds
are those of the simulator's world, so a search takes decisions like a real one while it needs no processor.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from budgetsearch.core.records import Job, TrainJob, WorkerSetup
from budgetsearch.core.reports import Beat, JobEnded
from budgetsearch.engines.simulator import Result
from budgetsearch.engines.worker import Inbox, Pipe
from budgetsearch.machine.child import die_with_parent
from tests.support.worlds import SyntheticWorld

TOKENS_PER_SECOND = 1000.0
OVERHEAD_SECONDS = 0.3
"""Of an evaluation."""
TICK_SECONDS = 0.05
"""A cancel is looked for so often."""
BEAT_SECONDS = 2.0


def work(job: Job, world: SyntheticWorld, inbox: Inbox, pipe: Pipe) -> tuple[Result, ...]:
    """Sleep as long as the job takes, or until it is told to stop."""
    results, seconds = world.perform(job)
    began = beaten = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        if inbox.is_cancelled(job.job_id):
            return world.interrupt(job, passed / seconds) or results
        if began + passed - beaten >= BEAT_SECONDS:
            beaten = began + passed
            pipe.send(Beat(job.job_id, None, "sleeping"))
        time.sleep(min(TICK_SECONDS, seconds - passed))
    return results


def main() -> None:
    """Read the setup, then jobs, until the input ends; one line a job goes to a file of this process."""
    die_with_parent()
    pipe, inbox = Pipe(), Inbox()
    world = SyntheticWorld(tokens_per_second=TOKENS_PER_SECOND, overhead_seconds=OVERHEAD_SECONDS)
    setup = inbox.orders.get()
    assert isinstance(setup, WorkerSetup)
    with (Path(setup.checkpoint_path) / f"slept-{os.getpid()}.jsonl").open("a", encoding="utf-8") as log:
        while True:
            job = inbox.orders.get()
            if isinstance(job, WorkerSetup):
                continue
            began = time.monotonic()
            results = work(job, world, inbox, pipe)
            row = {"job": job.job_id, "train": isinstance(job, TrainJob)}
            print(json.dumps({**row, "from": began, "to": time.monotonic()}), file=log, flush=True)
            pipe.send(JobEnded(job.job_id, results))


if __name__ == "__main__":
    main()
