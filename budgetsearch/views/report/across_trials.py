"""Figures that hold trials against each other: by rung, by memory, by parameter."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from budgetsearch.views.drawing import (
    BEST,
    BLUE,
    INK,
    OTHER,
    Figure,
    Json,
    Key,
    above,
    bars_of,
    dots_of,
    layout_of,
    line_of,
    memory_unit,
)
from budgetsearch.views.report.colours import FINALISTS, SOFT, trial_colours, trial_legend, trial_words
from budgetsearch.views.report.numbers import Numbers, TrialNumbers
from budgetsearch.views.report.peaks import PROCESS_PEAK
from budgetsearch.views.words import rung_ticks

REACHES = (("full run", "star", "★"), ("promoted", "diamond", "◆"), ("first rung only", "circle", "●"))
"""How far a trial got, plotly's symbol for it, and the legend's."""


def ladder(numbers: Numbers) -> Figure | None:
    """Loss by rung: a line for each promoted trial, a point for each that stayed behind."""
    trials = [t for t in numbers.trials if any(x is not None for x in t.rung_losses_nats_per_token)]
    if not trials:
        return None
    colours = trial_colours(numbers)
    behind = [t for t in trials if colours.get(t.trial_id, OTHER) == OTHER]
    ahead = [t for t in trials if colours.get(t.trial_id, OTHER) != OTHER]
    data = [_stayed(behind)] if behind else []
    # The best is drawn last, so that it lies on top; before it what also ran in full.
    ahead = sorted(ahead, key=lambda t: (colours[t.trial_id] == BEST, colours[t.trial_id] != SOFT))
    data += [_climb(t, colours[t.trial_id], numbers) for t in ahead]
    losses = [x for t in trials for x in t.rung_losses_nats_per_token if x is not None]
    layout = layout_of("", f"validation loss ({numbers.run.words.measure})", height=400, losses=losses)
    rungs = numbers.rungs
    layout["xaxis"] |= {
        "tickvals": [rung.rung for rung in rungs],
        "ticktext": rung_ticks([rung.train_seconds for rung in rungs]),
        "tickangle": 0,
        "range": [-0.3, len(rungs) - 0.7],
        "zeroline": False,
    }
    promoted = numbers.answer.trials_promoted
    words = f"Losses of {len(trials)} trials at {len(rungs)} rungs; {promoted} were promoted.{above(losses)}"
    return Figure("ladder", data, layout, words, tuple(trial_legend(numbers, "●")))


LOSS_AND_TEXT = "loss %{y:.4f}<br>%{text}"


def _stayed(trials: Sequence[TrialNumbers]) -> Json:
    points = [(k, x, t) for t in trials for k, x in enumerate(t.rung_losses_nats_per_token) if x is not None]
    rungs, losses = [k for k, _, _ in points], [x for _, x, _ in points]
    words = [trial_words(t) for _, _, t in points]
    return dots_of("not promoted", rungs, losses, {"color": OTHER, "size": 8}, words, LOSS_AND_TEXT)


def _climb(trial: TrialNumbers, colour: str, numbers: Numbers) -> Json:
    points = [(k, x) for k, x in enumerate(trial.rung_losses_nats_per_token) if x is not None]
    reasons = {p.to_rung: p.reason for p in numbers.promotions if p.trial_id == trial.trial_id}
    best = colour == BEST
    dots = dots_of(
        f"trial {trial.trial_id}",
        [k for k, _ in points],
        [x for _, x in points],
        {"color": colour, "size": 10 if best else 7},
        [f"{html.escape(reasons.get(k, trial.origin))}<br>{trial_words(trial)}" for k, _ in points],
        LOSS_AND_TEXT,
    )
    return {**dots, "mode": "lines+markers", "line": {"color": colour, "width": 3.5 if best else 1.5}}


def memory_front(numbers: Numbers) -> Figure | None:
    """Best loss of each trial against its peak memory, and the front of those that nobody beats in both."""
    trials = [t for t in numbers.trials if t.peak_bytes and t.best_loss_nats_per_token is not None]
    if not trials:
        return None
    colours, top = trial_colours(numbers), len(numbers.rungs) - 1
    front = sorted((t for t in trials if t.on_memory_front), key=lambda t: t.peak_bytes or 0)
    unit, size = memory_unit(max(t.peak_bytes or 0 for t in trials))
    legend = [Key("┄", INK, "Pareto front")]
    data = [
        line_of(
            "Pareto front",
            [(t.peak_bytes or 0) / size for t in front],
            [t.best_loss_nats_per_token for t in front],
            {"color": INK, "width": 1.5, "shape": "hv", "dash": "dot"},
            hoverinfo="skip",
        )
    ]
    for name, symbol, mark in REACHES:
        some = [t for t in trials if _reach(t, top) == name]
        if some:
            data.append(_memory_points((name, symbol), some, colours, (unit, size)))
            legend.append(Key(mark, INK, name))
    losses = [t.best_loss_nats_per_token for t in trials if t.best_loss_nats_per_token is not None]
    layout = layout_of(
        f"{PROCESS_PEAK} ({unit})",
        f"best validation loss ({numbers.run.words.measure})",
        height=380,
        losses=losses,
    )
    words = f"{len(front)} of {len(trials)} trials lie on the Pareto front.{above(losses)}"
    return Figure("memory_front", data, layout, words, tuple(legend))


def _reach(trial: TrialNumbers, top: int) -> str:
    return "full run" if trial.rung == top else "promoted" if trial.rung > 0 else "first rung only"


def _memory_points(
    reach: tuple[str, str],
    trials: Sequence[TrialNumbers],
    colours: Mapping[int, str],
    memory: tuple[str, int],
) -> Json:
    (name, symbol), (unit, size) = reach, memory
    colour = [colours.get(t.trial_id, OTHER) for t in trials]
    return dots_of(
        name,
        [(t.peak_bytes or 0) / size for t in trials],
        [t.best_loss_nats_per_token for t in trials],
        {"symbol": symbol, "size": 13 if symbol == "star" else 9, "color": colour},
        [trial_words(t) for t in trials],
        f"%{{x:.2f}} {unit}, {LOSS_AND_TEXT}",
    )


def importance(numbers: Numbers) -> Figure | None:
    """A bar for each parameter; grey where shuffled losses give as much."""
    above = numbers.importance.above_chance
    shares = sorted(numbers.importance.shares.items(), key=lambda item: item[1])
    if not shares:
        return None
    bars = bars_of(
        "importance",
        [html.escape(name.replace("_", " ")) for name, _ in shares],
        [share for _, share in shares],
        text=[f"{share:.0%}" + ("" if name in above else " (chance)") for name, share in shares],
        textposition="outside",
        cliponaxis=False,
        marker={"color": [BLUE if name in above else OTHER for name, _ in shares]},
        hoverinfo="skip",
    )
    layout = layout_of("share of the importance", "", height=120 + 34 * len(shares))
    layout["xaxis"] |= {"tickformat": ".0%", "range": [0, max(share for _, share in shares) * 1.3]}
    layout["xaxis"]["tickvals"] = [0.0, 0.25, 0.5, 0.75, 1.0]
    layout["yaxis"] |= {"type": "category", "showgrid": False}
    words = ", ".join(f"{name} {share:.0%}" for name, share in reversed(shares)) + "."
    legend = [Key("■", BLUE, "more than chance gives")] if above else []
    legend += [Key("■", OTHER, "not more than chance gives")] if len(above) < len(shares) else []
    return Figure("importance", [bars], layout, words, tuple(legend))


def rank_agreement(numbers: Numbers) -> Figure | None:
    """Each trial's loss at a rung against that at the next."""
    data: list[Json] = []
    legend, losses = [], []
    for pair in numbers.rank_correlations:
        both = [
            (t, t.rung_losses_nats_per_token[pair.lower_rung], t.rung_losses_nats_per_token[pair.upper_rung])
            for t in numbers.trials
        ]
        known = [(t, a, b) for t, a, b in both if a is not None and b is not None]
        if len(known) < 2:
            continue
        losses += [x for _, a, b in known for x in (a, b)]
        colour = FINALISTS[len(data) % len(FINALISTS)]
        upper = "the full run" if pair.upper_rung == len(numbers.rungs) - 1 else f"rung {pair.upper_rung}"
        name = f"rung {pair.lower_rung} and {upper}"
        legend.append(Key("●", colour, name))
        lower, higher = [a for _, a, _ in known], [b for _, _, b in known]
        words = [str(t.trial_id) for t, _, _ in known]
        hover = "trial %{text}: %{x:.4f}, then %{y:.4f}"
        data.append(dots_of(name, lower, higher, {"size": 9, "color": colour}, words, hover))
    if not data:
        return None
    layout = layout_of(
        f"loss at the lower rung ({numbers.run.words.measure})",
        "loss at the upper rung",
        height=360,
        losses=losses,
    )
    log = {key: layout["yaxis"][key] for key in ("type", "dtick", "tickformat") if key in layout["yaxis"]}
    layout["xaxis"] |= log
    layout["yaxis"].pop("range", None)
    shows = "Losses of the same trials at neighbouring rungs."
    return Figure("rank_agreement", data, layout, shows, tuple(legend))
