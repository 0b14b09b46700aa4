"""What a run came to, read from its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetsearch.core.history.history import History
from budgetsearch.core.records import Score
from budgetsearch.machine.clock import Timing
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.metric import trial_metric
from budgetsearch.views.shortfalls import Shortfall, shortfalls_of


@dataclass(frozen=True)
class Best:
    """The trial behind the exported adapter."""

    trial_id: int
    params: Mapping[str, Any]
    loss: float
    """Mean validation cross-entropy per completion token (nats)."""
    tokens: int
    metric: float | None = None
    """Mean of the run's metric there; None of a run that chooses by the loss."""


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    state: str
    """finished, interrupted or failed; without an end running, or stopped where no process works on it."""
    reason: str
    path: Path
    """Its folder."""
    best: Best | None
    adapter_path: Path | None
    """The best trial's PEFT adapter, which ``peft.PeftModel.from_pretrained`` loads; None if another's or
    none stands there."""
    score: Score | None
    """Base against adapter, under the same quantization."""
    ledger: Path
    """The SQLite file with every event, decision and second."""
    spent_seconds: float
    budget_seconds: float
    signal: str = ""
    """The signal that interrupted it, such as SIGTERM."""
    shortfalls: tuple[Shortfall, ...] = ()
    """What it lost or never measured, and why; none while it goes."""
    left_seconds: float = math.inf
    """What the budget still held when this was made; infinite of a run that was over before."""


def result_of(folder: RunFolder, history: History, timing: Timing | None = None) -> Result:
    """What the run in a folder came to; ``timing``: of the search that has just ended, if one has."""
    best = history.incumbent
    closed = history.closed
    assert history.opened is not None
    going = closed is None and folder.in_use()
    return Result(
        state=closed.state if closed else "running" if going else "stopped",
        reason=closed.reason if closed else "the run has not ended",
        path=folder.path,
        best=(
            Best(
                best.trial_id,
                dict(best.trial.params),
                best.best_loss,
                best.best_tokens,
                trial_metric(best, history),
            )
            if best is not None and best.best_loss is not None
            else None
        ),
        adapter_path=(
            folder.adapter if best is not None and folder.holds_adapter(best.best_checkpoint) else None
        ),
        score=history.score,
        ledger=folder.ledger,
        spent_seconds=history.spent,
        budget_seconds=history.opened.budget_seconds,
        signal=closed.signal if closed else "",
        shortfalls=shortfalls_of(folder, history, going),
        left_seconds=timing.seconds_left() if timing else math.inf,
    )
