"""Which trial: who may be promoted, who may run in full, and what a tie is worth."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from budgetsearch.core.history.retention import contenders
from budgetsearch.core.history.retired import STRATA
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.policy.evidence import indistinguishable
from budgetsearch.core.policy.situation import View
from budgetsearch.core.records import ParamValue, cost_class


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
    entered, waiting, best = view.competed(rung), _waiting(view, rung), _best(view, rung)
    found = [Promotable(s, f"promotion: place {n} of {entered} at rung {rung}") for n, s in best]
    if not best:
        return []
    for name, value in _missing(view, rung, best[0][1]):
        tie = _tie(rung, best[0][1], [(n, s) for n, s in waiting if s.trial.params.get(name) == value])
        if tie is not None:
            where = f"place {view.history.place(tie, rung)} of {entered} at rung {rung}"
            return [Promotable(tie, f"tie: {where}, the first with {name} {value} to go on"), *found]
    return found


def any_promotable(view: View, rung: int) -> bool:
    """Whether ``promotable`` would find somebody."""
    return bool(_best(view, rung))


def earned(view: View, state: TrialState) -> bool:
    """Whether a trial is among the best of its rung, ties aside."""
    return any(one is state for _, one in _best(view, state.goal))


def _best(view: View, rung: int) -> list[tuple[int, TrialState]]:
    places = math.ceil(view.competed(rung) / view.plan.eta)
    return [(n, s) for n, s in _waiting(view, rung) if n <= places]


def _waiting(view: View, rung: int) -> list[tuple[int, TrialState]]:
    """Places and trials of a rung that may go on; whoever was dropped has no checkpoint any more."""
    history, out = view.history, view.history.dropped
    here = [s for s in history.active.values() if s.goal == rung and rung in s.losses]
    able = [s for s in here if not (s.stuck or s.running or s.trial_id in out)]
    return sorted(((history.place(s, rung), s) for s in able), key=lambda one: one[0])


def _missing(view: View, rung: int, first: TrialState) -> list[tuple[str, ParamValue]]:
    """Values of the strata that no trial has carried beyond the rung; none if ``first`` brings one."""
    states, known = view.history.active.values(), view.history.retired.first
    found: dict[tuple[str, ParamValue], None] = {}
    for name in STRATA:
        above = {t.trial.params.get(name) for t in states if t.goal > rung}
        above |= {value for goal, of in known if goal > rung and of == name for value in known[goal, of]}
        here = dict(known.get((rung, name), {}))
        for t in states:
            if t.goal == rung and name in t.trial.params:
                value = t.trial.params[name]
                here[value] = min(here.get(value, t.trial_id), t.trial_id)
        found |= {(name, value): None for value in sorted(here, key=here.__getitem__) if value not in above}
        if name in first.trial.params and first.trial.params[name] not in above:
            return []
    return list(found)


def _tie(rung: int, first: TrialState, waiting: list[tuple[int, TrialState]]) -> TrialState | None:
    """The best of those waiting, if it cannot be told from the first."""
    if not waiting:
        return None
    state = waiting[0][1]
    losses = first.example_losses.get(rung, ()), state.example_losses.get(rung, ())
    return state if indistinguishable(*losses) else None


def finalists(view: View) -> list[TrialState]:
    """Trials that may run in full, best first: those that got furthest, then the rest by rung."""
    top = view.plan.top_rung
    if top == 0:
        return [s for s in view.history.active.values() if not s.stuck and s.goal < top]
    kept = contenders(view.history)
    able = (s for s in view.history.active.values() if s.trial_id in kept and s.goal < top and not s.stuck)
    ranked = [s for s in able if s.rung in s.losses]
    return sorted(ranked, key=lambda s: (-s.rung, s.losses[s.rung], s.trial_id))


def next_candidate(view: View) -> TrialState:
    """Of those that wait: one whose quantization has a whole gang waiting, else one whose quantization is
    loaded, so that the worker need not load another; the oldest of them."""
    waiting = Counter(cost_class(s.trial.params) for s in view.candidates)
    resident = view.history.last_quantization

    def rank(state: TrialState) -> tuple[bool, bool, int]:
        name = cost_class(state.trial.params)
        return waiting[name] < view.gang_size(name), name != resident, state.trial_id

    return min(view.candidates, key=rank)
