"""The runs below a folder, each in one row from its ledger."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import BudgetsearchError
from budgetsearch.storage.ledger import read_entries, read_history
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.card import adapter_path
from budgetsearch.views.fitted import Column, Fitted
from budgetsearch.views.words import STATE_MEANS, loss_text, state_of

DEPTH = 4
"""Folders below the named one are looked through so far down."""


@dataclass(frozen=True)
class RunRow:
    """One run, as the list shows it."""

    path: str
    began: float
    """In seconds since the epoch."""
    model: str
    state: str
    loss: float | None
    """The best adapter's validation loss, in nats per completion token."""
    base_loss: float | None
    accuracy: float | None
    """Share of right answers of the best adapter, 0 to 1."""
    base_accuracy: float | None
    spent_seconds: float
    budget_seconds: float
    adapter_path: str | None
    per_byte: bool = False
    """Whether its losses are in nats per byte, as of several models."""


@dataclass(frozen=True)
class Listed:
    """The runs, newest first, and what holds one that cannot be read, with the reason."""

    runs: tuple[RunRow, ...]
    skipped: tuple[tuple[str, str], ...]


def runs_below(folder: Path) -> Listed:
    """Read the ledgers of all runs in and below a folder."""
    rows, skipped = list[RunRow](), list[tuple[str, str]]()
    for run in _folders_below(folder, DEPTH):
        try:
            rows.append(_row(run))
        except (BudgetsearchError, OSError) as error:
            skipped.append((str(run.path), str(error)))
    return Listed(tuple(sorted(rows, key=lambda row: -row.began)), tuple(skipped))


def _folders_below(folder: Path, depth: int) -> Iterator[RunFolder]:
    run = RunFolder(folder)
    if run.has_ledger():
        yield run
    elif depth:
        with os.scandir(folder) as found:
            inner = sorted(one.name for one in found if one.is_dir(follow_symlinks=False))
        for name in inner:
            if not name.startswith("."):
                yield from _folders_below(folder / name, depth - 1)


def _row(folder: RunFolder) -> RunRow:
    """Read one run.

    Raises:
        BudgetsearchError: it has not begun, or its ledger cannot be read.
    """
    history = read_history(folder.ledger)
    opened, best, score = history.opened, history.incumbent, history.score
    if opened is None:
        raise folder.being_prepared() if folder.in_use() else folder.never_began()
    return RunRow(
        path=str(folder.path),
        began=next(read_entries(folder.ledger)).wall,
        model=_trained(history.facts),
        state=state_of(history, folder.goes(history.closed is not None)),
        loss=(score.adapter_loss if score else None) or (best.best_loss if best else None),
        base_loss=score.base_loss if score else None,
        accuracy=score.adapter_accuracy if score else None,
        base_accuracy=score.base_accuracy if score else None,
        spent_seconds=history.spent,
        budget_seconds=opened.budget_seconds,
        per_byte="models" in opened.facts,
        adapter_path=adapter_path(history) if best and folder.holds_adapter(best.best_checkpoint) else None,
    )


def runs_table(rows: Sequence[RunRow]) -> Fitted:
    """Where it is too wide first the adapter goes, then what else a run can be asked for."""
    run = Column("run", [row.path for row in rows], right=False)
    state = Column("state", [_state(row) for row in rows], right=False)
    loss = Column("loss", [_loss(row) for row in rows])
    when = Column("began", [f"{datetime.fromtimestamp(row.began):%Y-%m-%d %H:%M}" for row in rows])
    model = Column("model", [row.model.rstrip("/").rsplit("/", 1)[-1] for row in rows], right=False)
    right = Column("accuracy", [_of_base(_share(row.accuracy), _share(row.base_accuracy)) for row in rows])
    spent = Column("spent", [f"{row.spent_seconds:.0f} of {row.budget_seconds:.0f} s" for row in rows])
    adapter = Column("adapter", [row.adapter_path or "-" for row in rows], right=False)
    every = [run, when, model, state, loss, right, spent, adapter]
    choices = [every]
    for gone in (adapter, spent, model, right, when):
        choices.append([column for column in choices[-1] if column is not gone])
    return Fitted(choices, caption="loss and accuracy: the best adapter's, and the base's behind the bar")


def _state(row: RunRow) -> str:
    """That there is no adapter is told of a run that is over before anything it found."""
    return f"{row.state}, no adapter" if row.state in STATE_MEANS and not row.adapter_path else row.state


def _loss(row: RunRow) -> str:
    """Per byte where several models were compared: no loss per token stands beside it."""
    text = _of_base(loss_text(row.loss), loss_text(row.base_loss))
    return f"{text} a byte" if row.per_byte and row.loss is not None else text


def _of_base(found: str, base: str) -> str:
    return found if base == "-" else f"{found} | {base}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _trained(facts: Mapping[str, Any]) -> str:
    """The base model, or the name of a recipe."""
    return str(facts.get("model", {}).get("source") or facts.get("recipe", {}).get("name", ""))
