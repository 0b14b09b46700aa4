"""``report.md``: the answer first, then how it was found and what it cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from budgetsearch.machine.host import gib
from budgetsearch.views.intervals import CONFIDENCE, Estimate
from budgetsearch.views.metric import MetricAnswer
from budgetsearch.views.report.answer import Budget
from budgetsearch.views.report.facts import state_words
from budgetsearch.views.report.numbers import Numbers
from budgetsearch.views.report.peaks import CARD_PEAK, MEANING, PROCESS_PEAK
from budgetsearch.views.report.workers import shares_text
from budgetsearch.views.words import cut, loss_text, markdown_table, params_text, printable


def text_of(numbers: Numbers) -> str:
    """The whole report as Markdown."""
    parts = ["# Report of a budgetsearch run", ""]
    for title, write in SECTIONS:
        lines = write(numbers)
        if lines:
            parts += [f"## {title}", "", *lines, ""]
    return printable("\n".join(parts))


# -------------------------------------------------------------------------- sections


def _shortfalls(numbers: Numbers) -> list[str]:
    return [f"- **{one.what}**: {one.why}." for one in numbers.shortfalls]


def _answer(numbers: Numbers) -> list[str]:
    lines = _score_table(numbers)
    best, budget, run = numbers.answer.best, numbers.budget, numbers.run
    if best is None:
        lines += ["No trial has finished a segment, so there is no adapter."]
    else:
        what = "" if run.recipe else " adapter"
        lines += [
            f"The best{what} is trial {best.trial_id} ({params_text(best.params)}), after {best.tokens} "
            f"{run.words.unit}, with a validation {run.words.loss} of {loss_text(best.loss_nats_per_token)}."
        ]
    if budget.budget_seconds is not None:
        told = {True: "; the deadline was kept", False: "; the deadline was PASSED", None: ""}
        over = told[budget.deadline_kept]
        lines += ["", f"{budget.wall_seconds:.1f} of {budget.budget_seconds:.0f} s were spent{over}."]
    return [*lines, f"State: {state_words(run.state, run.reason)}."]


def _score_table(numbers: Numbers) -> list[str]:
    answer = numbers.answer
    loss, accuracy, words = answer.loss, answer.accuracy, numbers.run.words
    if loss is None:
        return []
    rows = [
        [
            f"validation {words.loss}",
            f"{loss.base_nats_per_token.value:.4f}",
            f"{loss.adapter_nats_per_token.value:.4f}",
        ]
    ]
    notes = [_sureness("loss", loss.difference_nats_per_token, ".4f", loss.method)]
    if accuracy is not None:
        name = f"task accuracy ({accuracy.what})"
        rows.append([name, f"{accuracy.base.value:.1%}", f"{accuracy.adapter.value:.1%}"])
        notes.append(_sureness("accuracy", accuracy.difference, ".1%", accuracy.method))
    if (metric := answer.metric) is not None:
        rows.append([_metric_name(metric), f"{metric.base.value:.4f}", f"{metric.adapter.value:.4f}"])
        notes.append(_sureness(metric.name, metric.difference, ".4f", metric.method))
    under = (
        "The same configuration was evaluated untrained and trained."
        if numbers.run.recipe
        else f"Base and adapter were scored on the same validation examples under {answer.quantization}; "
        f"losses are in {words.exact}."
    )
    return [markdown_table(["", words.before, words.after], rows), "", under, *notes, answer.caveat, ""]


def _metric_name(metric: MetricAnswer) -> str:
    better = "higher" if metric.direction == "max" else "lower"
    failed = f", {metric.failed} more without a number" if metric.failed else ""
    chosen = ", what was chosen by" if metric.decides else ""
    return f"{metric.name} (n = {metric.answers}{failed}; {better} is better{chosen})"


def _sureness(what: str, difference: Estimate, form: str, method: str) -> str:
    if difference.low is None or difference.high is None:
        return f"Of the difference in {what} there is {method}."
    ends = f"{difference.low:{form}} to {difference.high:{form}}"
    return (
        f"The difference in {what} is {difference.value:{form}}, {CONFIDENCE:.0%} interval {ends}: {method}."
    )


def _loading(numbers: Numbers) -> list[str]:
    return ["```python", *numbers.answer.loading, "```"] if numbers.answer.loading else []


def _trials(numbers: Numbers) -> list[str]:
    heads = ["trial", "configuration", "origin", *(rung.name for rung in numbers.rungs)]
    graded = any(row.metric is not None for row in numbers.trials)
    heads += [numbers.run.words.unit, "seconds", *(["metric"] if graded else []), PROCESS_PEAK, "status"]
    rows = [
        [
            str(row.trial_id),
            params_text(row.params),
            row.origin,
            *[loss_text(loss) for loss in row.rung_losses_nats_per_token],
            str(row.tokens),
            f"{row.charged_seconds:.1f}",
            *([loss_text(row.metric)] if graded else []),
            "-" if row.peak_bytes is None else gib(row.peak_bytes),
            row.status,
        ]
        for row in numbers.trials
    ]
    return [markdown_table(heads, rows)] if rows else []


def _promotions(numbers: Numbers) -> list[str]:
    rows = [
        [f"{one.wall_seconds:.1f}", str(one.trial_id), str(one.to_rung), one.reason]
        for one in numbers.promotions
    ]
    return [markdown_table(["second", "trial", "to rung", "why"], rows)] if rows else []


def _budget(numbers: Numbers) -> list[str]:
    budget = numbers.budget
    rows = [[row.phase, f"{row.charged_seconds:.1f}", f"{row.share:.1%}"] for row in budget.phases]
    total = sum(row.charged_seconds for row in budget.phases)
    table = markdown_table(["phase", "seconds", "share"], [*rows, ["together", f"{total:.1f}", "100.0%"]])
    return [table, "", *_useful(budget), *_worker_seconds(numbers)]


def _worker_seconds(numbers: Numbers) -> list[str]:
    """With several workers: what the seconds of all of them together were."""
    found = numbers.workers
    if found.most_workers == 1:
        return []
    return [
        f"Worker seconds (GPU seconds, with a GPU each) of up to {found.most_workers} workers: "
        f"{found.worker_seconds:.0f}, of which {shares_text(found)}."
    ]


def _useful(budget: Budget) -> list[str]:
    """Tell how much of the time was training, and how much of the training was padding."""
    lines = []
    if budget.wall_seconds:
        train = sum(row.charged_seconds for row in budget.phases if row.phase == "train")
        lines.append(
            f"Of the {budget.wall_seconds:.0f} s spent {train / budget.wall_seconds:.1%} were training and "
            f"{1 - train / budget.wall_seconds:.1%} overhead, which is everything else."
        )
    if budget.padding_share is not None:
        lines.append(
            f"Padding was {budget.padding_share:.1%} of the positions that were computed in training."
        )
    return lines


def _speed(numbers: Numbers) -> list[str]:
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
        for one in numbers.speed
    ]
    heads = ["quantization", "trials at once", "micro-batch", "checkpointing"]
    heads += [f"{numbers.run.words.unit}/s", "TFLOP/s", "MFU", PROCESS_PEAK, "chosen"]
    why = (
        "Measured in the calibration, on real steps that begin with the longest rows. More trials at once "
        "are chosen as long as each doubling pays. TFLOP/s leave attention out; MFU is their share of the "
        "card's dense 16-bit peak, where that is known."
    )
    return [markdown_table(heads, rows), "", why] if rows else []


def _card(numbers: Numbers) -> list[str]:
    row, peaks, card = numbers.card, numbers.peaks, numbers.run.card
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
        lines = [markdown_table(["what", "found"], [(name, text) for name, text in found.items() if text])]
        lines += [
            "",
            MEANING,
            "The rest is the watcher's, five times a second; without NVML only memory is known.",
        ]
    if card.get("stand_in"):
        lines += ["", f"Memory is capped to an {card['profile']}'s; the speed is that of the {card['name']}."]
    notices = [f"- {one.wall_seconds:.0f} s: {one.text}" for one in numbers.notices]
    return lines + (["", "Noticed on the way:", "", *notices] if notices else [])


def _ladder(numbers: Numbers) -> list[str]:
    if not numbers.rungs:
        return []
    names, unit = sorted(numbers.rungs[0].tokens), numbers.run.words.unit

    def heading(kind: str) -> str:
        return unit if numbers.run.recipe else f"{unit} under {kind}"

    rows = [[rung.name, *[str(rung.tokens[kind]) for kind in names]] for rung in numbers.rungs]
    done = ", ".join(
        f"{one.lower_rung} to {one.upper_rung}: "
        f"{'too few trials' if one.spearman is None else f'{one.spearman:.2f}'} (n = {one.trials})"
        for one in numbers.rank_correlations
    )
    return [
        markdown_table(["rung (training)", *[heading(kind) for kind in names]], rows),
        "",
        f"One trial in {numbers.eta} is promoted. Reserve for scores, export and exit: "
        f"{numbers.budget.reserve_seconds:.1f} s. Every trial is evaluated on the same "
        f"{numbers.eval_examples} examples.",
        "",
        f"Rank correlation (Spearman) between neighbouring rungs: {done or 'there is only one rung'}.",
    ]


def _samples(numbers: Numbers) -> list[str]:
    lines: list[str] = []
    for number, sample in enumerate(numbers.samples, start=1):
        lines += [f"### {number}", ""]
        for key in ("prompt", "reference", "base", "adapter"):
            text = cut(sample.get(key, ""))
            lines += [f"**{key}**", "", *[f"    {line}" for line in text.splitlines() or [""]], ""]
    return lines


def _failures(numbers: Numbers) -> list[str]:
    rows = [[one.what, one.where, one.status, one.why] for one in numbers.failures]
    return [markdown_table(["what", "where", "status", "why"], rows)] if rows else ["Nothing failed."]


def _settings(numbers: Numbers) -> list[str]:
    run = numbers.run
    if run.began is None:
        return []
    trained = {"recipe": run.recipe} if run.recipe else {"model": run.model, "data": run.data}
    found = {**trained, "card": run.card, "versions": run.versions}
    return [
        "Settings:",
        "",
        *_json(run.settings),
        "",
        f"Found at the start ({', '.join(found)}):",
        "",
        *_json(found),
        "",
        "Search space:",
        "",
        *_json(run.space),
    ]


SECTIONS: tuple[tuple[str, Callable[[Numbers], list[str]]], ...] = (
    ("What is missing", _shortfalls),
    ("The answer", _answer),
    ("How to load it", _loading),
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


def _json(value: Mapping[str, Any]) -> list[str]:
    return ["```json", json.dumps(dict(value), indent=2, default=str), "```"]
