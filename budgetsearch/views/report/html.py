"""``report.html``: one file that needs no network, with the answer first.

Every string of the run goes through jinja2's autoescaping, or through JSON whose ``<`` is escaped; a content
security policy lets nothing run but the two scripts below, and nothing be fetched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from budgetsearch.core.space.space import Space
from budgetsearch.views.intervals import CONFIDENCE, Estimate
from budgetsearch.views.report import across_trials, over_time
from budgetsearch.views.report.drawing import Figure, memory_unit
from budgetsearch.views.report.facts import state_words
from budgetsearch.views.report.numbers import ALPHA, Numbers
from budgetsearch.views.report.offline import DRAW, plotly_library, policy, script_json
from budgetsearch.views.report.peaks import CARD_PEAK, MEANING, PROCESS_PEAK
from budgetsearch.views.words import cut, loss_text, params_text, value_text

FIRST_TRIALS = 20
"""So many rows of a table are seen at once; the others are folded away."""
TEMPLATE = "report.html.j2"


def html_text(numbers: Numbers) -> str:
    """The whole page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("budgetsearch.views.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    figures = figures_of(numbers)
    library = plotly_library()
    return environment.get_template(TEMPLATE).render(
        n=numbers,
        alpha=ALPHA,
        process_peak=PROCESS_PEAK,
        card_peak=CARD_PEAK,
        peaks_mean=MEANING,
        state=state_words(numbers.run.state, numbers.run.reason),
        figures=figures,
        figure_json=script_json({name: _drawable(figure) for name, figure in figures.items()}),
        plotly=library,
        draw=DRAW,
        policy=policy([library, DRAW]),
        confidence=f"{CONFIDENCE:.0%}",
        knobs=_knobs(numbers),
        first_trials=FIRST_TRIALS,
        facts=json.dumps(_facts(numbers), indent=2, default=str),
    )


def _drawable(figure: Figure) -> dict[str, Any]:
    return {"data": figure.data, "layout": figure.layout}


def _knobs(numbers: Numbers) -> tuple[str, ...]:
    """Name what the search could choose: the columns of the trials' table."""
    return Space.parse(numbers.run.space).searched if numbers.run.space else ()


def _facts(numbers: Numbers) -> dict[str, Any]:
    run = numbers.run
    names = ("settings", "model", "data", "card", "versions", "space")
    return {name: dict(getattr(run, name)) for name in names}


# ---------------------------------------------------------------------------- words


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return "no interval"
    return f"{estimate.low:.4f} to {estimate.high:.4f}".replace("-", "\N{MINUS SIGN}")


def _share_interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return "no interval"
    return f"{estimate.low:.1%} to {estimate.high:.1%}".replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 300:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.2f} h"


def _memory(count: int | None) -> str:
    if count is None:
        return "not measured"
    unit, size = memory_unit(count)
    return f"{count / size:.1f} {unit}" if unit == "MiB" else f"{count / size:.2f} {unit}"


def _name(source: object) -> str:
    """A model's name: of a folder or a file its last part."""
    text = str(source or "a base model")
    return text.rstrip("/").rsplit("/", 1)[-1] if text.startswith(("/", ".", "~")) else text


def _short(rung_name: str) -> str:
    """A rung's name without its seconds."""
    return rung_name.partition(" (")[0]


def _value(value: object) -> str:
    return "-" if value is None else value_text(value)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _params(params: Mapping[str, Any]) -> str:
    return params_text(params)


def _capitalized(text: str) -> str:
    """Only the first letter: the others may be names."""
    return text[:1].upper() + text[1:]


FILTERS = {
    "capitalize_first": _capitalized,
    "signed": _signed,
    "interval": _interval,
    "share_interval": _share_interval,
    "duration": _duration,
    "cut": cut,
    "memory": _memory,
    "percent": _percent,
    "params": _params,
    "loss": loss_text,
    "value": _value,
    "name": _name,
    "short": _short,
}

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
