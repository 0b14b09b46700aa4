"""Figures along the time of the run: where the budget went, how the loss fell, what memory was in use."""

from __future__ import annotations

import html
from collections.abc import Sequence

from budgetsearch.core.records import Revision
from budgetsearch.views.drawing import (
    BEST,
    BLUE,
    GRID,
    INK,
    OTHER,
    RED,
    Figure,
    Json,
    Key,
    above,
    bars_of,
    dots_of,
    layout_of,
    line_of,
    memory_unit,
    note,
    unit_of,
)
from budgetsearch.views.report.colours import time_unit, trial_colours, trial_legend
from budgetsearch.views.report.numbers import Numbers
from budgetsearch.views.report.timeline import Span

PHASE_GROUPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("setting up, measuring", "#C3CEDA", ("setup", "calibrate")),
    ("training", BLUE, ("train",)),
    ("evaluating, scoring", "#7FB2E5", ("evaluate", "score")),
    ("loading, writing", "#F0B429", ("load", "checkpoint", "export")),
    ("idle", "#7A7F87", ("idle",)),
    ("lost", RED, ("crash", "down")),
)
LIMIT_REACH = 3.0
"""A limit that is more than so many times the peak is told, not drawn: all else would lie flat below it."""
BAR = 0.84
"""Of a row's height."""
ROW_PIXELS = 95
FEW_ROWS = 4
"""More workers than fit on a screen at that height get rows of ``LOW_ROW_PIXELS``."""
LOW_ROW_PIXELS = 56


def timeline(numbers: Numbers) -> Figure | None:
    """One row for the phases, one for each worker with the trials that it trained."""
    unit, divisor = time_unit(numbers)
    spans, phases = numbers.timeline.spans, numbers.timeline.phases
    if not spans and not phases:
        return None
    names = ["all phases"] if phases else []
    first = len(names)
    names += _worker_names(numbers)
    data = [_phase_bars(numbers, group, divisor) for group in PHASE_GROUPS] if phases else []
    data = [trace for trace in data if trace["x"]]
    data += _segment_bars(numbers, first, divisor)
    data += _promotion_marks(numbers, first, divisor)
    row = ROW_PIXELS if len(names) <= FEW_ROWS else LOW_ROW_PIXELS
    layout = layout_of(f"time since the start ({unit})", "", height=150 + row * len(names))
    layout["xaxis"]["rangemode"] = "tozero"
    layout["yaxis"] |= {
        "tickvals": list(range(len(names))),
        "ticktext": names,
        "range": [len(names) - 0.5, -0.5],
        "showgrid": False,
        "zeroline": False,
    }
    layout |= {"barmode": "overlay", "shapes": [], "annotations": []}
    layout["uniformtext"] = {"minsize": 9, "mode": "hide"}
    _draw_deadline(layout, numbers, divisor)
    tried, seconds = numbers.answer.trials_tried, numbers.budget.wall_seconds
    words = f"{len(spans)} segments of {tried} trials over {seconds:.0f} s."
    phase_keys = [Key("■", colour, name) for name, colour, _ in PHASE_GROUPS if _charged(numbers, name)]
    marks = [Key("▼", INK, "promotion")] if numbers.promotions else []
    return Figure("timeline", data, layout, words, (*phase_keys, *trial_legend(numbers, "■"), *marks))


def _charged(numbers: Numbers, group: str) -> bool:
    phases = next(phases for name, _, phases in PHASE_GROUPS if name == group)
    return any(span.phase in phases for span in numbers.timeline.phases)


def _worker_names(numbers: Numbers) -> list[str]:
    count = numbers.timeline.workers
    return ["trials"] if count == 1 else [f"worker {number + 1}" for number in range(count)]


def _phase_bars(numbers: Numbers, group: tuple[str, str, tuple[str, ...]], divisor: float) -> Json:
    name, colour, phases = group
    some = [p for p in numbers.timeline.phases if p.phase in phases]
    return bars_of(
        name,
        [0] * len(some),
        [(p.stop_seconds - p.start_seconds) / divisor for p in some],
        base=[p.start_seconds / divisor for p in some],
        width=BAR / 2,
        marker={"color": colour},
        text=[f"{p.phase}, {p.stop_seconds - p.start_seconds:.1f} s" for p in some],
        textposition="none",
        hovertemplate="%{text}<extra></extra>",
    )


