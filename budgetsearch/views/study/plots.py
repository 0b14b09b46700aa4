"""Three plots for the study: losses by rung, the budget by phase, loss over GPU seconds.

Only what is drawn is in it, and every number has five digits, for a study keeps plots in pieces of two
kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from budgetsearch.core.history.history import History
from budgetsearch.core.history.retention import contenders
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.records import PHASES
from budgetsearch.views.drawing import Figure, bars_of, dots_of, line_of, loss_axis
from budgetsearch.views.study.shown_trial import values
from budgetsearch.views.words import rung_ticks

BEST, GOING, OTHER, LINE = "#d1495b", "#00798c", "#a8b0b8", "#30343f"
LOSS_TITLE = "validation loss (nats per token)"
RUNGS = "A line is a trial; it ends at the last rung that the trial finished."
BUDGET = "What each second of the budget was charged to."
OVER_TIME = "A point is a measured loss; the line is the best adapter had the run ended there."
"""What a plot shows, in a sentence under its title: optuna-dashboard has no other place for it."""


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
        dots_of(
            f"trial {best.trial_id}, the best" if best and name == "best" else name,
            line["x"],
            line["y"],
            {"size": 9 if name == "best" else 6},
            line["trials"],
            "trial %{text}: %{y}",
            mode="lines+markers",
            line={"color": colours[name], "width": 3 if name == "best" else 1},
        )
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
    layout = _layout("Validation loss at each rung", RUNGS, steps, _loss_axis(losses))
    return Figure("rungs", found, layout, RUNGS)


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
    return {"x": x, "y": y, "trials": trials}


def budget(history: History) -> Figure:
    """Seconds of the budget by phase, and what is left of it."""
    total = history.opened.budget_seconds if history.opened else history.spent
    bars: list[tuple[str, float, str]]
    bars = [(phase, history.charged[phase], LINE) for phase in PHASES if history.charged.get(phase)]
    under_way = history.spent - sum(history.charged.values())
    over = history.closed is not None and history.closed.state == "finished"
    bars += [("under way", under_way, GOING)] if under_way > 0.005 else []
    bars += [("not used" if over else "left", total - history.spent, OTHER)] if total > history.spent else []
    trace = bars_of(
        "seconds",
        [name for name, _, _ in bars],
        [_digits(seconds) for _, seconds, _ in bars],
        text=[f"{seconds:.1f} s, {seconds / total:.1%}" if total else "" for _, seconds, _ in bars],
        textposition="auto",
        cliponaxis=False,
        marker={"color": [colour for _, _, colour in bars]},
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    title = f"The budget by phase: {history.spent:.0f} of {total:.0f} s spent"
    steps = {"title": {"text": "seconds"}, "rangemode": "tozero"}
    layout = _layout(title, BUDGET, steps, {"autorange": "reversed", "automargin": True})
    return Figure("budget-by-phase", [trace], layout, BUDGET)


def loss_over_time(history: History) -> Figure:
    """Each measured loss over the GPU seconds of all segments until then, and the best so far."""
    seconds, best = 0.0, math.inf
    dots: list[tuple[float, float, int, int]] = []
    line: list[tuple[float, float]] = []
    for segment, result in history.results:
        seconds += sum(result.seconds.values())
        if result.loss is None or not math.isfinite(result.loss):
            continue
        at, loss = _digits(seconds), _digits(result.loss)
        dots.append((at, loss, result.trial_id, segment.rung))
        if result.checkpoint_out and loss < best:
            best = loss
            line.append((at, loss))
    if line:
        line.append((_digits(seconds), best))
    losses = [loss for _, loss, _, _ in dots]
    traces = [
        dots_of(
            "a measured loss",
            [at for at, *_ in dots],
            losses,
            {"color": GOING, "size": 6},
            [trial_id for _, _, trial_id, _ in dots],
            "trial %{text}, towards rung %{customdata}: %{y}",
            customdata=[rung for *_, rung in dots],
        ),
        line_of(
            "best so far",
            [at for at, _ in line],
            [loss for _, loss in line],
            {"color": BEST, "shape": "hv", "width": 2},
        ),
    ]
    steps = {"title": {"text": "GPU seconds of all segments"}, "rangemode": "tozero"}
    layout = _layout("Validation loss over GPU seconds", OVER_TIME, steps, _loss_axis(losses))
    return Figure("loss-over-gpu-seconds", traces, layout, OVER_TIME)


PLOTS = (rungs, budget, loss_over_time)


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
    return {"title": {"text": LOSS_TITLE}, **loss_axis([loss for loss in losses if loss is not None])}


def _digits(value: float) -> float:
    return float(f"{value:.5g}")
