"""What the figures of report.html share: colours, units, and a layout that a phone and a printer can show.

A figure is plotly's JSON, data and layout, drawn by plotly.js in the reader's browser. Figures are plain dicts, for
building them through plotly's classes costs seconds at the end of a budget; the tests hold every one of them
against those classes.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from budgetsearch.report.numbers import Numbers, TrialNumbers
from budgetsearch.report.tables import params_text

Json = dict[str, Any]
BEST, OTHER, INK, GRID = "#0B7A5E", "#B4BCC6", "#1B2530", "#E3E8EE"
PROMOTED = ("#7E57C2", "#C2569B", "#2E9FB5", "#A0622D", "#6B8E23")
"""Promoted trials take turns; that which became the adapter is BEST, what stayed behind is OTHER."""
LOG_FROM = 4.0
"""Losses that differ by more than this factor stand on a logarithmic axis."""
GIB = 2**30


@dataclass(frozen=True)
class Figure:
    """One figure: what plotly draws, and what it shows in words for those who do not see it."""

    name: str
    data: list[Json]
    layout: Json
    words: str


def trial_colours(numbers: Numbers) -> dict[int, str]:
    """The colour of each promoted trial, the same in every figure; of the best one in any case."""
    best = numbers.answer.best
    ahead = dict.fromkeys(p.trial_id for p in numbers.promotions)
    colours = {number: PROMOTED[place % len(PROMOTED)] for place, number in enumerate(ahead)}
    return {**colours, **({best.trial_id: BEST} if best else {})}


def time_unit(numbers: Numbers) -> tuple[str, float]:
    """In what a run of this length is best told: (s, min or h; seconds of one)."""
    longest = max(numbers.budget.budget_seconds or 0.0, numbers.budget.wall_seconds)
    if longest <= 300:
        return "s", 1.0
    return ("min", 60.0) if longest <= 3 * 3600 else ("h", 3600.0)


def trial_words(trial: TrialNumbers) -> str:
    """A trial and its configuration, for where one points at it."""
    return f"trial {trial.trial_id}: {html.escape(params_text(trial.params))}"


def line_of(name: str, x: list[float], y: list[float], style: Json) -> Json:
    """A plain line."""
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": style}


def note(x: float, text: str, anchor: str) -> Json:
    """A word at the top of the figure."""
    return {
        "x": x,
        "y": 1,
        "yref": "paper",
        "yanchor": "top",
        "xanchor": anchor,
        "text": text,
        "showarrow": False,
        "font": {"size": 12},
    }


def layout_of(x: str, y: str, *, height: int, losses: Sequence[float] = ()) -> Json:
    """What all figures share: readable on a phone, and no gesture that keeps the page from scrolling."""
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "automargin": True, "fixedrange": True}
    shared: Json = {
        "height": height,
        "autosize": True,
        "dragmode": False,
        "hovermode": "closest",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "margin": {"l": 10, "r": 14, "t": 10, "b": 10, "pad": 2},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        "xaxis": {**axis, "title": {"text": x, "standoff": 8}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 8}},
    }
    if losses and min(losses) > 0 and max(losses) > LOG_FROM * min(losses):
        shared["yaxis"] |= {"type": "log", "dtick": "D2", "tickformat": ".3~g"}
    return shared