def _segment_bars(numbers: Numbers, first: int, divisor: float) -> list[Json]:
    colours, spans = trial_colours(numbers), numbers.timeline.spans
    if not spans:
        return []
    return [
        bars_of(
            "segments",
            [first + span.worker + BAR * ((span.member + 0.5) / span.members - 0.5) for span in spans],
            [(span.stop_seconds - span.start_seconds) / divisor for span in spans],
            base=[span.start_seconds / divisor for span in spans],
            width=[BAR / span.members for span in spans],
            marker={
                "color": [colours.get(span.trial_id, OTHER) for span in spans],
                "line": {"color": "white", "width": 1},
            },
            text=[str(span.trial_id) for span in spans],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            customdata=[_span_words(span) for span in spans],
            hovertemplate="%{customdata}<extra></extra>",
        )
    ]


def _span_words(span: Span) -> str:
    loss = "" if span.loss_nats_per_token is None else f", loss {span.loss_nats_per_token:.4f}"
    return (
        f"trial {span.trial_id} to rung {span.rung}, {span.stop_seconds - span.start_seconds:.1f} s<br>"
        f"tokens {span.start_tokens} to {span.stop_tokens}<br>{html.escape(span.status)}{loss}<br>"
        f"{html.escape(span.reason)}"
    )


def _promotion_marks(numbers: Numbers, first: int, divisor: float) -> list[Json]:
    some = [span for span in numbers.timeline.spans if span.promotion]
    if not some:
        return []
    return [
        dots_of(
            "promotion",
            [span.start_seconds / divisor for span in some],
            [first + span.worker - BAR / 2 for span in some],
            {"symbol": "triangle-down", "size": 11, "color": INK},
            [f"trial {span.trial_id} to rung {span.rung}: {html.escape(span.reason)}" for span in some],
            "%{text}",
        )
    ]


def _draw_deadline(layout: Json, numbers: Numbers, divisor: float) -> None:
    budget, reserve = numbers.budget.budget_seconds, numbers.budget.reserve_seconds
    if budget is None:
        return
    line = {"type": "line", "x0": budget / divisor, "x1": budget / divisor, "y0": 0, "y1": 1, "yref": "paper"}
    layout["shapes"].append({**line, "line": {"color": INK, "width": 2}})
    layout["annotations"].append(note(budget / divisor, "deadline", "right"))
    if reserve:
        body = {"x0": (budget - reserve) / divisor, "x1": budget / divisor, "y0": 0, "y1": 1, "yref": "paper"}
        fill = {"fillcolor": "#F4F6F8", "line": {"width": 0}, "layer": "below"}
        layout["shapes"].append({"type": "rect", **body, **fill})
    layout["xaxis"]["range"] = [0, max(budget, numbers.budget.wall_seconds) / divisor * 1.01]


def progress(numbers: Numbers) -> Figure | None:
    """Every loss over the charged time, and the best so far."""
    points = numbers.timeline.losses
    if not points:
        return None
    colours = trial_colours(numbers)
    title, times, end = _spent(numbers)
    best = [point.best_nats_per_token for point in points]
    losses = [point.loss_nats_per_token for point in points]
    words = [
        f"trial {p.trial_id}, rung {p.rung}, {p.tokens} tokens<br>at {p.wall_seconds:.0f} s" for p in points
    ]
    marker = {"color": [colours.get(point.trial_id, OTHER) for point in points], "size": 8}
    style = {"color": INK, "width": 2, "shape": "hv"}
    data = [
        dots_of("a checkpoint's loss", times, losses, marker, words, "loss %{y:.4f}<br>%{text}"),
        line_of("best so far", [*times, end], [*best, best[-1]], style, hoverinfo="skip"),
    ]
    layout = layout_of(title, f"validation loss ({numbers.run.words.measure})", height=380, losses=losses)
    layout["xaxis"]["range"] = [0, end * 1.02]
    shows = f"The best loss fell from {best[0]:.4f} to {best[-1]:.4f}.{above(losses)}"
    legend = (Key("━", INK, "best so far"), *trial_legend(numbers, "●"))
    return Figure("progress", data, layout, shows, legend)


def _spent(numbers: Numbers) -> tuple[str, list[float], float]:
    """Axis of the losses: its title, the time of each, and the run's end."""
    points = numbers.timeline.losses
    if numbers.workers.most_workers > 1:
        whole = numbers.workers.worker_seconds
        unit, divisor = unit_of(whole)
        title, times = f"{_gpu(numbers) or 'worker '}time", [p.worker_seconds / divisor for p in points]
    else:
        whole = numbers.budget.charged_seconds
        unit, divisor = time_unit(numbers)
        title, times = f"charged {_gpu(numbers)}time", [p.charged_seconds / divisor for p in points]
    return f"{title} ({unit})", times, max(whole / divisor, times[-1])


