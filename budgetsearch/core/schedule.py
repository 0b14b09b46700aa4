"""The learning rate as a pure function of the tokens seen and the recorded schedule."""

from __future__ import annotations

import math
from dataclasses import replace

from budgetsearch.core.records import Schedule

COOLDOWN_SHARE = 0.2
"""The last fifth of a full run cools down."""


def rate_factor(schedule: Schedule, tokens: int) -> float:
    """What the peak learning rate is multiplied with, in 0..1.

    Linear warmup, constant trunk, (1 - sqrt) cooldown to zero at ``stop_tokens``
    (Hägele et al. 2024, arXiv 2405.18392).
    """
    if tokens < schedule.warmup_tokens:
        return (tokens + 1) / schedule.warmup_tokens
    progress = cooled(schedule, tokens)
    return 1.0 - math.sqrt(progress) if progress > 0.0 else 1.0


def cooled(schedule: Schedule, tokens: int) -> float:
    """The share of the cooldown that has passed, 0 on the trunk."""
    if not schedule.cooldown_tokens:
        return 0.0
    start = schedule.stop_tokens - schedule.cooldown_tokens
    return min(1.0, max(0.0, (tokens - start) / schedule.cooldown_tokens))


def ending_at(schedule: Schedule, tokens: int, stop: int) -> Schedule:
    """The schedule as it goes on from ``tokens`` to end at ``stop``: without a jump of the rate.

    On the trunk the cooldown is the last fifth, or what there still is of it; one that has begun is stretched
    or pressed together, so that its beginning may come to lie before the first token.
    """
    if stop <= tokens:
        return schedule
    progress = cooled(schedule, tokens)
    if progress <= 0.0:
        cooldown = min(int(COOLDOWN_SHARE * stop), stop - tokens)
    else:
        cooldown = round((stop - tokens) / max(1e-6, 1.0 - progress))
    return replace(schedule, stop_tokens=stop, cooldown_tokens=max(1, cooldown))
