"""How deep the ladder goes, and how many scouts that takes."""

from __future__ import annotations

MAX_LEVELS = 3
"""A first rung at 1 / eta^3 of a full run, where the budget holds enough full runs."""
USUAL_LEVELS = 2
SCOUTS = 8
"""Trials that show whether the shortest rung predicts the next: fewer cannot tell."""


def deepest_level(multiple: float, eta: int) -> int:
    """Rungs below the full run, for a budget of ``multiple`` full runs.

    A bracket of ``eta ** levels`` trials trains for ``1 + levels * (1 - 1/eta)`` full runs.
    """
    return MAX_LEVELS if multiple >= 1 + MAX_LEVELS * (1 - 1 / eta) else USUAL_LEVELS


def scouts_for(levels: int) -> int:
    """How many scouts a ladder takes: the usual first rung (1 / eta^2) needs none."""
    return SCOUTS if levels > USUAL_LEVELS else 0
