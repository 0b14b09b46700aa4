"""Rows and numbers for every display, from the history alone."""

from __future__ import annotations

import dataclasses
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.text import Text

from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.policy.evidence import MIN_EXAMPLES
from budgetsearch.core.policy.planning import SINGLE
from budgetsearch.core.records import PHASES, Params
from budgetsearch.core.space.space import Space
from budgetsearch.views.card import adapter_path
from budgetsearch.views.fitted import Column, Fitted
from budgetsearch.views.metric import metric_line, metric_of, trial_metric, ungraded
from budgetsearch.views.words import (
    CUT_OFF,
    accuracy_of,
    counted,
    loss_text,
    params_text,
    rung_names,
    state_of,
    value_text,
    words_of,
)

SCORE_FIELDS = (
    "quantization",
    "base_loss",
    "adapter_loss",
    "base_accuracy",
    "adapter_accuracy",
    "task_examples",
)
SHOWN_TRIALS = 12
"""The best trials that a terminal shows; the report has all of them."""


@dataclass(frozen=True)
class TrialRow:
    """One trial, as the tables show it."""

    trial_id: int
    params: Params
    origin: str
    status: str
    rung: int
    """The highest finished rung; -1 before the first."""
    loss: float | None
    """The lowest validation loss seen at a checkpoint."""
    losses: tuple[float | None, ...]
    """Validation loss by rung; of a full run that was cut the last that was measured in it."""
    tokens: int
    seconds: float
    peak_bytes: int
    metric: float | None = None
    """Mean of the run's metric at its best checkpoint; None where it was not measured."""


@dataclass(frozen=True)
class PhaseRow:
    """Seconds of the budget that went into one phase, and their share of what was spent."""

    phase: str
    seconds: float
    share: float


# ------------------------------------------------------------------------------ rows


def trial_rows(history: History, going: bool = True) -> list[TrialRow]:
    """All trials: those that got furthest first, then by loss; ``going``: a process works on the run."""
    rows = [_trial_row(state, history, going) for state in history.trials.values()]
    return sorted(rows, key=lambda row: (-row.rung, row.loss is None, row.loss or 0.0, row.trial_id))


def _trial_row(state: TrialState, history: History, going: bool) -> TrialRow:
    killed = history.closed is None and not going
    rungs = history.plan.top_rung + 1 if history.plan else 0
    losses = dict(state.losses)
    if state.full_losses:  # also where the full run was cut before its end
        losses.setdefault(rungs - 1, state.full_losses[-1])
    return TrialRow(
        trial_id=state.trial_id,
        params=dict(state.trial.params),
        origin=state.trial.origin,
        status=CUT_OFF if killed and state.running else history.standing(state),
        rung=state.rung,
        loss=state.best_loss,
        losses=tuple(losses.get(rung) for rung in range(rungs)),
        tokens=state.tokens,
        seconds=state.seconds,
        peak_bytes=state.peak_bytes,
        metric=trial_metric(state, history),
    )


def phase_rows(history: History) -> list[PhaseRow]:
    """Seconds by phase; together they are what was spent."""
    spent = history.spent or 1.0
    rows = [
        PhaseRow(phase, history.charged[phase], history.charged[phase] / spent)
        for phase in PHASES
        if history.charged.get(phase)
    ]
    rest = history.spent - sum(row.seconds for row in rows)
    if rest > 0.005:
        rows.append(PhaseRow("under way", rest, rest / spent))
    return rows


def padding_share(history: History) -> float | None:
    """Padding among the positions that were computed in training; None before any."""
    trained = positions = 0.0
    for segment, result in history.results:
        tokens = result.tokens - segment.start_tokens
        if tokens > 0:
            trained += tokens
            positions += tokens / (1.0 - result.padding)
    return 1.0 - trained / positions if positions else None


def rank_correlations(history: History) -> list[tuple[int, int, float | None]]:
    """(rung, trials on it and the next, Spearman's correlation of their losses) for neighbours."""
    rows = []
    for rung in range(history.plan.top_rung if history.plan else 0):
        both = [t.losses for t in history.trials.values() if rung in t.losses and rung + 1 in t.losses]
        lower, upper = [losses[rung] for losses in both], [losses[rung + 1] for losses in both]
        rows.append((rung, len(both), spearman(lower, upper)))
    return rows


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """The rank correlation of two samples; None for fewer than three pairs or no variation."""
    if len(xs) < 3 or len(set(xs)) == 1 or len(set(ys)) == 1:
        return None
    return statistics.correlation(_ranks(xs), _ranks(ys))


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(values)
    return [(bisect_left(order, value) + bisect_right(order, value) + 1) / 2 for value in values]


