"""From run folders to ``Run`` records: the ledgers alone, no model and no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from budgetsearch.core.errors import LedgerError, RunFolderError, UsageError
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.storage.ledger import read_history
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.tools.compare.pairing import Costs, Results, Rows, Run, unique
from budgetsearch.views.card import scored_for
from budgetsearch.views.metric import metric_of
from budgetsearch.views.report.peaks import peaks_of
from budgetsearch.views.tables import card_row
from budgetsearch.views.words import state_of

NAME_CHARACTERS = 48
"""A longer name is cut in its middle: it stands in tables and legends."""


def gather(paths: Sequence[Path]) -> list[Run]:
    """The runs of these folders, each once, in their order.

    Raises:
        UsageError: none is given, one is not a run, or its ledger cannot be read.
    """
    folders = list({path.resolve(): path for path in paths}.values())
    if not folders:
        raise UsageError("Nothing to compare: name one run folder or more.")
    return [_read(path, name) for path, name in zip(folders, names_of(folders), strict=True)]


def names_of(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of these paths that tell them apart, fit to be shown."""
    parts = [path.resolve().parts for path in paths]
    longest = max(len(some) for some in parts)
    for length in range(1, longest + 1):
        names = [os.path.join(*some[-length:]) for some in parts]
        if len(set(names)) == len(names):
            break
    return unique([shown(name) for name in names])


def shown(text: str) -> str:
    """A name without what would break a line or steer a terminal, of bounded length."""
    plain = "".join(character if character.isprintable() else "?" for character in text)
    half = NAME_CHARACTERS // 2 - 1
    return plain if len(plain) <= NAME_CHARACTERS else f"{plain[:half]}..{plain[-half:]}"


def _read(path: Path, name: str) -> Run:
    folder = RunFolder(path)
    folder.check_run()
    try:
        history = read_history(folder.ledger)
    except LedgerError as error:
        raise RunFolderError(f"{error} Or leave {path} out of the comparison.") from error
    if history.opened is None:
        raise RunFolderError(f"{path} was stopped before it began; there is nothing to compare.")
    return run_of(history, name, str(path), going=history.closed is None and folder.in_use())


def run_of(history: History, name: str, path: str, *, going: bool = False) -> Run:
    """What a ledger tells of a run, finished or not."""
    assert history.opened is not None
    facts = history.facts
    if recipe := facts.get("recipe"):  # what is compared is its metric, on its own validation examples
        model = {"source": recipe["name"], "sha256": recipe["sha256"]}
        rows = Rows(*[recipe["sha256"]] * 3)
    else:
        model, data = facts["model"], facts["data"]
        rows = Rows(data["source_sha256"], data["valid_rows_sha256"], data["valid_tokens_sha256"])
        if left_out := facts.get("left_out", ()):
            rows = replace(rows, valid_rows=f"{rows.valid_rows} without {left_out}")
        if "left_out" in facts:
            rows = replace(rows, valid_tokens=f"{rows.valid_tokens} in bytes without {left_out}")
    best, state = history.incumbent, state_of(history, going)
    adapter, base, notes = _results(history, best)
    if state != "finished":
        notes.append(f"the run is not finished ({state}): it stands for what it had come to")
    return Run(
        name=name,
        path=path,
        state=state,
        model=shown(model["source"]),
        model_sha256=model["sha256"],
        quantization=str(best.trial.params.get("quantization", "any")) if best else "",
        rows=rows,
        adapter=adapter,
        base=base,
        costs=_costs(history),
        space=shown(str(history.plan.space.get("name", ""))) if history.plan else "",
        params=dict(best.trial.params) if best else {},
        tokens=best.best_tokens if best else 0,
        trials=sum(1 for trial in history.trials.values() if trial.started),
        metric=metric_of(history),
        notes=tuple(notes),
    )


def _results(history: History, best: TrialState | None) -> tuple[Results, Results, list[str]]:
    """(adapter, base, notes): the final scores, else what the search last measured of the best trial."""
    if best is None:
        return Results(), Results(), ["no trial has finished a segment, so there is nothing to compare"]
    score = scored_for(history, best)
    if score is not None and score.adapter_example_losses:
        targets = score.example_tokens
        return (
            Results(score.adapter_example_losses, targets, score.adapter_grades, score.adapter_metric),
            Results(score.base_example_losses, targets, score.base_grades, score.base_metric),
            [],
        )
    losses = next(
        (
            result.example_losses
            for _, result in reversed(history.results)
            if result.trial_id == best.trial_id and result.checkpoint_out == best.best_checkpoint
        ),
        (),
    )
    why = "there are no final scores: its loss is that of the last evaluation in the search"
    return Results(losses), Results(), [why if losses else "its ledger holds no loss by example"]


def _costs(history: History) -> Costs:
    assert history.opened is not None
    row = card_row(history)
    kilowatt_hours = row.kilowatt_hours if row else None
    return Costs(
        budget_seconds=history.opened.budget_seconds,
        device_seconds=history.spent - history.charged.get("down", 0.0),
        train_seconds=history.charged.get("train", 0.0),
        watt_hours=None if kilowatt_hours is None else 1000 * kilowatt_hours,
        peak_bytes=peaks_of(history).process_bytes,
        card=shown(history.opened.facts["card"]["name"]),
    )
