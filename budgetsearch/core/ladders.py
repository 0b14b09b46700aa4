"""Which rungs a budget gets, as shares of a full run, and how many scouts that takes.

Measured on recorded curves (docs/policy.md): a budget of few full runs is best spent on trials that
are long enough to be believed; one of many full runs on many short ones, of which few go on.
"""

from __future__ import annotations

import math

USUAL = (1 / 6, 1.0)
"""Up to three full runs: on fine-tuning curves a rung at R/6 hardly ever throws the best away."""
FULL_RUNS = (1.0,)
"""One full run after the other."""
DEEP = (1 / 27, 1 / 9, 1 / 3, 1.0)
DEEP_FROM = 3.0
"""Full runs that the budget must hold for the deep ladder."""
FEW_TRIALS = 6
"""R leaves room for so many trials at the first rung, and up to so many one more is worth the second half
of the full run: on a machine that turns out slower than calibrated the full run shrinks before the
choice does."""
FINALISTS_SHARE = 0.4
"""Where the rungs are too few to say much about the end, the last part of the budget belongs to the
finalists: more of them in full find more than more short trials."""
SCOUTS = 8
"""Trials that show whether the shortest rung predicts the next: fewer cannot tell."""
SCOUTS_FROM = 8.0
"""Full runs that the budget must hold for scouts: below, they cost more than they tell."""


def ladders_for(
    multiple: float, first: float | None, eta: int, own_lengths: bool = False
) -> list[tuple[float, ...]]:
    """The ladders for a budget of ``multiple`` full runs, the preferred first, of which the first whose
    lowest rung is long enough is taken; rungs rise, and the last is 1.

    ``first`` is what the user asked for as the first rung, from which the others rise by ``eta``;
    None: as the budget allows. ``own_lengths``: runs pay only near ends of their own, so that unfinished ones
    say little; then the deep ladder waits until there are scouts that can find out.
    """
    if first is None:
        deep_from = SCOUTS_FROM if own_lengths else DEEP_FROM
        return [DEEP, USUAL, FULL_RUNS] if multiple >= deep_from else [USUAL, FULL_RUNS]
    shares = [first] if first < 1 else []
    while shares and shares[-1] * eta < 1 / math.sqrt(eta):  # one just below the full run is no use
        shares.append(shares[-1] * eta)
    wanted = (*shares, 1.0)
    return [wanted[start:] for start in range(len(wanted))]


def scouts_for(shares: tuple[float, ...], multiple: float) -> int:
    """How many scouts a ladder takes: only the deep one does, for its first rung may be too short."""
    return SCOUTS if shares == DEEP and multiple >= SCOUTS_FROM else 0
