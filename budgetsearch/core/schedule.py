"""The learning rate as a pure function of the tokens seen and the recorded schedule."""

from __future__ import annotations

import math

from budgetsearch.core.records import Schedule


def rate_factor(schedule: Schedule, tokens: int) -> float:
    """What the peak learning rate is multiplied with, in 0..1.

    Linear warmup, constant trunk, (1 - sqrt) cooldown to zero at ``stop_tokens``
    (Hägele et al. 2024, arXiv 2405.18392).
    """
    if tokens < schedule.warmup_tokens:
        return (tokens + 1) / schedule.warmup_tokens
    start = schedule.stop_tokens - schedule.cooldown_tokens
    if not schedule.cooldown_tokens or tokens < start:
        return 1.0
    return 1.0 - math.sqrt(min(1.0, (tokens - start) / schedule.cooldown_tokens))