@dataclass(frozen=True)
class CardRow:
    """Load of the card over the whole run."""

    peak_bytes: int
    others_bytes: int
    utilization: float | None
    """Mean over all samples, 0 to 1."""
    kilowatt_hours: float | None
    celsius: float | None
    throttled: Mapping[str, float]
    """By reason: share of the samples."""


def card_row(history: History) -> CardRow | None:
    """The watcher's samples of all jobs together; None before any."""
    uses = history.uses
    total = sum(use.samples for use in uses)
    if not total:
        return None
    busy = [(use.utilization, use.samples) for use in uses if use.utilization is not None]
    joules = [use.joules for use in uses if use.joules is not None]
    reasons = sorted({reason for use in uses for reason in use.throttled})
    return CardRow(
        peak_bytes=max(use.peak_bytes for use in uses),
        others_bytes=max(use.others_bytes for use in uses),
        utilization=sum(u * n for u, n in busy) / sum(n for _, n in busy) if busy else None,
        kilowatt_hours=sum(joules) / 3.6e6 if joules else None,
        celsius=max((use.celsius for use in uses if use.celsius is not None), default=None),
        throttled={
            reason: sum(use.throttled.get(reason, 0.0) * use.samples for use in uses) / total
            for reason in reasons
        },
    )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, never below zero."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


# ---------------------------------------------------------------------------- status


def status_dict(history: History, going: bool = True) -> dict[str, Any]:
    """Status of a run in plain JSON values; ``going``: a process works on it."""
    plan, best = history.plan, history.incumbent
    budget = history.opened.budget_seconds if history.opened else None
    return {
        "phase": state_of(history, going),
        "reason": history.closed.reason if history.closed else None,
        "budget_seconds": budget,
        "spent_seconds": history.spent,
        "deadline_kept": deadline_kept(history),
        "reserve_seconds": plan.reserve_seconds if plan else None,
        "ladder": list(plan.ladder) if plan else [],
        "trials": [
            {**vars(row), "losses": list(row.losses)}
            for row in sorted(trial_rows(history, going), key=lambda row: row.trial_id)
        ],
        "best": None if best is None else _best_dict(best, history),
        "phases": {row.phase: row.seconds for row in phase_rows(history)},
        "score": {name: getattr(history.score, name) for name in SCORE_FIELDS} if history.score else None,
        "metric": _metric_dict(history),
        "card": None if (card := card_row(history)) is None else dataclasses.asdict(card),
        "notices": [text for _, text in history.notices],
    }


def _best_dict(best: TrialState, history: History) -> dict[str, Any]:
    return {
        "trial_id": best.trial_id,
        "params": dict(best.trial.params),
        "loss": best.best_loss,
        "metric": trial_metric(best, history),
        "tokens": best.best_tokens,
        "adapter_path": adapter_path(history),
    }


def _metric_dict(history: History) -> dict[str, Any] | None:
    """What the run chooses by (or a recipe's second metric), and what base and adapter have of it; None: the
    loss alone."""
    metric, line = metric_of(history), metric_line(history)
    if metric is None:
        return None
    _, base, adapter, answers = line or (metric.name, None, None, 0)
    failed, of = ungraded(history)
    known = {"base": base, "adapter": adapter, "answers": answers, "failed_in_search": failed, "of": of}
    return {"name": metric.name, "direction": metric.direction, **known}


# -------------------------------------------------------------------------- terminals


def final_lines(history: History) -> list[str]:
    """The answer in a few lines: base against adapter, the configuration, the budget."""
    lines = answer_lines(history)
    best = history.incumbent
    if best is not None:
        lines.append(f"best  trial {best.trial_id}: {params_text(best.trial.params)}")
        lines += _full_run_in_vain(best, words_of(history).unit)
    if history.opened is not None:
        budget = history.opened.budget_seconds
        kept = {None: "", True: ", deadline kept", False: ", deadline PASSED"}[deadline_kept(history)]
        lines.append(f"budget  {history.spent:.0f} of {budget:.0f} s spent{kept}")
    tried, promoted, in_full = trial_counts(history)
    lines.append(f"trials  {tried} tried, {promoted} promoted, {in_full} in full{_full_lengths(history)}")
    if history.plan is None or not history.plan.single:
        return lines
    return [*lines, SINGLE if history.closed else SINGLE.replace("was", "is")]


