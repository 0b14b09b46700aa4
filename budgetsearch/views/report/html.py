"""``report.html``: one file that needs no network, with the answer first.

Every string of the run goes through jinja2's autoescaping, or through JSON whose ``<`` is escaped; a content
security policy lets nothing run but the two scripts below, and nothing be fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from budgetsearch.core.space.space import Space
from budgetsearch.views.drawing import Figure, memory_unit
from budgetsearch.views.intervals import Estimate
from budgetsearch.views.report import across_trials, over_time
from budgetsearch.views.report.facts import state_words
from budgetsearch.views.report.numbers import ALPHA, Numbers
from budgetsearch.views.report.offline import page_of
from budgetsearch.views.report.peaks import CARD_PEAK, MEANING, PROCESS_PEAK
from budgetsearch.views.words import cut, loss_text, params_text, value_text

FIRST_TRIALS = 20
"""So many rows of a table are seen at once; the others are folded away."""
TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"


def html_text(numbers: Numbers) -> str:
    """The whole page."""
    run = numbers.run
    names = ("settings", "model", "data", "card", "versions", "space")
    facts = {name: dict(getattr(run, name)) for name in names}
    return page_of(
        TEMPLATE,
        figures_of(numbers),
        FILTERS,
        n=numbers,
        alpha=ALPHA,
        process_peak=PROCESS_PEAK,
        card_peak=CARD_PEAK,
        peaks_mean=MEANING,
        state=state_words(run.state, run.reason),
        knobs=Space.parse(run.space).searched if run.space else (),
        first_trials=FIRST_TRIALS,
        facts=json.dumps(facts, indent=2, default=str),
    )


# ---------------------------------------------------------------------------- words


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def _interval(estimate: Estimate, form: str = ".4f") -> str:
    if estimate.low is None or estimate.high is None:
        return "no interval"
    return f"{estimate.low:{form}} to {estimate.high:{form}}".replace("-", "\N{MINUS SIGN}")


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


def _capitalized(text: str) -> str:
    """Only the first letter: the others may be names."""
    return text[:1].upper() + text[1:]


FILTERS: Mapping[str, Callable[..., Any]] = {
    "capitalize_first": _capitalized,
    "signed": _signed,
    "interval": _interval,
    "duration": _duration,
    "cut": cut,
    "memory": _memory,
    "percent": "{:.1%}".format,
    "params": params_text,
    "loss": loss_text,
    "value": _value,
    "name": _name,
    "short": _short,
}

FIGURES = (
    over_time.timeline,
    across_trials.ladder,
    over_time.progress,
    over_time.rate,
    across_trials.memory_front,
    across_trials.importance,
    across_trials.rank_agreement,
    over_time.memory_over_time,
)


def figures_of(numbers: Numbers) -> dict[str, Figure]:
    """Every figure that has something to show, by name."""
    found = (make(numbers) for make in FIGURES)
    return {figure.name: figure for figure in found if figure is not None}
