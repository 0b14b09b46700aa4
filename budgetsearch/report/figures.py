"""All figures of report.html."""

from __future__ import annotations

from budgetsearch.report import across_trials, over_time
from budgetsearch.report.drawing import Figure
from budgetsearch.report.numbers import Numbers

FIGURES = (
    over_time.timeline,
    across_trials.ladder,
    over_time.progress,
    across_trials.memory_front,
    across_trials.importance,
    across_trials.rank_agreement,
    over_time.memory_over_time,
)


def figures_of(numbers: Numbers) -> dict[str, Figure]:
    """Every figure that has something to show, by name."""
    found = (make(numbers) for make in FIGURES)
    return {figure.name: figure for figure in found if figure is not None}
