"""What all figures share: colours, units, and a layout that a phone and a printer can show.

A figure is plotly's JSON, data and layout, drawn by plotly.js in the reader's browser. They are plain dicts:
building them through plotly's classes costs seconds at the end of a budget. The tests hold every one of them
against those classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
BEST, OTHER, INK, GRID = "#0B7A5E", "#B4BCC6", "#1B2530", "#E3E8EE"
BLUE, RED = "#1F5FA8", "#D64545"
LOG_FROM = 4.0
"""Losses that differ by more than this factor stand on a logarithmic axis."""
CLIP_QUANTILE = 0.9
"""Where the worst losses would press all others together, those above this quantile lie above the picture."""
CLIP_LEAST = 10
"""... if there are so many losses."""
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Key:
    """One entry of a figure's legend, which stands in the page: plotly's own takes half of a phone."""

    mark: str
    colour: str
    label: str


@dataclass(frozen=True)
class Figure:
    """One figure: what plotly draws, and what it shows in words for those who do not see it."""

    name: str
    data: list[Json]
    layout: Json
    words: str
    legend: tuple[Key, ...] = ()

    def to_json(self) -> str:
        """As plotly reads it, without a space."""
        return json.dumps({"data": self.data, "layout": self.layout}, separators=(",", ":"), allow_nan=False)


def memory_unit(count: int) -> tuple[str, int]:
    """In what so many bytes are best told."""
    return ("MiB", MIB) if count < 2 * GIB else ("GiB", GIB)


def unit_of(longest: float) -> tuple[str, float]:
    """In what so many seconds are best told."""
    if longest <= 300:
        return "s", 1.0
    return ("min", 60.0) if longest <= 3 * 3600 else ("h", 3600.0)


def line_of(name: str, x: Sequence[float], y: Sequence[Any], style: Json, **more: Any) -> Json:
    """A line; ``more``: whatever else plotly's schema has."""
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": style, **more}


def dots_of(
    name: str, x: Sequence[float], y: Sequence[Any], marker: Json, text: list[Any], hover: str, **more: Any
) -> Json:
    """Points; ``hover``: what is told of one, in plotly's template of x, y and text."""
    trace = {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "marker": marker}
    return {**trace, "text": text, "hovertemplate": f"{hover}<extra></extra>", **more}


def bars_of(name: str, y: list[Any], x: list[float], **more: Any) -> Json:
    """Bars from left to right."""
    return {"type": "bar", "orientation": "h", "name": name, "y": y, "x": x, **more}


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
    """Layout that all figures share: readable on a phone, and no gesture keeps the page from scrolling."""
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "automargin": True, "fixedrange": True}
    shared: Json = {
        "height": height,
        "autosize": True,
        "dragmode": False,
        "hovermode": "closest",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "margin": {"l": 10, "r": 14, "t": 10, "b": 10, "pad": 2},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",  # the page's own, light or dark
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "showlegend": False,
        "xaxis": {**axis, "title": {"text": x, "standoff": 8}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 8}},
    }
    shared["yaxis"] |= loss_axis(losses)
    return shared


def loss_axis(losses: Sequence[float]) -> Json:
    """Logarithmic where losses differ much, and not farther up than most of them lie."""
    if not losses or min(losses) <= 0:
        return {}
    low, high = min(losses), highest_shown(losses)
    log = high > LOG_FROM * low
    axis: Json = {"type": "log", "dtick": "D2", "tickformat": ".3~g"} if log else {}
    if high < max(losses):
        margin = (high / low) ** 0.06 if log else 1 + 0.06 * (high - low) / low
        ends = [low / margin, high]
        axis["range"] = [math.log10(end) for end in ends] if log else ends
    return axis


def highest_shown(losses: Sequence[float]) -> float:
    """The highest loss that a figure shows."""
    if len(losses) < CLIP_LEAST:
        return max(losses)
    most = sorted(losses)[math.ceil(CLIP_QUANTILE * len(losses)) - 1]
    return 1.1 * most if max(losses) > LOG_FROM * most else max(losses)


def above(losses: Sequence[float]) -> str:
    """Say how many losses a figure leaves out."""
    high = highest_shown(losses) if losses else 0.0
    count = sum(1 for loss in losses if loss > high)
    return f" {count} {'loss lies' if count == 1 else 'losses lie'} above the picture." if count else ""
