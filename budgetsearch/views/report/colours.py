"""How the figures of report.html show trials and the time of the run, alike in all of them."""

from __future__ import annotations

import html

from budgetsearch.views.drawing import BEST, OTHER, Key, unit_of
from budgetsearch.views.report.numbers import Numbers, TrialNumbers
from budgetsearch.views.words import params_text

SOFT = "#B9A8E0"
FINALISTS = ("#6A3FB5", "#C2569B", "#2E9FB5", "#A0622D", "#6B8E23")
"""What became the adapter is BEST; others that ran in full take turns with these; what was promoted less far
is SOFT, and what stayed behind OTHER."""


def trial_colours(numbers: Numbers) -> dict[int, str]:
    """The colour of each promoted trial, the same in every figure; of the best one in any case."""
    colours = {promotion.trial_id: SOFT for promotion in numbers.promotions}
    colours |= {number: FINALISTS[k % len(FINALISTS)] for k, number in enumerate(_finalists(numbers))}
    best = numbers.answer.best
    return {**colours, **({best.trial_id: BEST} if best else {})}


def _finalists(numbers: Numbers) -> list[int]:
    top, best = len(numbers.rungs) - 1, numbers.answer.best
    found = dict.fromkeys(p.trial_id for p in numbers.promotions if p.to_rung == top)
    return [number for number in found if best is None or number != best.trial_id]


def trial_legend(numbers: Numbers, mark: str) -> list[Key]:
    """Explain the trials' colours, as far as they occur."""
    best, colours = numbers.answer.best, trial_colours(numbers)
    keys = [Key(mark, BEST, f"trial {best.trial_id}, the adapter")] if best else []
    finalists = _finalists(numbers)[: len(FINALISTS)]
    keys += [Key(mark, colours[number], f"trial {number}, in full too") for number in finalists]
    keys += [Key(mark, SOFT, "promoted")] if SOFT in colours.values() else []
    behind = any(t.trial_id not in colours for t in numbers.trials)
    return keys + ([Key(mark, OTHER, "not promoted")] if behind else [])


def trial_words(trial: TrialNumbers) -> str:
    """A trial and its configuration, for where one points at it."""
    return f"trial {trial.trial_id}: {html.escape(params_text(trial.params))}"


def time_unit(numbers: Numbers) -> tuple[str, float]:
    """In what a run of this length is best told: (s, min or h; seconds of one)."""
    return unit_of(max(numbers.budget.budget_seconds or 0.0, numbers.budget.wall_seconds))
