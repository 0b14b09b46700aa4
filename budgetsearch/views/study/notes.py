"""Notes in Markdown: how the run stands, on the study; what became of a trial, on each finalist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.secrets import without_secrets
from budgetsearch.machine.host import gib
from budgetsearch.views.metric import metric_line
from budgetsearch.views.shortfalls import shortfalls
from budgetsearch.views.study.shown_trial import values
from budgetsearch.views.words import (
    accuracy_of,
    loss_text,
    markdown_table,
    params_text,
    phase_of,
    rung_names,
    words_of,
)

SIGNATURE = "*budgetsearch wrote this note and writes it again when something changes.*"
NOTICES = 5
"""So many of the latest notices stand in the note."""


def ours(text: str) -> bool:
    """Tell whether a note was written here, and nobody has taken it over."""
    return text.rstrip().endswith(SIGNATURE)


def finalists(history: History) -> list[TrialState]:
    """The trials that ran in full, or run so now, and the one with the best adapter."""
    top = history.plan.top_rung if history.plan else 0
    best = history.incumbent
    return [state for state in history.trials.values() if state.goal == top or state is best]


def study_note(history: History) -> str:
    """Describe the run: the answer, the rungs with their units, the trials, what to know."""
    parts = [
        _title(history),
        *_missing(history),
        *_answer(history),
        *_rungs(history),
        *_trials(history),
        *_notices(history),
    ]
    return _note(parts)


def trial_note(state: TrialState, history: History) -> str:
    """Describe a finalist, and how it stands beside the others at each rung."""
    exported = history.exported is not None and history.exported.trial_id == state.trial_id
    role = [history.standing(state), *(["its adapter is exported"] if exported else [])]
    rows = [_place(rung, loss, state, history) for rung, loss in values(state, history).items()]
    parts = [
        f"# Trial {state.trial_id}: {', '.join(role)}",
        f"`{params_text(state.trial.params)}`, sampled by the rule *{state.trial.origin}*.",
        markdown_table(["rung", "validation loss", "place", "best of the others"], rows) if rows else "",
        f"{state.tokens} tokens in {state.seconds:.1f} GPU seconds; "
        f"peak of the process {gib(state.peak_bytes)}.",
    ]
    if state.best_loss is not None:
        parts.append(f"Lowest loss: **{loss_text(state.best_loss)}**, after {state.best_tokens} tokens.")
    return _note(parts)


def _place(rung: int, loss: float, state: TrialState, history: History) -> list[str]:
    there = [other for other in history.at_rung(rung) if other is not state]
    better = sum(1 for other in there if other.losses[rung] < loss)
    others = [loss_text(there[0].losses[rung]) if there else "-"]
    return [rung_names(history)[rung], f"{loss:.4f}", f"{better + 1} of {len(there) + 1}", *others]


# -------------------------------------------------------------------- parts of the study's


def _title(history: History) -> str:
    total = history.opened.budget_seconds if history.opened else 0.0
    reason = f" ({history.closed.reason})" if history.closed else ""
    return f"# {phase_of(history).capitalize()}{reason}: {history.spent:.0f} of {total:.0f} s spent"


def _missing(history: History) -> list[str]:
    lines = [f"- {without_secrets(str(one))}" for one in shortfalls(history, going=True)]
    return ["## What is missing", "\n".join(lines)] if lines else []


def _answer(history: History) -> list[str]:
    best, score = history.incumbent, history.score
    if best is None:
        return ["No trial has finished a segment yet, so there is no adapter."]
    parts = [
        f"The best is **trial {best.trial_id}**, validation loss **{loss_text(best.best_loss)}** "
        f"{words_of(history).exact} after {best.best_tokens} tokens: `{params_text(best.trial.params)}`."
    ]
    if score is not None and score.base_loss is not None and score.adapter_loss is not None:
        rows = [["validation loss", loss_text(score.base_loss), loss_text(score.adapter_loss)]]
        if score.base_accuracy is not None and score.adapter_accuracy is not None:
            name = f"task accuracy ({accuracy_of(score)})"
            rows.append([name, f"{score.base_accuracy:.1%}", f"{score.adapter_accuracy:.1%}"])
        if (line := metric_line(history)) is not None:
            rows.append([f"{line[0]} (n = {line[3]})", f"{line[1]:.4f}", f"{line[2]:.4f}"])
        parts.append(markdown_table([f"under {score.quantization}", "base", "adapter"], rows))
    return parts


def _rungs(history: History) -> list[str]:
    plan = history.plan
    if plan is None:
        return ["The rungs are planned once the card has been measured."]
    kinds = list(plan.reference_rates)
    rows = []
    for rung, (name, seconds) in enumerate(zip(rung_names(history), plan.ladder, strict=True)):
        there = history.at_rung(rung)
        tokens = [str(round(seconds * plan.reference_rates[kind])) for kind in kinds]
        rows.append([name, *tokens, str(len(there)), loss_text(there[0].losses[rung]) if there else "-"])
    unit = "The seconds of a rung are training alone; intermediate values are numbered by rung."
    heads = ["rung", *(f"{kind} tokens" for kind in kinds), "trials there", "lowest loss"]
    return ["## Rungs", markdown_table(heads, rows), unit]


def _trials(history: History) -> list[str]:
    counts = Counter(history.standing(state) for state in history.trials.values())
    rows = [[status, str(count)] for status, count in counts.most_common()]
    return ["## Trials", markdown_table(["status", "trials"], rows)] if rows else []


def _notices(history: History) -> list[str]:
    lines = [f"- at second {at:.0f}: {without_secrets(text)}" for at, text in history.notices[-NOTICES:]]
    return ["## To know", "\n".join(lines)] if lines else []


def _note(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in [*parts, SIGNATURE] if part)