def rate(numbers: Numbers) -> Figure | None:
    """Tokens per second of each segment, and where a full run moved its end because of them."""
    spans = [s for s in numbers.timeline.spans if s.train_seconds and s.stop_tokens > s.start_tokens]
    if not spans:
        return None
    unit, divisor = time_unit(numbers)
    colours = trial_colours(numbers)
    rates = [(span.stop_tokens - span.start_tokens) / span.train_seconds for span in spans]
    marker = {"color": [colours.get(span.trial_id, OTHER) for span in spans], "size": 8}
    words = [_span_words(span) for span in spans]
    times = [span.stop_seconds / divisor for span in spans]
    data = [
        dots_of(
            "a segment", times, rates, marker, words, f"%{{y:.0f}} {numbers.run.words.unit}/s<br>%{{text}}"
        )
    ]
    legend = [*trial_legend(numbers, "●")]
    moved = [(span, per_second, change)
             for span, per_second in zip(spans, rates, strict=True) for change in span.revisions]  # fmt: skip
    if moved:
        data.append(_moved_ends(moved, divisor))
        legend.append(Key("◇", INK, "a full run moves its end"))
    counted = numbers.run.words.unit
    layout = layout_of(f"time since the start ({unit})", f"training rate ({counted} per second)", height=260)
    layout["xaxis"]["rangemode"] = layout["yaxis"]["rangemode"] = "tozero"
    shows = f"From {min(rates):.0f} to {max(rates):.0f} {counted}/s; {len(moved)} times an end was moved."
    return Figure("rate", data, layout, shows, tuple(legend))


def _moved_ends(moved: Sequence[tuple[Span, float, Revision]], divisor: float) -> Json:
    return dots_of(
        "the end moves",
        [_moment(span, change.tokens) / divisor for span, _, change in moved],
        [per_second for _, per_second, _ in moved],
        {"symbol": "diamond-open", "size": 10, "color": INK},
        [
            f"at {change.tokens} trial {span.trial_id} trains {change.rate:.2f} times as fast as "
            f"foreseen; its full run now ends at {change.schedule.stop_tokens}"
            for span, _, change in moved
        ],
        "%{text}",
    )


def _moment(span: Span, tokens: int) -> float:
    """About when a segment had come so far."""
    share = (tokens - span.start_tokens) / max(1, span.stop_tokens - span.start_tokens)
    return span.start_seconds + min(1.0, share) * (span.stop_seconds - span.start_seconds)


def memory_over_time(numbers: Numbers) -> Figure | None:
    """Memory in use over the run, and below it the utilization where it was measured."""
    samples = numbers.timeline.memory
    if not samples:
        return None
    unit, divisor = time_unit(numbers)
    times = [sample.wall_seconds / divisor for sample in samples]
    peak = max(sample.used_bytes for sample in samples)
    size_unit, size = memory_unit(peak)
    legend = [Key("━", BLUE, "memory in use")]
    data = [
        line_of(
            "memory in use",
            times,
            [sample.used_bytes / size for sample in samples],
            {"color": BLUE, "width": 2},
            fill="tozeroy",
            fillcolor="rgba(31, 95, 168, 0.12)",
            hovertemplate=f"%{{y:.2f}} {size_unit}<extra></extra>",
        )
    ]
    layout = layout_of(f"time since the start ({unit})", f"memory ({size_unit})", height=320)
    layout["xaxis"]["rangemode"] = layout["yaxis"]["rangemode"] = "tozero"
    if numbers.limit_bytes and numbers.limit_bytes < LIMIT_REACH * peak:
        limit = numbers.limit_bytes / size
        legend.append(Key("╍", RED, "limit"))
        line = {"color": RED, "width": 2, "dash": "dash"}
        data.append(line_of("limit", [0.0, times[-1]], [limit, limit], line))
    busy = [(t, s.utilization) for t, s in zip(times, samples, strict=True) if s.utilization is not None]
    if busy:
        moments, shares = [t for t, _ in busy], [u for _, u in busy]
        data.append(line_of("utilization", moments, shares, {"color": BEST, "width": 2}, yaxis="y2"))
        legend.append(Key("━", BEST, "utilization"))
        layout["height"] = 460
        layout["yaxis"]["domain"] = [0.42, 1.0]
        layout["yaxis2"] = {
            "domain": [0.0, 0.32],
            "range": [0, 1.05],
            "tickformat": ".0%",
            "gridcolor": GRID,
            "automargin": True,
            "title": {"text": "card busy"},
        }
        layout["xaxis"]["anchor"] = "y2"
    words = f"The most that a heartbeat saw is {peak / size:.2f} {size_unit}; peaks between two are missed."
    return Figure("memory_over_time", data, layout, words, tuple(legend))


def _gpu(numbers: Numbers) -> str:
    return "" if numbers.run.device == "cpu" else "GPU "
