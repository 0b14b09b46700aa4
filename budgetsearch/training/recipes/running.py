"""A trial that a recipe trains, piece by piece, and what its evaluation returned: both are checked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from budgetsearch.core.errors import RecipeError
from budgetsearch.training.recipes.protocol import Course, Recipe

MOST_GROWTH = 8
"""A piece is at most so many times as long as the one before it."""


@dataclass
class Run:
    """A trial that trains in pieces of about a second."""

    recipe: Recipe
    trial: Any
    units: int
    course: Course
    pieces: int = 0
    _size: float = 0.0
    """Units of the next piece."""

    def piece(self, most: float) -> None:
        """One more piece, to ``most`` units at the most."""
        step = self.recipe.step
        size = max(step, int(self._size) // step * step)
        before, units = time.monotonic(), self.units
        self.go(min(self.units + size, most))
        seconds, done = time.monotonic() - before, self.units - units
        wanted = done * self.recipe.piece / max(1e-6, seconds)
        self._size = min(wanted, MOST_GROWTH * size)

    def rate(self, most: float, seconds: float, beat: Callable[[], None]) -> float:
        """Units per second, of pieces that take ``seconds`` together; where training begins anew each time,
        of the last of ever longer ones."""
        whole, step, began = self.recipe.whole, self.recipe.step, time.monotonic()
        self.go(min(step, most))  # the first piece pays for what is made once
        last = (self.units, time.monotonic() - began)
        mark = (self.units, time.monotonic())
        while time.monotonic() - mark[1] < seconds and self.units + step <= most:
            before = time.monotonic()
            self.go(min(2 * self.units, most)) if whole else self.piece(most)
            last = (self.units, time.monotonic() - before)
            beat()
        if not whole and self.units > mark[0]:
            last = (self.units - mark[0], time.monotonic() - mark[1])
        return last[0] / max(1e-9, last[1])

    def go(self, until: float) -> None:
        """Train to so many units.

        Raises:
            RecipeError: the recipe went backwards or did not move.
        """
        goal = int(until)
        found = self.recipe.train(self.trial, self.units, goal, self.course)
        now = goal if found is None else found
        if not isinstance(now, int) or isinstance(now, bool):
            raise RecipeError(f"The recipe's train returned {now!r}; it must be how many units there are.")
        if now < self.units or (now == self.units < goal and not self.course.should_stop()):
            raise RecipeError(
                f"The recipe's train was to go from {self.units} to {goal} units and returned {now}; it must "
                "go on by at least one, and never back."
            )
        self.units = now
        self.pieces += 1


def losses_of(found: Any, method: str = "evaluate") -> tuple[float, ...]:
    """What a recipe's evaluation returned, as numbers; ``method``: whose name an error gives.

    Raises:
        RecipeError: it is no number and no sequence of them.
    """
    try:
        return (float(found),)
    except (TypeError, ValueError):
        pass
    try:
        losses = tuple(float(one) for one in found)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"The recipe's {method} returned {str(found)[:80]!r}; it must be a number, or one per example."
        ) from error
    if not losses:
        raise RecipeError(f"The recipe's {method} returned no numbers; it must be one, or one per example.")
    return losses


def mean(losses: Sequence[float]) -> float:
    """Of at least one number."""
    return math.fsum(losses) / len(losses)
