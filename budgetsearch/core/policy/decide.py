"""``decide``: what to run next, as a pure function of the plan, the history and the time.

Promotion-type successive halving, sized to the budget. Trials enter as long as their promotions, the
full run and the reserve fit behind them; of ``eta`` trials at a rung one goes on, at once, so that the
sampler soon learns what the higher rungs say. Rungs are pooled: a new trial competes with all paused
ones. The last part of the budget trains the best in full. Everything is re-planned after every segment
from what the segments really took.

Where the budget holds many full runs the first rung is very short. Then the first trials (scouts) all
go to the second rung, and if the two rungs rank them differently, further trials enter at the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from budgetsearch.core.decisions import Decision, Finish, NeedCandidates, Run, Wait
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.ladders import FEW_TRIALS, FINALISTS_SHARE
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.costs import PESSIMISM, CostModel
from budgetsearch.core.policy.full_run import (
    full_run_link,
    full_run_seconds,
    gets_far_enough,
    has_full_run,
    worth_a_restart,
)
from budgetsearch.core.policy.gangs import gather
from budgetsearch.core.policy.rungs import any_promotable, earned, finalists, next_candidate, promotable
from budgetsearch.core.policy.situation import View, rung_segment

FEW_SHARE = 0.5
"""Of a full run: what another trial may cost while there are few."""


def decide(
    plan: Plan, history: History, candidates: Sequence[TrialState], now: float, free_slots: int
) -> Decision:
    """The next step. ``now`` is in active seconds of the run.

    ``Wait`` is returned only while something runs.
    """
    if free_slots > 0:
        workers = free_slots + len(history.running) if plan.workers > 1 else 1
        costs = CostModel.learn(plan, history)
        view = View(plan, history, candidates, now, costs, workers, free_slots)
        for rule in RULES:
            decision = rule(view)
            if decision is not None:
                return gather(view, decision, RULES) if isinstance(decision, Run) else decision
    if history.running:
        return Wait()
    return Finish(_why_finished(plan, history))


# ------------------------------------------------------------------------- the rules


def go_on(view: View) -> Decision | None:
    """A trial that is under way towards a rung (interrupted, retried, or a link of the full run)."""
    top = view.plan.top_rung
    over, dropped = set(view.history.full_done), view.history.dropped
    for state in view.history.active.values():
        if state.running or state.stuck or state.goal <= state.rung:
            continue
        if state.trial_id in over or state.trial_id in dropped:
            continue
        if state.goal == top:
            if not worth_a_restart(view, state):
                continue
            decision = full_run_link(view, state, "full run goes on")
        else:
            decision = rung_segment(view, state, state.goal, f"rung {state.goal} goes on")
        if decision is not None:
            return decision
    return None


def scout(view: View) -> Decision | None:
    """The first trials go to the second rung whatever their loss there will be."""
    trials = view.history.trials
    for state in (trials[number] for number in range(view.plan.scouts) if number in trials):
        waits = state.trial_id < view.plan.scouts and state.goal == 0 and state.rung == 0
        if waits and not state.stuck and not state.running and state.trial_id not in view.history.dropped:
            return rung_segment(view, state, 1, "scout: does the first rung predict the second?")
    return None


def enter(view: View) -> Decision | None:
    """Another trial, while its promotions and the full run still fit behind it."""
    retired, states = view.history.retired, [s for s in view.history.active.values() if s.started]
    started = retired.started + len(states)
    if view.plan.top_rung == 0 or started >= view.plan.max_trials:
        return None
    # Even if a whole full run does not fit any more: one trial there must be.
    nobody = not retired.able and all(s.stuck for s in states)
    late = _promotions_due(view) or _time_for_finalists(view) or not _another_fits(view)
    if late and not nobody:
        return None
    if not view.candidates:
        return NeedCandidates(_wanted_candidates(view, started)) if view.may_ask else None
    state = next_candidate(view)
    return rung_segment(view, state, view.entry, f"new trial ({state.trial.origin})")


def promote(view: View) -> Decision | None:
    """The best of the lowest unfinished rung goes one rung up, once that rung is complete."""
    return _promote(view, least=0)


def promote_finalists(view: View) -> Decision | None:
    """Where nothing more can enter, the finalists of every rung go on, however few there are."""
    full_run_due = view.entered(view.plan.top_rung) < view.quota(view.plan.top_rung - 1)
    # Each worker trains somebody in full at the end.
    least = max(view.wanted_finalists, view.workers)
    return None if full_run_due else _promote(view, least)


def _promote(view: View, least: int) -> Decision | None:
    for rung in range(view.plan.top_rung - 1):
        if not view.several and any(s.running and s.goal == rung for s in view.history.active.values()):
            return None  # a gang's other members
        already = view.entered(rung + 1)
        if already >= max(view.quota(rung), least):
            continue
        # The first promotion is the way to the full run; further ones must leave room for it.
        room = 0.0 if already == 0 else full_run_seconds(view)
        for one in promotable(view, rung):
            decision = rung_segment(view, one.state, rung + 1, one.reason, room)
            if decision is not None:
                return decision
    return None


def start_full_run(view: View) -> Decision | None:
    """The best finalist runs in full; the runner-up follows if it failed or if there is time, or beside it on
    another worker."""
    history, top = view.history, view.plan.top_rung
    if history.running and not view.several:
        return None
    if top == 0 and not view.candidates and _wants_another(view):
        return NeedCandidates(1)
    for state in finalists(view):
        if state.running:
            continue
        if has_full_run(view) and not gets_far_enough(view, state):
            continue
        if not worth_a_restart(view, state):
            continue
        first = top == 0 or earned(view, state)
        decision = full_run_link(view, state, "full run starts" if first else "runner-up starts")
        if decision is not None:
            return decision
    return None


RULES: tuple[Callable[[View], Decision | None], ...] = (
    go_on,
    scout,
    enter,
    promote,
    promote_finalists,
    start_full_run,
)
"""Tried in this order; the first that has an answer decides."""


# ------------------------------------------------------- the arithmetic of the search


def _promotions_due(view: View) -> bool:
    """Whether a trial has earned the next rung. A full run waits, unless another one fits behind it with
    another group to choose from: till then more trials improve the choice.
    """
    top = view.plan.top_rung
    for rung in range(top):
        due = view.entered(rung + 1) < view.quota(rung)
        if due and not (rung == top - 1 and _early(view)) and any_promotable(view, rung):
            return True
    return False


def _early(view: View) -> bool:
    """Whether no other full run fits behind one that would start now, with a group to choose from."""
    group = view.plan.eta * view.costs.typical_seconds(view.plan.ladder[view.entry])
    work = 2 * full_run_seconds(view) + group
    return work > view.work_left or (view.several and _way_seconds(view) > view.left)


def _another_fits(view: View) -> bool:
    """Whether one more trial may enter: there is the time for its rungs and its full run one after the other,
    and for what everybody together still has to do."""
    if view.several and _way_seconds(view) > view.left:
        return False
    return _search_seconds(view) <= view.work_left


def _way_seconds(view: View) -> float:
    """Seconds from a trial's beginning to the end of its full run if it never waits."""
    plan, share = view.plan, _full_share(view)
    steps = [plan.ladder[view.entry]]
    steps += [plan.ladder[k] - plan.ladder[k - 1] for k in range(view.entry + 1, plan.top_rung)]
    rungs = sum(map(view.costs.typical_seconds, steps)) + max(plan.load_seconds.values(), default=0.0)
    return rungs * view.costs.margin + share * full_run_seconds(view)


