"""What a run came to, as figures, and what several runs of each regime come to together."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from budgetsearch.core.history.history import History

LEAST_SHARE = 0.97
"""Of the winner's training that is to be in the adapter, in every run."""
WORSE = 1.05
"""So many times the loss of a quiet run with half of the hours a run beside one busy process may have."""


def exported_seconds(history: History) -> tuple[float, float]:
    """(seconds of training behind the exported adapter, seconds of training of its trial in all)."""
    done = history.exported
    if done is None:
        return 0.0, 0.0
    mine = [(s, r) for s, r in history.results if r.trial_id == done.trial_id]
    whole = sum(r.seconds.get("train", 0.0) for _, r in mine)
    wanted, inside = done.checkpoint or None, 0.0
    for segment, result in reversed(mine):
        if wanted is not None and result.checkpoint_out == wanted and segment.checkpoint_in != wanted:
            inside += result.seconds.get("train", 0.0)
            wanted = segment.checkpoint_in
    return inside, whole


def figures_of(history: History) -> dict[str, Any]:
    """Of one run, as plain JSON values."""
    inside, whole = exported_seconds(history)
    score, done = history.score, history.exported
    state = history.trials[done.trial_id] if done is not None else None
    return {
        "state": history.closed.state if history.closed else "killed",
        "reason": history.closed.reason if history.closed else "",
        "deadline kept": history.opened is not None and history.spent <= history.opened.budget_seconds,
        "winner's training seconds": round(whole, 2),
        "in the adapter": round(inside / whole, 4) if whole else None,
        "tokens of the winner": state.tokens if state is not None else 0,
        "trials": sum(1 for one in history.trials.values() if one.started),
        "base loss": score.base_loss if score else None,
        "final loss": score.adapter_loss if score else None,
        "scores stand": bool(score and score.base_loss is not None and score.adapter_loss is not None),
        "computed with threads": sorted({r.computed_on.get("threads", "") for _, r in history.results}),
    }


def summary(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """By regime: the worst share, medians, and whether the targets are met; ``runs`` are results of files."""
    by_regime: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_regime.setdefault(run["regime"], []).append(run)
    found: dict[str, Any] = {name: _together(some) for name, some in by_regime.items()}
    half, loaded = (found.get(name, {}).get("median final loss") for name in ("half", "busy"))
    found["targets"] = {
        f"at least {LEAST_SHARE:.0%} in the adapter, in every run": all(
            (run["in the adapter"] or 0.0) >= LEAST_SHARE for some in by_regime.values() for run in some
        ),
        "scores in every run": all(run["scores stand"] for some in by_regime.values() for run in some),
        f"loss beside one busy process at most {WORSE:g} times that of half of the hours": None
        if half is None or loaded is None
        else loaded <= WORSE * half,
    }
    return found


def _together(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses = [run["final loss"] for run in runs if run["final loss"] is not None]
    return {
        "runs": len(runs),
        "least in the adapter": min((run["in the adapter"] or 0.0) for run in runs),
        "scores stand": sum(run["scores stand"] for run in runs),
        "deadline kept": sum(run["deadline kept"] for run in runs),
        "median tokens of the winner": statistics.median(run["tokens of the winner"] for run in runs),
        "median final loss": statistics.median(losses) if losses else None,
    }
