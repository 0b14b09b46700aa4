"""Three plots for the study: losses by rung, the budget by phase, loss over GPU seconds.

A figure is plain data in plotly's schema, made without plotly: importing that takes a second of the budget.
Only what is drawn is in it, and every number has five digits, for a study keeps plots in pieces of two
kilobytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from budgetsearch.core.history.history import History
from budgetsearch.core.history.retention import contenders
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.records import PHASES
from budgetsearch.views.study.shown_trial import values
from budgetsearch.views.words import rung_ticks

BEST, GOING, OTHER, LINE = "#d1495b", "#00798c", "#a8b0b8", "#30343f"
WIDE_RANGE = 10.0
"""Losses that differ by such a factor are drawn on a logarithmic axis."""
LOSS_TITLE = "validation loss (nats per token)"
RUNGS = "A line is a trial; it ends at the last rung that the trial finished."
BUDGET = "What each second of the budget was charged to."
OVER_TIME = "A point is a measured loss; the line is the best adapter had the run ended there."
"""What a plot shows, in a sentence under its title: optuna-dashboard has no other place for it."""


@dataclass(frozen=True)
class Figure:
    """A plotly figure as data."""

    data: list[dict[str, Any]]
    layout: dict[str, Any]

    def to_json(self) -> str:
        """As optuna-dashboard stores it."""
        return json.dumps({"data": self.data, "layout": self.layout}, separators=(",", ":"), allow_nan=False)


def rungs(history: History) -> Figure:
    """Validation loss of each trial at each rung: the best trial, those that may still run, the others."""
    best = history.incumbent
    groups: dict[str, list[TrialState]] = {"others": [], "may go on": [], "best": []}
    over = history.closed is not None and history.closed.state == "finished"
    open_still = set() if over else contenders(history)
    for state in history.trials.values():
        name = "may go on" if state.trial_id in open_still else "others"
        groups["best" if best is state else name].append(state)
    colours = {"others": OTHER, "may go on": GOING, "best": BEST}
    lines = {name: _lines(states, history) for name, states in groups.items()}
    found = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": f"trial {best.trial_id}, the best" if best and name == "best" else name,
            "line": {"color": colours[name], "width": 3 if name == "best" else 1},
            "marker": {"size": 9 if name == "best" else 6},
            "hovertemplate": "trial %{customdata}: %{y}<extra></extra>",
            **line,
        }
        for name, line in lines.items()
        if line["x"]
    ]
    names = rung_ticks(history.plan.ladder if history.plan else ())
    steps = {
        "tickvals": list(range(len(names))),
        "ticktext": names,
        "tickangle": 0,
        "range": [-0.3, max(len(names), 1) - 0.7],
        "zeroline": False,
        "title": {"text": "rung and its time of training"},
    }
    losses = [y for line in lines.values() for y in line["y"]]
    return Figure(found, _layout("Validation loss at each rung", RUNGS, steps, _loss_axis(losses)))


def _lines(states: Iterable[TrialState], history: History) -> dict[str, list[Any]]:
    """Many lines as one trace, with a gap between them: a trace for each would be long."""
    x: list[Any] = []
    y: list[Any] = []
    trials: list[Any] = []
    for state in states:
        found = values(state, history) if history.plan else {}
        for rung, loss in found.items():
            x.append(rung)
            y.append(_digits(loss))
            trials.append(state.trial_id)
        for column in (x, y, trials) if found else ():
            column.append(None)
    return {"x": x, "y": y, "customdata": trials}


def budget(history: History) -> Figure:
    """Seconds of the budget by phase, and what is left of it."""
    total = history.opened.budget_seconds if history.opened else history.spent
    bars: list[tuple[str, float, str]]
    bars = [(phase, history.charged[phase], LINE) for phase in PHASES if history.charged.get(phase)]
    under_way = history.spent - sum(history.charged.values())
    over = history.closed is not None and history.closed.state == "finished"
    bars += [("under way", under_way, GOING)] if under_way > 0.005 else []
    bars += [("not used" if over else "left", total - history.spent, OTHER)] if total > history.spent else []
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [name for name, _, _ in bars],
        "x": [_digits(seconds) for _, seconds, _ in bars],
        "text": [f"{seconds:.1f} s, {seconds / total:.1%}" if total else "" for _, seconds, _ in bars],
        "textposition": "auto",
        "cliponaxis": False,
        "marker": {"color": [colour for _, _, colour in bars]},
        "hovertemplate": "%{y}: %{text}<extra></extra>",
    }
    title = f"The budget by phase: {history.spent:.0f} of {total:.0f} s spent"
    steps = {"title": {"text": "seconds"}, "rangemode": "tozero"}
    return Figure([trace], _layout(title, BUDGET, steps, {"autorange": "reversed", "automargin": True}))


def loss_over_time(history: History) -> Figure:
    """Each measured loss over the GPU seconds of all segments until then, and the best so far."""
    seconds, best = 0.0, math.inf
    dots: dict[str, list[Any]] = {"x": [], "y": [], "customdata": []}
    line: dict[str, list[Any]] = {"x": [], "y": []}
    for segment, result in history.results:
        seconds += sum(result.seconds.values())
        if result.loss is None or not math.isfinite(result.loss):
            continue
        at, loss = _digits(seconds), _digits(result.loss)
        dots["x"].append(at)
        dots["y"].append(loss)
        dots["customdata"].append([result.trial_id, segment.rung])
        if result.checkpoint_out and loss < best:
            best = loss
            line["x"].append(at)
            line["y"].append(loss)
    if line["x"]:
        line["x"].append(_digits(seconds))
        line["y"].append(best)
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "a measured loss",
            "marker": {"color": GOING, "size": 6},
            "hovertemplate": "trial %{customdata[0]}, towards rung %{customdata[1]}: %{y}<extra></extra>",
            **dots,
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "line": {"color": BEST, "shape": "hv", "width": 2},
            **line,
        },
    ]
    steps = {"title": {"text": "GPU seconds of all segments"}, "rangemode": "tozero"}
    return Figure(
        traces, _layout("Validation loss over GPU seconds", OVER_TIME, steps, _loss_axis(dots["y"]))
    )


PLOTS: Mapping[str, Callable[[History], Figure]] = {
    "rungs": rungs,
    "budget-by-phase": budget,
    "loss-over-gpu-seconds": loss_over_time,
}
"""By the name under which the study keeps them."""


def _layout(title: str, words: str, x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": {"text": f"{title}<br><sub>{words}</sub>"},
        "xaxis": x,
        "yaxis": y,
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        "margin": {"l": 70, "r": 30, "t": 125, "b": 70},
    }


def _loss_axis(losses: Iterable[float | None]) -> dict[str, Any]:
    known = [loss for loss in losses if loss is not None and loss > 0]
    title = {"title": {"text": LOSS_TITLE}}
    if not known or max(known) <= WIDE_RANGE * min(known):
        return title
    # Plotly's own labels on such an axis are single digits: a 2 may be 0.2.
    return {**title, "type": "log", "tickvals": _ticks(min(known), max(known))}


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times every power of ten between the two, and one step around."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [_digits(step * 10.0**decade) for decade in decades for step in (1, 2, 5)]
    return [tick for tick in ticks if low / 2.5 <= tick <= high * 2.5]


def _digits(value: float) -> float:
    return float(f"{value:.5g}")
