"""What was reached against what it cost: one row of plots for each measure, one column for each cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from budgetsearch.comparing.bootstrap import Mean
from budgetsearch.comparing.comparison import Compared, Comparison
from budgetsearch.comparing.pairing import LOSS, Run
from budgetsearch.comparing.table import measure_title
from budgetsearch.report.peaks import PROCESS_PEAK

Cost = Callable[[Run], float | None]
COSTS: Sequence[tuple[str, Cost]] = (
    ("device seconds", lambda run: run.costs.device_seconds),
    ("energy (Wh)", lambda run: run.costs.watt_hours),
    (f"{PROCESS_PEAK} (GiB)", lambda run: run.costs.peak_bytes / 2**30 if run.costs.peak_bytes else None),
)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
DASHES = ("dash", "dot", "dashdot", "longdash")
ROW_PIXELS = 250
TICKS = [digit * 10.0**power for power in range(-5, 3) for digit in (1, 2, 5)]
"""Of a logarithmic axis, written out: plotly leaves the powers away."""
FURTHEST = 4.0
"""Losses that lie further apart than this factor stand on a logarithmic axis."""


def figure(found: Comparison) -> Any:
    """Small multiples as a plotly figure; the bare bases are lines, for they cost nothing.

    A cost that nobody measured has no column; ``unmeasured`` names it.
    """
    from plotly.subplots import make_subplots

    costs = [cost for cost in COSTS if cost[0] not in unmeasured(found)]
    lines = len(found.compared)
    plot = make_subplots(
        rows=lines,
        cols=len(costs),
        shared_xaxes="columns",
        shared_yaxes="rows",
        horizontal_spacing=0.03,
        vertical_spacing=0.12 / lines,
    )
    for row, compared in enumerate(found.compared, start=1):
        for column, (name, cost) in enumerate(costs, start=1):
            _panel(plot, row, column, found, compared, cost)
            title = name if row == lines else None
            plot.update_xaxes(rangemode="tozero", title_text=title, row=row, col=column)
        title = escape(measure_title(compared, found)).replace(" (", "<br>(")
        plot.update_yaxes(title_text=title, row=row, col=1)
        if compared.measure.name == LOSS and _far_apart(compared):
            plot.update_yaxes(type="log", tickvals=TICKS, ticktext=[f"{tick:g}" for tick in TICKS], row=row)
        elif compared.measure.higher_is_better:
            plot.update_yaxes(tickformat=".0%", row=row)
    plot.update_layout(
        template="plotly_white",
        height=110 + ROW_PIXELS * lines,
        margin={"l": 80, "r": 20, "t": 50, "b": 50},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    )
    return plot


def unmeasured(found: Comparison) -> list[str]:
    """Costs that no run knows."""
    return [name for name, cost in COSTS if all(cost(run) is None for run in found.runs)]


def _panel(plot: Any, row: int, column: int, found: Comparison, compared: Compared, cost: Cost) -> None:
    first = column == 1
    for place, run in enumerate(found.runs):
        mean, x = compared.means.get(run.name), cost(run)
        if mean is None or x is None:
            continue
        plot.add_scatter(
            x=[x], y=[mean.mean], error_y=_bars(mean), mode="markers", name=escape(run.name),
            legendgroup=run.name, showlegend=first and not _shown_before(plot, run.name),
            marker={
                "color": COLOURS[place % len(COLOURS)], "size": 11,
                "symbol": SYMBOLS[place % len(SYMBOLS)],
            },
            row=row, col=column,
        )  # fmt: skip
    for place, name in enumerate(found.bases.values()):
        if name in compared.means:
            _line(plot, row, column, compared.means[name].mean, name, DASHES[place % len(DASHES)])


def _line(plot: Any, row: int, column: int, y: float, name: str, dash: str) -> None:
    """A bare base across the panel; its name stands in the legend once."""
    if column == 1 and not _shown_before(plot, name):
        plot.add_scatter(
            x=[None], y=[None], mode="lines", name=escape(name), legendgroup=name,
            line={"color": "#777777", "dash": dash, "width": 1.5}, row=row, col=column,
        )  # fmt: skip
    plot.add_hline(y=y, line={"color": "#777777", "dash": dash, "width": 1.5}, row=row, col=column)


def _shown_before(plot: Any, group: str) -> bool:
    return any(trace.legendgroup == group and trace.showlegend is not False for trace in plot.data)


def _bars(mean: Mean) -> dict[str, Any] | None:
    if mean.low is None or mean.high is None:
        return None
    up, down = max(0.0, mean.high - mean.mean), max(0.0, mean.mean - mean.low)
    return {"type": "data", "array": [up], "arrayminus": [down], "thickness": 1.5, "width": 5}


def _far_apart(compared: Compared) -> bool:
    means = [mean.mean for mean in compared.means.values()]
    return min(means) > 0 and max(means) / min(means) > FURTHEST
