"""Many tests at once: p-values that say how often one of them all would be wrong."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """The same p-values, corrected so that one false finding among all is as rare as each was alone.

    Holm 1979, Scandinavian Journal of Statistics 6: the smallest times their number, the next times one less.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted
