"""What every simulated run must keep; whoever breaks it has a bug, and the simulation says so loudly."""

from __future__ import annotations

import math
from collections.abc import Sequence

from budgetsearch.core.decisions import Run
from budgetsearch.core.errors import BudgetsearchError
from budgetsearch.core.events import Decided, Entry, SegmentStarted
from budgetsearch.core.history.fold import apply
from budgetsearch.core.history.history import History
from budgetsearch.core.policy.decide import decide

REASONS = ("scout", "runner-up", "tie", "asked for by hand")
"""A promotion from beyond the best ``1 / eta`` begins with one of these."""


class InvariantError(BudgetsearchError):
    """A simulated run broke a promise of the policy."""


def check(entries: Sequence[Entry], budget: float, *, replay: bool = False, slack: float = 1e-6) -> History:
    """Fold a finished run and check it; with ``replay`` every decision is taken again.

    ``slack``: seconds that may pass between the last charge and the last entry; on a real clock some do.

    Raises:
        InvariantError: the deadline was passed, a second or a segment lost, a promotion unexplained, or
            a decision not repeated.
    """
    history = History()
    for entry in entries:
        if isinstance(entry.event, Decided):
            _check_decision(history, entry.event, replay=replay)
        if isinstance(entry.event, SegmentStarted):
            _check_continuation(history, entry.event)
        apply(history, entry)
    _require(history.closed is not None, "the run was never closed")
    _require(history.spent <= budget * (1 + 1e-9), f"spent {history.spent} of {budget} s")
    charged = sum(history.charged.values())
    _require(
        math.isclose(charged, history.spent, rel_tol=1e-6, abs_tol=slack),
        f"charged {charged} s of {history.spent}",
    )
    _require(not history.running, "a segment was lost")
    return history


def _check_decision(history: History, event: Decided, *, replay: bool) -> None:
    if replay and history.plan is not None:
        again = decide(history.plan, history, history.candidates, event.now, event.free_slots)
        _require(again == event.decision, f"replayed {again}, recorded {event.decision}")
    if not isinstance(event.decision, Run) or history.plan is None:
        return
    for segment, reason in zip(event.decision.job.segments, event.decision.reasons, strict=True):
        state = history.trials[segment.trial_id]
        if segment.rung <= state.goal or state.goal < 0:
            continue  # it goes on, or enters
        rung = state.goal
        reached = [t for t in history.trials.values() if t.goal >= rung]
        best = {t.trial_id for t in history.at_rung(rung)[: math.ceil(len(reached) / history.plan.eta)]}
        explained = state.trial_id in best or reason.startswith(REASONS)
        _require(explained, f"trial {state.trial_id} was promoted from rung {rung}: {reason}")


def _check_continuation(history: History, event: SegmentStarted) -> None:
    state = history.trials[event.segment.trial_id]
    name = event.segment.checkpoint_in
    _require(
        event.segment.start_tokens == state.tokens, f"trial {state.trial_id} does not go on where it was"
    )
    _require(bool(name) == bool(state.tokens), f"trial {state.trial_id} has tokens without a checkpoint")
    on_disk = name is None or any(one.name == name for one in state.held)
    _require(on_disk, f"trial {state.trial_id} starts from {name}, which is lost or given up")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise InvariantError(f"Invariant broken: {problem}.")
