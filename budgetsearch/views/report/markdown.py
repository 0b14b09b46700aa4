"""``report.md``: the answer first, then how it was found and what it cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from budgetsearch.core.events import Entry
from budgetsearch.core.history.history import History
from budgetsearch.core.records import cost_class
from budgetsearch.core.secrets import shown_settings
from budgetsearch.storage.files import replace_text
from budgetsearch.views.card import adapter_path, load_snippet
from budgetsearch.views.intervals import CONFIDENCE, Estimate
from budgetsearch.views.report.answer import Budget, answer_of, budget_of
from budgetsearch.views.report.facts import state_words
from budgetsearch.views.report.numbers import failures_of, promotions_of, speed_of
from budgetsearch.views.report.peaks import CARD_PEAK, MEANING, PROCESS_PEAK, peaks_of
from budgetsearch.views.report.timeline import timeline_of
from budgetsearch.views.report.workers import shares_text, worker_seconds_of
from budgetsearch.views.tables import card_row, rank_correlations, trial_rows
from budgetsearch.views.words import gib, loss_text, params_text, rung_names, state_of

SAMPLE_CHARACTERS = 600
"""A sample answer is cut there."""


def write_report(entries: Iterable[Entry], history: History, path: Path, *, going: bool = True) -> Path:
    """Write the report of a run, finished or not, over an older one; returns ``path``."""
    return replace_text(path, report_text(list(entries), history, going=going))


def report_text(entries: Sequence[Entry], history: History, *, going: bool = True) -> str:
    """The whole report as Markdown; ``going``: a process works on a run that nobody has closed."""
    parts = ["# Report of a budgetsearch run", ""]
    told: dict[Writer, Writer] = {
        _answer: partial(_answer, going=going),
        _trials: partial(_trials, going=going),
    }
    for title, write in ((title, told.get(write, write)) for title, write in SECTIONS):
        lines = write(entries, history)
        if lines:
            parts += [f"## {title}", "", *lines, ""]
    return "\n".join(parts)


# -------------------------------------------------------------------------- sections


def _answer(entries: Sequence[Entry], history: History, going: bool = True) -> list[str]:
    lines = _score_table(history)
    best, opened = history.incumbent, history.opened
    if best is None:
        lines += ["No trial has finished a segment, so there is no adapter."]
    else:
        lines += [
            f"The best adapter is trial {best.trial_id} ({params_text(best.trial.params)}), after "
            f"{best.best_tokens} tokens, with a validation loss of {loss_text(best.best_loss)}."
        ]
    state = state_of(history, going)
    if opened is not None:
        kept = history.spent <= opened.budget_seconds
        over = (
            "the deadline was PASSED" if not kept else "the deadline was kept" if state == "finished" else ""
        )
        spent = f"{history.spent:.1f} of {opened.budget_seconds:.0f} s were spent"
        lines += ["", f"{spent}; {over}." if over else f"{spent}."]
    return [*lines, f"State: {state_words(state, history.closed.reason if history.closed else None)}."]


def _score_table(history: History) -> list[str]:
    answer = answer_of(history)
    loss, accuracy = answer.loss, answer.accuracy
    if loss is None:
        return []
    rows = [
        [
            "validation loss",
            f"{loss.base_nats_per_token.value:.4f}",
            f"{loss.adapter_nats_per_token.value:.4f}",
        ]
    ]
    notes = [_sureness("loss", loss.difference_nats_per_token, ".4f", loss.method)]
    if accuracy is not None:
        name = f"task accuracy (n = {accuracy.answers})"
        rows.append([name, f"{accuracy.base.value:.1%}", f"{accuracy.adapter.value:.1%}"])
        notes.append(_sureness("accuracy", accuracy.difference, ".1%", accuracy.method))
    under = (
        f"Base and adapter were scored on the same validation examples under {answer.quantization}; "
        "losses are in nats per completion token."
    )
    return [*_table(["", "base", "adapter"], rows), "", under, *notes, answer.caveat, ""]


def _sureness(what: str, difference: Estimate, form: str, method: str) -> str:
    if difference.low is None or difference.high is None:
        return f"Of the difference in {what} there is {method}."
    ends = f"{difference.low:{form}} to {difference.high:{form}}"
    return (
        f"The difference in {what} is {difference.value:{form}}, {CONFIDENCE:.0%} interval {ends}: {method}."
    )


def _loading(entries: Sequence[Entry], history: History) -> list[str]:
    lines = load_lines(history)
    return ["```python", *lines, "```"] if lines else []


def load_lines(history: History) -> list[str]:
    """Lines of Python that load the adapter; none before there is one."""
    best, path = history.incumbent, adapter_path(history)
    if best is None or path is None or history.opened is None:
        return []
    model = history.opened.facts.get("model", {})
    return load_snippet(model, cost_class(best.trial.params), path, history)


def _trials(entries: Sequence[Entry], history: History, going: bool = True) -> list[str]:
    heads = ["trial", "configuration", "origin", *rung_names(history), "tokens", "seconds"]
    heads += [PROCESS_PEAK, "status"]
    rows = [
        [
            str(row.trial_id),
            params_text(row.params),
            row.origin,
            *[loss_text(loss) for loss in row.losses],
            str(row.tokens),
            f"{row.seconds:.1f}",
            gib(row.peak_bytes),
            row.status,
        ]
        for row in trial_rows(history, going)
    ]
    return _table(heads, rows) if rows else []


def _promotions(entries: Sequence[Entry], history: History) -> list[str]:
    rows = [
        [f"{one.wall_seconds:.1f}", str(one.trial_id), str(one.to_rung), one.reason]
        for one in promotions_of(timeline_of(entries), history)
    ]
    return _table(["second", "trial", "to rung", "why"], rows) if rows else []


def _budget(entries: Sequence[Entry], history: History) -> list[str]:
    budget = budget_of(history)
    rows = [[row.phase, f"{row.charged_seconds:.1f}", f"{row.share:.1%}"] for row in budget.phases]
    total = sum(row.charged_seconds for row in budget.phases)
    table = _table(["phase", "seconds", "share"], [*rows, ["together", f"{total:.1f}", "100.0%"]])
    return [*table, "", *_useful(budget), *_worker_seconds(entries)]


def _worker_seconds(entries: Sequence[Entry]) -> list[str]:
    """With several workers: what the seconds of all of them together were."""
    found = worker_seconds_of(entries)
    if found.most_workers == 1:
        return []
    return [
        f"Worker seconds (GPU seconds, with a GPU each) of up to {found.most_workers} workers: "
        f"{found.worker_seconds:.0f}, of which {shares_text(found)}."
    ]


def _useful(budget: Budget) -> list[str]:
    """What of the time was training, and what of the training was padding."""
    lines = []
    if budget.training_share_of_budget is not None and budget.wall_seconds:
        train = sum(row.charged_seconds for row in budget.phases if row.phase == "train")
        lines.append(
            f"Training took {budget.training_share_of_budget:.1%} of the budget; overhead (everything else "
            f"that was spent) was {1 - train / budget.wall_seconds:.1%} of the "
            f"{budget.wall_seconds:.0f} s spent."
        )
    if budget.padding_share is not None:
        lines.append(
            f"Padding was {budget.padding_share:.1%} of the positions that were computed in training."
        )
    return lines


def _speed(entries: Sequence[Entry], history: History) -> list[str]:
    rows = [
        [
            one.quantization,
            str(one.trials_at_once),
            str(one.micro_batch),
            "yes" if one.checkpointing else "no",
            f"{one.tokens_per_second:.0f}",
            f"{one.tflops:.3f}",
            "-" if one.mfu is None else f"{one.mfu:.1%}",
            gib(one.peak_bytes),
            "yes" if one.chosen else "",
        ]
        for one in speed_of(history)
    ]
    heads = ["quantization", "trials at once", "micro-batch", "checkpointing"]
    heads += ["tokens/s", "TFLOP/s", "MFU", PROCESS_PEAK, "chosen"]
    why = (
        "Measured in the calibration, on real steps that begin with the longest rows. More trials at once "
        "are chosen as long as each doubling pays. TFLOP/s leave attention out; MFU is their share of the "
        "card's dense 16-bit peak, where that is known."
    )
    return [*_table(heads, rows), "", why] if rows else []


def _card(entries: Sequence[Entry], history: History) -> list[str]:
    row, peaks = card_row(history), peaks_of(history)
    lines = []
    if row is not None:
        found = {
            PROCESS_PEAK: gib(peaks.process_bytes) if peaks.process_bytes else None,
            CARD_PEAK: gib(peaks.card_bytes) if peaks.card_bytes else None,
            "of it by other processes": gib(row.others_bytes) if row.others_bytes else None,
            "mean utilization": None if row.utilization is None else f"{row.utilization:.0%}",
            "energy": None if row.kilowatt_hours is None else f"{row.kilowatt_hours:.3f} kWh",
            "hottest": None if row.celsius is None else f"{row.celsius:.0f} °C",
            **{f"slowed down by {why}": f"{share:.1%} of the time" for why, share in row.throttled.items()},
        }
        lines = _table(["what", "found"], [(name, text) for name, text in found.items() if text])
        lines += [
            "",
            MEANING,
            "The rest is the watcher's, five times a second; without NVML only memory is known.",
        ]
    stand_in = history.opened.facts.get("card", {}).get("stand_in") if history.opened else False
    if stand_in and history.opened:
        card = history.opened.facts["card"]
        lines += ["", f"Memory is capped to an {card['profile']}'s; the speed is that of the {card['name']}."]
    notices = [f"- {at:.0f} s: {text}" for at, text in history.notices]
    return lines + (["", "Noticed on the way:", "", *notices] if notices else [])


def _ladder(entries: Sequence[Entry], history: History) -> list[str]:
    plan = history.plan
    if plan is None:
        return []
    names = sorted(plan.reference_rates)
    rows = []
    for name, seconds in zip(rung_names(history), plan.ladder, strict=True):
        rows.append([name, *[f"{seconds * plan.reference_rates[kind]:.0f}" for kind in names]])
    done = ", ".join(
        f"{lower} to {lower + 1}: {'too few trials' if rho is None else f'{rho:.2f}'} (n = {count})"
        for lower, count, rho in rank_correlations(history)
    )
    return [
        *_table(["rung (training)", *[f"tokens under {kind}" for kind in names]], rows),
        "",
        f"One trial in {plan.eta} is promoted. Reserve for scores, export and exit: "
        f"{plan.reserve_seconds:.1f} s. Every trial is evaluated on the same {plan.eval_examples} examples.",
        "",
        f"Rank correlation (Spearman) between neighbouring rungs: {done or 'there is only one rung'}.",
    ]


def _samples(entries: Sequence[Entry], history: History) -> list[str]:
    lines: list[str] = []
    for number, sample in enumerate(history.score.samples if history.score else (), start=1):
        lines += [f"### {number}", ""]
        for key in ("prompt", "reference", "base", "adapter"):
            text = str(sample.get(key, ""))
            short = text[:SAMPLE_CHARACTERS] + (" ..." if len(text) > SAMPLE_CHARACTERS else "")
            lines += [f"**{key}**", "", *[f"    {line}" for line in short.splitlines() or [""]], ""]
    return lines


def _failures(entries: Sequence[Entry], history: History) -> list[str]:
    rows = [[one.what, one.where, one.status, one.why] for one in failures_of(history)]
    return _table(["what", "where", "status", "why"], rows) if rows else ["Nothing failed."]


def _settings(entries: Sequence[Entry], history: History) -> list[str]:
    if history.opened is None:
        return []
    facts = history.opened.facts
    return [
        "Settings:",
        "",
        *_json(shown_settings(history.opened.settings)),
        "",
        "Found at the start (model, data, card, versions):",
        "",
        *_json(facts),
        "",
        "Search space:",
        "",
        *_json(history.plan.space if history.plan else {}),
    ]


Writer = Callable[[Sequence[Entry], History], list[str]]
SECTIONS: tuple[tuple[str, Writer], ...] = (
    ("The answer", _answer),
    ("How to load the adapter", _loading),
    ("Trials", _trials),
    ("Promotions", _promotions),
    ("Where the budget went", _budget),
    ("Speed and memory", _speed),
    ("The card", _card),
    ("Rungs and reserve", _ladder),
    ("Sample answers", _samples),
    ("What failed", _failures),
    ("Settings and versions", _settings),
)


# -------------------------------------------------------------------------- Markdown


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [_row(heads), _row(["---"] * len(heads))]
    return lines + [_row(row) for row in rows]


def _row(cells: Sequence[str]) -> str:
    # A stray bar or line break would end the cell.
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _json(value: Mapping[str, Any]) -> list[str]:
    return ["```json", json.dumps(dict(value), indent=2, default=str), "```"]
