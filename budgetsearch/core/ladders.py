"""Which rungs a budget gets, as shares of a full run, and how many scouts that takes.

Measured on recorded curves (docs/policy.md): a budget of few full runs is best spent on trials that
are long enough to be believed; one of many full runs on many short ones, of which few go on.
"""

from __future__ import annotations

import math

USUAL = (1 / 6, 1.0)
"""Up to three full runs: on fine-tuning curves a rung at R/6 hardly ever throws the best away."""
DEEP = (1 / 27, 1 / 9, 1 / 3, 1.0)
DEEP_FROM = 3.0
"""Full runs that the budget must hold for the deep ladder."""
FEW_TRIALS = 6
"""R leaves room for so many trials at the first rung, and up to so many one more is worth the second half
of the full run: on a machine that turns out slower than calibrated the full run shrinks before the
choice does."""
SCOUTS = 8
"""Trials that show whether the shortest rung predicts the next: fewer cannot tell."""
SCOUTS_FROM = 8.0
"""Full runs that the budget must hold for scouts: below, they cost more than they tell."""


def shares_for(multiple: float, first: float | None, eta: int) -> tuple[float, ...]:
    """The rungs for a budget of ``multiple`` full runs, rising, the last is 1.

    ``first`` is what the user asked for as the first rung, from which the others rise by ``eta``;
    None: as the budget allows.
    """
    if first is None:
        return DEEP if multiple >= DEEP_FROM else USUAL
    shares, share = [], first
    while share < 1 / math.sqrt(eta):  # a rung just below the full run would only cost an evaluation
        shares.append(share)
        share *= eta
    return (*shares, 1.0)


def scouts_for(shares: tuple[float, ...], multiple: float) -> int:
    """How many scouts the deep ladder takes; the usual first rung needs none."""
    return SCOUTS if shares[0] <= DEEP[0] and multiple >= SCOUTS_FROM else 0
