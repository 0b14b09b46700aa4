"""What was reached against what it cost: one row of small plots for each measure, one plot for each cost.

Plain data in plotly's schema, drawn by plotly.js in the reader's browser. Each plot is a figure of its own,
so that a narrow page puts them below each other; names stand in a legend of the page, which wraps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from budgetsearch.tools.compare.comparison import Compared, Comparison
from budgetsearch.tools.compare.pairing import LOSS, Run
from budgetsearch.views.drawing import Figure, Json, Key, dots_of, layout_of, loss_axis
from budgetsearch.views.intervals import Estimate
from budgetsearch.views.report.peaks import PROCESS_PEAK

Cost = Callable[[Run], float | None]
COSTS: Sequence[tuple[str, Cost]] = (
    ("device seconds", lambda run: run.costs.device_seconds),
    ("energy (Wh)", lambda run: run.costs.watt_hours),
    (f"{PROCESS_PEAK} (GiB)", lambda run: run.costs.peak_bytes / 2**30 if run.costs.peak_bytes else None),
)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart."""
SYMBOLS = (
    *(("circle", "●"), ("square", "■"), ("diamond", "◆")),
    *(("triangle-up", "▲"), ("cross", "✚"), ("star", "★")),
)
"""Plotly's names, and the same in the legend."""
DASHES = (("dash", "╌"), ("dot", "┈"), ("dashdot", "┄"), ("longdash", "━"))
BASE_COLOUR = "#777777"
PANEL_PIXELS = 260
PADDING = 0.08
"""Of an axis's length, on both ends: a share's axis ends at 0 and 1 all the same."""


def panels(compared: Compared, found: Comparison, number: int) -> list[Figure]:
    """The plots of one measure, the ``number``-th; a cost that nobody measured has none."""
    names = unmeasured(found)
    return [
        _panel(compared, found, f"{number}-{place}", name, cost)
        for place, (name, cost) in enumerate(COSTS)
        if name not in names
    ]


def unmeasured(found: Comparison) -> list[str]:
    """Costs that no run knows."""
    return [name for name, cost in COSTS if all(cost(run) is None for run in found.runs)]


def legend(found: Comparison) -> list[Key]:
    """Who is which symbol, and which line a base is."""
    keys = [Key(_symbol(place)[1], _colour(place), run.name) for place, run in enumerate(found.runs)]
    bases = enumerate(found.bases.values())
    return [*keys, *(Key(DASHES[place % len(DASHES)][1], BASE_COLOUR, name) for place, name in bases)]


def caption(compared: Compared) -> str:
    """What the plots of a measure show, in a sentence."""
    better = "higher" if compared.measure.higher_is_better else "lower"
    ends = "" if compared.too_few else ", a bar its interval"
    return f"Each symbol is a run{ends}; {better} and further to the left is better; a line is a bare base."


def _panel(compared: Compared, found: Comparison, name: str, title: str, cost: Cost) -> Figure:
    layout = layout_of(title, "", height=PANEL_PIXELS)
    layout["xaxis"]["rangemode"] = "tozero"
    layout["yaxis"] |= _axis(compared)
    layout["shapes"] = [
        _line(compared.means[base].value, DASHES[place % len(DASHES)][0])
        for place, base in enumerate(found.bases.values())
        if base in compared.means
    ]
    points = [
        _point(run, x, compared.means[run.name], place)
        for place, run in enumerate(found.runs)
        if run.name in compared.means and (x := cost(run)) is not None
    ]
    words = f"{compared.measure.name} of {len(points)} runs against {title}"
    return Figure(name, points, layout, words)


def _point(run: Run, x: float, mean: Estimate, place: int) -> Json:
    marker = {"color": _colour(place), "size": 11, "symbol": _symbol(place)[0]}
    name = escape(run.name)
    point = dots_of(name, [x], [mean.value], marker, [name], "%{text}<br>%{x:.4g}, %{y:.4g}")
    point["cliponaxis"] = False
    if mean.low is not None and mean.high is not None:
        up, down = max(0.0, mean.high - mean.value), max(0.0, mean.value - mean.low)
        point["error_y"] = {"type": "data", "array": [up], "arrayminus": [down], "thickness": 1.5, "width": 5}
    return point


def _axis(compared: Compared) -> Json:
    """The same for all plots of a measure: room for every interval, of shares never beyond 0 and 1."""
    means = compared.means.values()
    low = min(mean.value if mean.low is None else mean.low for mean in means)
    high = max(mean.value if mean.high is None else mean.high for mean in means)
    if compared.measure.name == LOSS and (axis := loss_axis([low, high])):
        margin = (high / low) ** PADDING
        return {**axis, "range": [math.log10(low / margin), math.log10(high * margin)]}
    margin = PADDING * (high - low) or 0.05 * (abs(high) or 1.0)
    if compared.measure.shares:
        return {"tickformat": ".0%", "range": [max(0.0, low - margin), min(1.0, high + margin)]}
    return {"range": [low - margin, high + margin]}


def _line(y: float, dash: str) -> Json:
    style = {"color": BASE_COLOUR, "dash": dash, "width": 1.5}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": style}


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _symbol(place: int) -> tuple[str, str]:
    return SYMBOLS[place % len(SYMBOLS)]
