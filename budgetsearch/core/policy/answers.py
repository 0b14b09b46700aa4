"""Answers of a rule: a decision, nothing, or a refusal that says how many seconds are missing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from budgetsearch.core.decisions import NeedCandidates, Run

MISSING = "are missing"
"""How a refusal ends."""


@dataclass(frozen=True)
class Refusal:
    """Something would run next, and does not fit into the time any more."""

    what: str
    needed: float
    """Seconds that it may take."""
    left: float
    """Seconds that there are for it."""

    @property
    def missing(self) -> int:
        """Whole seconds that are missing, rounded against what is refused."""
        return math.ceil(self.needed) - max(0, math.floor(self.left))

    def __str__(self) -> str:
        needed, missing = math.ceil(self.needed), self.missing
        left = f"{needed - missing} s are left before the reserve"
        return f"{self.what} needs {needed} s, {left}: {missing} s {MISSING}"


Answer = Run | NeedCandidates | Refusal | None


def first(answers: Iterable[Answer]) -> Answer:
    """The first decision; if there is none, the refusal to which the fewest seconds are missing."""
    refusals = []
    for answer in answers:
        if isinstance(answer, Refusal):
            refusals.append(answer)
        elif answer is not None:
            return answer
    return min(refusals, key=lambda refusal: refusal.missing, default=None)
