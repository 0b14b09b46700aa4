"""A contest for people: a table in the terminal, a plot in the browser."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from budgetsearch.tools.simulate.contest import MOMENTS, Outcome, standings
from budgetsearch.views.fitted import table_of


def table(outcomes: Sequence[Outcome]) -> Table:
    """Normalised regret x 100 at each deadline, mean and standard error, and the average rank."""
    found = standings(outcomes)
    multiples = list(found[0].regrets)
    seeds, tables = len({o.seed for o in outcomes}), len({o.curves for o in outcomes})
    caption = f"normalised regret x 100 (standard error over {seeds} seeds; {tables} tables); lower is better"
    heads = ["method", *(f"{multiple:g}x" for multiple in multiples), "average rank"]
    cells = [
        [one.method, *(_cell(*one.regrets[multiple]) for multiple in multiples), f"{one.rank:.2f}"]
        for one in found
    ]
    shown = table_of("", heads, cells)
    shown.caption = caption
    return shown


def _cell(mean: float, error: float) -> str:
    return f"{100 * mean:.1f}" + ("" if math.isnan(error) else f" ({100 * error:.1f})")


def plot(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Write the mean best-so-far over time at the largest budget as one HTML page that needs no network."""
    import plotly.graph_objects as go

    largest = max(o.multiple for o in outcomes)
    figure = go.Figure()
    times = [largest * k / MOMENTS for k in range(1, MOMENTS + 1)]
    for standing in standings(outcomes):
        courses = [o.course for o in outcomes if o.method == standing.method and o.multiple == largest]
        means = [100 * statistics.fmean(values) for values in zip(*courses, strict=True)]
        figure.add_scatter(x=times, y=means, mode="lines", name=standing.method)
    figure.update_layout(
        title=f"Best so far within {largest:g} full runs, mean over tables and seeds",
        xaxis_title="time (mean full runs)",
        yaxis_title="normalised regret x 100",
        template="plotly_white",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)
    return path