def _wanted_candidates(view: View, started: int) -> int:
    """As many as there are free workers, and no more than surely have the time to start."""
    if not view.several:
        return 1
    each = view.costs.typical_seconds(view.plan.ladder[view.entry], ganged=True) * view.costs.margin
    fitting = 1 + max(0.0, view.work_left - _search_seconds(view)) / max(each, 1e-9)
    return max(1, int(min(view.free, view.plan.max_trials - started, fitting)))


def _time_for_finalists(view: View) -> bool:
    plan = view.plan
    few_rungs = view.entry > 0 or plan.top_rung == 1
    late = view.left < FINALISTS_SHARE * plan.budget_seconds
    if not (few_rungs and late):
        return False
    before = any(rung >= plan.top_rung - 1 for rung in view.history.retired.able)
    states = view.history.active.values()
    return before or any(s.goal >= plan.top_rung - 1 and not s.stuck for s in states)


def _search_seconds(view: View) -> float:
    """Seconds until every promotion is done and has run in full, if one more trial enters."""
    ladder, eta, total = view.plan.ladder, view.plan.eta, 0.0
    entering = view.entered(view.entry) + 1
    total += view.costs.typical_seconds(ladder[view.entry], ganged=True)
    for rung in range(view.entry + 1, view.plan.top_rung):
        already = view.entered(rung)
        entering = max(already, entering // eta, view.wanted_finalists)
        total += (entering - already) * view.costs.typical_seconds(ladder[rung] - ladder[rung - 1])
    already = view.entered(view.plan.top_rung)
    full = max(already, entering // eta, view.wanted_finalists) - already
    return total * view.costs.margin + full * _full_share(view) * full_run_seconds(view)


def _full_share(view: View) -> float:
    return FEW_SHARE if view.entered(0) < FEW_TRIALS else 1.0


def _wants_another(view: View) -> bool:
    """On a ladder of one rung: whether one more configuration may run in full."""
    history = view.history
    waiting = (s for s in history.active.values() if not s.stuck and s.trial_id not in history.full_done)
    if any(not s.running for s in waiting):
        return False
    room = not has_full_run(view) or full_run_seconds(view) * PESSIMISM <= view.left
    return room and view.may_ask and len(history.trials) < view.plan.max_trials


def _why_finished(plan: Plan, history: History) -> str:
    if history.full_done:
        return "the full run is over"
    if history.incumbent is not None:
        return "no further segment fits into the time that is left"
    if history.trials and all(s.dead == "infeasible" for s in history.trials.values()):
        return "nothing of the search space fits into memory"
    return "no trial finished a segment"