def _full_run_in_vain(best: TrialState, unit: str) -> list[str]:
    """What a full run came to that made nothing better, and where the adapter is from then."""
    if not best.full_losses or best.best_loss is None or best.best_tokens >= best.full_marks[0]:
        return []
    loss, last = best.full_losses[-1], best.full_marks[-1]
    return [
        f"      its full run was no better ({loss:.4f} at {last} {unit}): the adapter is that of "
        f"{best.best_tokens} {unit} ({best.best_loss:.4f})"
    ]


def deadline_kept(history: History) -> bool | None:
    """Whether the run came to its end in time; None of one that has not, as long as it has time left."""
    budget = history.opened.budget_seconds if history.opened else None
    if budget is not None and history.spent > budget:
        return False
    return True if budget is not None and history.closed and history.closed.state == "finished" else None


def _full_lengths(history: History) -> str:
    """Tokens of the full runs, where not all of them came equally far."""
    states = [state for state in history.trials.values() if state.full_losses]
    lengths, unit = {state.tokens for state in states}, words_of(history).unit
    if len(lengths) < 2:
        return ""
    if len(states) > 3:
        return f" (full runs of {min(lengths)} to {max(lengths)} {unit})"
    return f" (full runs: {', '.join(f'trial {one.trial_id} {one.tokens} {unit}' for one in states)})"


def trial_counts(history: History) -> tuple[int, int, int]:
    """Count the trials that have started, those that were promoted, and those that ran in full to the end."""
    states = history.trials.values()
    return (
        sum(1 for state in states if state.goal >= 0),
        sum(1 for state in states if state.goal > 0),
        sum(1 for state in states if history.ran_in_full(state)),
    )


def answer_lines(history: History) -> list[str]:
    """Base against adapter, as far as it was scored."""
    score = history.score
    if score is None or score.base_loss is None or score.adapter_loss is None:
        return []
    own = words_of(history)
    under = f"  (under {score.quantization})" if own.of_adapters else ""
    if 0 < (measured := len(score.adapter_example_losses)) < MIN_EXAMPLES:
        under += f"  on {counted(measured, 'validation row')} only: that says next to nothing"
    lines = [
        f"validation {own.loss}  {own.before} {score.base_loss:.4f} -> {own.after} {score.adapter_loss:.4f}"
        f"{under}"
    ]
    if score.base_accuracy is not None and score.adapter_accuracy is not None:
        lines.append(
            f"task accuracy    base {score.base_accuracy:.1%} -> adapter {score.adapter_accuracy:.1%}"
            f"  ({accuracy_of(score)})"
        )
    if (line := metric_line(history)) is not None:
        name, base, adapter, count = line
        lines.append(f"{name:<15}  base {base:.4f} -> adapter {adapter:.4f}  (n = {count}, chosen by it)")
    return lines


def summary(history: History, going: bool = True) -> Group:
    """The final table for a terminal, with the answer below it; ``going``: a process works on the run."""
    lines = Text("\n".join(final_lines(history)))
    return Group(trial_table(history, going=going), lines) if history.trials else Group(lines)


def trial_table(history: History, limit: int = SHOWN_TRIALS, going: bool = True) -> Fitted:
    """The trials that got furthest; where it is narrow, with fewer columns."""
    every = trial_rows(history, going)
    rows = every[:limit]
    names = Space.parse(history.plan.space).searched if history.plan else ()
    knobs = [
        Column(name.replace("_", "\n"), [value_text(row.params.get(name, "-")) for row in rows])
        for name in names
    ]
    rungs = [
        Column(name.replace(" (", "\n("), [loss_text(row.losses[rung]) for row in rows])
        for rung, name in enumerate(rung_names(history))
    ]
    loss = Column("loss", [loss_text(row.loss) for row in rows])
    graded = any(row.metric is not None for row in every)
    metric = [Column("metric", [loss_text(row.metric) for row in rows])] if graded else []
    trial = Column("trial", [str(row.trial_id) for row in rows])
    seconds = Column("seconds", [f"{row.seconds:.0f}" for row in rows])
    status = Column("status", [row.status for row in rows], right=False)
    choices = [[trial, *knobs, *rungs, *metric, seconds, status]]
    for losses in ([*rungs, *metric], [loss, *metric]):
        choices += [[trial, *knobs[:kept], *losses, status] for kept in range(len(knobs), -1, -1)]
    caption = f"and {len(every) - limit} more" if len(every) > limit else ""
    waiting = len(every) - trial_counts(history)[0]
    known = counted(len(every), "trial") + (f" ({waiting} not tried)" if waiting else "")
    return Fitted(choices, title=f"{known}, {state_of(history, going)}", caption=caption)
