"""Which trial: who may be promoted, who may run in full, and what a tie is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass

from budgetsearch.core.evidence import indistinguishable
from budgetsearch.core.history import TrialState
from budgetsearch.core.records import cost_class
from budgetsearch.core.view import View

STRATA = ("quantization", "rank")
"""Early rungs cannot tell how well a value of these ends (docs/policy.md), so a tie goes to the trial that
brings one that no trial has carried up yet."""


@dataclass(frozen=True)
class Promotable:
    """A trial that may go on, and why."""

    state: TrialState
    reason: str


def promotable(view: View, rung: int) -> list[Promotable]:
    """The best of a rung, one in ``eta`` rounded up, that have not gone on; best first.

    Ahead of them comes a trial that the validation examples cannot tell from the first, if it carries up
    a rank or a quantization that is new there.
    """
    ranked = list(enumerate(view.history.at_rung(rung), start=1))
    waiting = [(n, s) for n, s in ranked if s.goal == rung and not s.dead and not s.running]
    entered = view.entered(rung)
    best = [(n, s) for n, s in waiting if n <= math.ceil(entered / view.plan.eta)]
    found = [Promotable(s, f"promotion: place {n} of {entered} at rung {rung}") for n, s in best]
    tie = _tie(view, rung, best[0][1], waiting) if best else None
    return [tie, *found] if tie else found


def _tie(
    view: View, rung: int, first: TrialState, waiting: list[tuple[int, TrialState]]
) -> Promotable | None:
    above = [t for t in view.history.trials.values() if t.goal > rung]
    if _new_values(first, above):
        return None
    kept = view.history.contenders()
    for place, state in waiting:
        new = _new_values(state, above)
        losses = first.example_losses.get(rung, ()), state.example_losses.get(rung, ())
        if new and state.trial_id in kept and indistinguishable(*losses):
            reason = (
                f"tie: place {place} of {view.entered(rung)} at rung {rung}, the first with {new} to go on"
            )
            return Promotable(state, reason)
    return None


def _new_values(state: TrialState, others: list[TrialState]) -> str:
    """What of the strata no other trial has, for people; empty if there is nothing."""
    params = state.trial.params
    for name in STRATA:
        if name in params and all(t.trial.params.get(name) != params[name] for t in others):
            return f"{name} {params[name]}"
    return ""


def finalists(view: View) -> list[TrialState]:
    """Trials that may run in full, best first: those that got furthest, then the rest by rung."""
    top = view.plan.top_rung
    if top == 0:
        return [s for s in view.history.trials.values() if not s.dead and s.goal < top]
    kept = view.history.contenders()
    ranked = [s for rung in range(top - 1, -1, -1) for s in view.history.at_rung(rung) if s.rung == rung]
    return [s for s in ranked if s.trial_id in kept and s.goal < top]


def prefer_resident(view: View) -> TrialState:
    """A candidate of the quantization that is loaded, so that the worker need not load another."""
    resident = view.history.last_quantization
    return min(view.candidates, key=lambda s: (cost_class(s.trial.params) != resident, s.trial_id))
