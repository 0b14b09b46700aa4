"""A budget that is too small, in words."""

from __future__ import annotations

import math

from budgetsearch.core.errors import BudgetError

RECOMMENDED = 1.1
"""A refusal names so many times the minimum: no two runs take the same time."""
GUESSED = 1.5
"""... and so many times one that rests on guesses: the machine may be slower than they take it to be."""


def too_small(budget_seconds: float, minimum: float, *, guessed: str = "") -> BudgetError:
    """What to say of a budget below the minimum; ``guessed``: why that is no more than a guess."""
    factor, ground = (GUESSED, f" (a guess: {guessed})") if guessed else (RECOMMENDED, "")
    given = f"{budget_seconds:.0f} s" if budget_seconds >= 1 else f"{budget_seconds:.1g} s"
    return BudgetError(
        f"A budget of {given} is too small here for loading, measuring, one short training segment and the "
        f"final evaluation. Use --hours {as_hours(factor * minimum)} or more{ground}.",
        minimum,
    )


def as_hours(seconds: float) -> str:
    """At least so many seconds, as people write them behind ``--hours``: 36s, 12m, 2.5h."""
    if seconds < 600:
        return f"{math.ceil(seconds)}s"
    return f"{math.ceil(seconds / 60)}m" if seconds < 7200 else f"{math.ceil(seconds / 360) / 10:g}h"
