"""Measure one quantization on real steps: its reference rate, its evaluation, its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Params,
    Schedule,
    Segment,
)
from budgetsearch.training.recipe import Shop, Timer, TrialTraining

MIN_SECONDS = 2.5
"""Steps are timed until they have taken so long, ..."""
MIN_STEPS = 2
MAX_STEPS = 20
EVAL_EXAMPLES = 16
PROBE_CHECKPOINT_TRIAL = 9999
"""Trial number of the probe, whose checkpoint is swept away like any other that nothing needs."""


def calibrate(
    base: Any,
    job: CalibrateJob,
    shop: Shop,
    load_seconds: float,
    is_memory_error: Callable[[BaseException], bool],
) -> tuple[Calibration, Any]:
    """Measure; returns the calibration and the bare base.

    The micro-batch starts at the effective batch and is halved while the longest rows do not fit.
    """
    timer = Timer()
    timer.seconds["load"] = load_seconds
    micro = job.batch_size
    while True:
        training = TrialTraining.set_up(base, _probe(job, micro), shop)
        try:
            calibration = _measure(training, job, shop, timer, micro)
            return calibration, training.adapter.take_off()
        except Exception as error:
            training.optimizer.zero_grad(set_to_none=True)
            base = training.adapter.take_off()
            if micro == 1 or not is_memory_error(error):
                raise
            micro //= 2


def _probe(job: CalibrateJob, micro: int) -> Segment:
    params: Params = {"quantization": job.quantization, "rank": job.rank, "learning_rate": 1e-6}
    return Segment(
        trial_id=PROBE_CHECKPOINT_TRIAL,
        params=params,
        seed=0,
        rung=0,
        start_tokens=0,
        stop_tokens=1,
        schedule=Schedule(0, 1),
        batch_size=job.batch_size,
        micro_batch=micro,
    )


def _measure(training: TrialTraining, job: CalibrateJob, shop: Shop, timer: Timer, micro: int) -> Calibration:
    """Time real steps: the first takes the longest rows, so that it shows the memory peak."""
    training.adapter.model.train()
    shop.beat("calibrate", 0, None)
    longest = sorted(range(len(shop.data.train)), key=lambda row: -shop.data.train.lengths[row])
    training.step_on(longest[: job.batch_size])
    before, start = training.tokens, time.monotonic()
    for step in range(1, MAX_STEPS + 1):
        training.step_on(training.order.step_rows(step))
        shop.beat("calibrate", training.tokens, None)
        if shop.stopping() or (step >= MIN_STEPS and time.monotonic() - start >= MIN_SECONDS):
            break
    rate = (training.tokens - before) / (time.monotonic() - start)
    timer.lap("train")
    count = min(EVAL_EXAMPLES, len(shop.data.valid))
    training.evaluate(count)
    timer.lap("evaluate")
    training.save()
    timer.lap("checkpoint")
    return Calibration(
        quantization=job.quantization,
        status="ok",
        tokens_per_second=rate,
        eval_seconds_per_example=timer.seconds["evaluate"] / count,
        checkpoint_seconds=timer.seconds["checkpoint"],
        load_seconds=timer.seconds["load"],
        micro_batch=micro,
        peak_bytes=shop.peak_bytes(),
        seconds=dict(timer.seconds),
    )
