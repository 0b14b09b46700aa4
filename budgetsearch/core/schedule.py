"""The learning rate as a pure function of the tokens seen and the recorded schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from budgetsearch.core.records import Params, Schedule

FALLS: Mapping[str, Callable[[float], float]] = {
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""What is left of the rate after a share of the cooldown, by shape. (1 - sqrt) came out best in Hägele et al.
2024, arXiv 2405.18392; most trainers have one of the others."""


def rate_factor(schedule: Schedule, tokens: int) -> float:
    """What the peak learning rate is multiplied with, in 0..1.

    Linear warmup, constant trunk, cooldown to zero at ``stop_tokens``.
    """
    if tokens < schedule.warmup_tokens:
        return (tokens + 1) / schedule.warmup_tokens
    progress = cooled(schedule, tokens)
    return FALLS[schedule.shape](progress) if progress > 0.0 else 1.0


def cooled(schedule: Schedule, tokens: int) -> float:
    """The share of the cooldown that has passed, 0 on the trunk."""
    if not schedule.cooldown_tokens:
        return 0.0
    start = schedule.stop_tokens - schedule.cooldown_tokens
    return min(1.0, max(0.0, (tokens - start) / schedule.cooldown_tokens))


def full_schedule(params: Params, warmup: int, stop: int, cooldown: int = 0) -> Schedule:
    """Of a full run with these parameters; ``params``: those that mean something here."""
    found = Schedule(warmup, stop, cooldown)
    shape, share = params.get("schedule", found.shape), params.get("cooldown", found.share)
    return replace(found, shape=str(shape), share=float(share))


def ending_at(schedule: Schedule, tokens: int, stop: int) -> Schedule:
    """The schedule as it goes on from ``tokens`` to end at ``stop``: without a jump of the rate.

    On the trunk the cooldown is the last ``share``, or what there still is of it; one that has begun is
    stretched or pressed together, so that its beginning may come to lie before the first token.
    """
    if stop <= tokens:
        return schedule
    progress = cooled(schedule, tokens)
    if progress <= 0.0:
        cooldown = min(int(schedule.share * stop), stop - tokens)
    else:
        cooldown = round((stop - tokens) / max(1e-6, 1.0 - progress))
    return replace(schedule, stop_tokens=stop, cooldown_tokens=max(1, cooldown))
