"""``report.md``: the answer first, then how it was found and what it cost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from budgetsearch.core.events import Decided, Entry
from budgetsearch.core.history import History
from budgetsearch.core.records import Run, TrainJob
from budgetsearch.core.secrets import shown_settings
from budgetsearch.report.card import load_snippet
from budgetsearch.report.tables import (
    card_row,
    gib,
    loss_text,
    padding_share,
    params_text,
    phase_of,
    phase_rows,
    rank_correlations,
    rung_names,
    trial_rows,
)

SAMPLE_CHARACTERS = 600
"""A sample answer is cut there."""


def write_report(entries: Iterable[Entry], history: History, path: Path) -> Path:
    """Write the report of a run, finished or not, over an older one; returns ``path``."""
    text = report_text(list(entries), history)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def report_text(entries: Sequence[Entry], history: History) -> str:
    """The whole report as Markdown."""
    parts = ["# Report of a budgetsearch run", ""]
    for title, write in SECTIONS:
        lines = write(entries, history)
        if lines:
            parts += [f"## {title}", "", *lines, ""]
    return "\n".join(parts)


# -------------------------------------------------------------------------- sections


def _answer(entries: Sequence[Entry], history: History) -> list[str]:
    lines = _score_table(history)
    best, opened = history.incumbent, history.opened
    if best is None:
        lines += ["No trial has finished a segment, so there is no adapter."]
    else:
        lines += [
            f"The best adapter is trial {best.trial_id} ({params_text(best.trial.params)}), after "
            f"{best.best_tokens} tokens, with a validation loss of {loss_text(best.best_loss)}."
        ]
    if opened is not None:
        kept = "kept" if history.spent <= opened.budget_seconds else "PASSED"
        spent = f"{history.spent:.1f} of {opened.budget_seconds:.0f} s"
        lines += ["", f"{spent} were spent; the deadline was {kept}."]
    closed = f": {history.closed.reason}" if history.closed else ""
    return [*lines, f"The run is in the state `{phase_of(history)}`{closed}."]


def _score_table(history: History) -> list[str]:
    score = history.score
    if score is None or score.base_loss is None or score.adapter_loss is None:
        return []
    rows = [["validation loss", f"{score.base_loss:.4f}", f"{score.adapter_loss:.4f}"]]
    if score.base_accuracy is not None and score.adapter_accuracy is not None:
        name = f"task accuracy (n = {score.task_examples})"
        rows.append([name, f"{score.base_accuracy:.1%}", f"{score.adapter_accuracy:.1%}"])
    under = (
        f"Base and adapter were scored on the same validation examples under {score.quantization}; "
        "losses are in nats per completion token."
    )
    return [*_table(["", "base", "adapter"], rows), "", under, ""]


def _loading(entries: Sequence[Entry], history: History) -> list[str]:
    best, exported = history.incumbent, history.exported
    if best is None or exported is None or history.opened is None:
        return []
    model = history.opened.facts.get("model", {})
    quantization = str(best.trial.params["quantization"])
    return ["```python", *load_snippet(model, quantization, exported.path, history), "```"]


def _trials(entries: Sequence[Entry], history: History) -> list[str]:
    heads = ["trial", "configuration", "origin", *rung_names(history), "tokens", "seconds", "peak", "status"]
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
        for row in trial_rows(history)
    ]
    return _table(heads, rows) if rows else []


def _promotions(entries: Sequence[Entry], history: History) -> list[str]:
    rows = []
    for at, run in _runs(entries):
        for segment, reason in zip(run.job.segments, run.reasons, strict=True):
            # What only goes on was decided when it began.
            if segment.rung > 0 and "goes on" not in reason:
                rows.append([f"{at:.1f}", str(segment.trial_id), str(segment.rung), reason])
    return _table(["second", "trial", "to rung", "why"], rows) if rows else []


def _runs(entries: Sequence[Entry]) -> list[tuple[float, Run]]:
    decided = [e.event for e in entries if isinstance(e.event, Decided)]
    runs = [(event.now, event.decision) for event in decided if isinstance(event.decision, Run)]
    return [(at, run) for at, run in runs if isinstance(run.job, TrainJob)]


def _budget(entries: Sequence[Entry], history: History) -> list[str]:
    rows = [[row.phase, f"{row.seconds:.1f}", f"{row.share:.1%}"] for row in phase_rows(history)]
    total = sum(row.seconds for row in phase_rows(history))
    table = _table(["phase", "seconds", "share"], [*rows, ["together", f"{total:.1f}", "100.0%"]])
    return [*table, "", *_useful(history)]


def _useful(history: History) -> list[str]:
    """What of the time was training, and what of the training was padding."""
    if not history.spent or history.opened is None:
        return []
    train = history.charged.get("train", 0.0)
    lines = [
        f"Training took {train / history.opened.budget_seconds:.1%} of the budget; overhead (everything else "
        f"that was spent) was {1 - train / history.spent:.1%} of the {history.spent:.0f} s spent."
    ]
    share = padding_share(history)
    if share is not None:
        lines.append(f"Padding was {share:.1%} of the positions that were computed in training.")
    return lines


def _speed(entries: Sequence[Entry], history: History) -> list[str]:
    card = history.opened.facts.get("card", {}) if history.opened else {}
    peak = None if card.get("stand_in") else card.get("tflops")  # another card's says nothing here
    rows = []
    for name, found in sorted(history.calibrations.items()):
        for probe in found.probes:
            flops = probe.tokens_per_second * found.flops_per_token
            chosen = probe.members == found.gang and probe.recompute == found.recompute
            rows.append(
                [
                    name,
                    str(probe.members),
                    str(probe.micro_batch),
                    "yes" if probe.recompute else "no",
                    f"{probe.tokens_per_second:.0f}",
                    f"{flops / 1e12:.3f}",
                    f"{flops / 1e12 / peak:.1%}" if peak else "-",
                    gib(probe.peak_bytes),
                    "yes" if chosen else "",
                ]
            )
    heads = ["quantization", "trials at once", "micro-batch", "checkpointing"]
    heads += ["tokens/s", "TFLOP/s", "MFU", "peak", "chosen"]
    why = (
        "Measured in the calibration, on real steps that begin with the longest rows. More trials at once "
        "are chosen as long as each doubling pays. TFLOP/s leave attention out; MFU is their share of the "
        "card's dense 16-bit peak, where that is known."
    )
    return [*_table(heads, rows), "", why] if rows else []


def _card(entries: Sequence[Entry], history: History) -> list[str]:
    row = card_row(history)
    lines = []
    if row is not None:
        found = {
            "most memory in use": gib(row.peak_bytes),
            "of it by other processes": gib(row.others_bytes) if row.others_bytes else None,
            "mean utilization": None if row.utilization is None else f"{row.utilization:.0%}",
            "energy": None if row.kilowatt_hours is None else f"{row.kilowatt_hours:.3f} kWh",
            "hottest": None if row.celsius is None else f"{row.celsius:.0f} °C",
            **{f"slowed down by {why}": f"{share:.1%} of the time" for why, share in row.throttled.items()},
        }
        lines = _table(["what", "found"], [(name, text) for name, text in found.items() if text])
        lines += [
            "",
            "By the watcher, five times a second; without NVML only memory is known.",
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
    rows = [
        ["calibration", name, calibration.status, calibration.detail]
        for name, calibration in history.calibrations.items()
        if calibration.status != "ok"
    ]
    for segment, result in history.results:
        if result.status != "ok":
            what = f"trial {result.trial_id}, attempt {segment.attempt}"
            rows.append([what, f"rung {result.rung}", result.status, result.detail])
    if history.score is not None and history.score.status != "ok":
        rows.append(["score", "", history.score.status, history.score.detail])
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
