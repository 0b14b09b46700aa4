"""The rules of the search: first what each of them does, then when it applies; ``decide`` has their order."""

from __future__ import annotations

from collections.abc import Iterator

from budgetsearch.core.decisions import NeedCandidates, Run
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.ladders import FINALISTS_SHARE
from budgetsearch.core.policy.answers import Answer, Refusal, first
from budgetsearch.core.policy.costs import PESSIMISM
from budgetsearch.core.policy.forecast import fitting_trials, no_room, second_full_run_fits
from budgetsearch.core.policy.full_run import full_run_link, full_run_seconds, grade_finalists, has_full_run
from budgetsearch.core.policy.situation import Situation, rung_segment

BY_HAND = "asked for by hand"

# ------------------------------------------------------------------ what the rules do


def go_on(situation: Situation) -> Answer:
    """A trial that is under way towards a rung (interrupted, retried, or a link of the full run)."""
    history, top = situation.history, situation.plan.top_rung
    out = history.dropped.union(history.full_done)

    def link(state: TrialState) -> Answer:
        if state.goal == top:
            return full_run_link(situation, state, "full run goes on")
        return rung_segment(situation, state, state.goal, f"rung {state.goal} goes on")

    able = (s for s in history.active.values() if not s.running and not s.stuck and s.trial_id not in out)
    return first(link(state) for state in able if state.goal > state.rung)


def by_hand(situation: Situation) -> Answer:
    """What a person asked for: the next promotion of a trial, or the beginning of one."""
    top, dropped = situation.plan.top_rung, situation.history.dropped

    def onward(state: TrialState) -> Answer:
        if not state.started and top > 0:
            return rung_segment(situation, state, situation.entry_of(state), f"{BY_HAND}: new trial")
        if state.goal + 1 == top:
            return full_run_link(situation, state, f"{BY_HAND}: full run starts")
        return rung_segment(situation, state, state.goal + 1, f"{BY_HAND}: promotion")

    asked = [s for s in situation.history.active.values() if s.wished and not s.running and not s.stuck]
    return first(onward(s) for s in asked if s.goal == s.rung < top and s.trial_id not in dropped)


def scout(situation: Situation) -> Answer:
    """The first trials go to the second rung whatever their loss there will be."""
    history = situation.history
    known = (history.trials.get(number) for number in range(situation.plan.scouts))
    for state in filter(None, known):
        able = not state.stuck and not state.running and state.trial_id not in history.dropped
        if able and state.goal == state.rung == 0:
            return rung_segment(situation, state, 1, "scout: does the first rung predict the second?")
    return None


def promote(situation: Situation) -> Answer:
    """The best of the lowest rung that owes a promotion goes one rung up."""
    return first(_promotions(situation, least=0))


def promote_finalists(situation: Situation) -> Answer:
    """Where nothing more can enter, the finalists of every rung go on, however few there are."""
    # Each worker trains somebody in full at the end.
    return first(_promotions(situation, max(situation.wanted_finalists, situation.workers)))


def _promotions(situation: Situation, least: int) -> Iterator[Run | Refusal]:
    rungs = situation.rungs
    for rung in range(situation.plan.top_rung - 1):
        if rungs.running(rung) and not situation.several:
            return  # a gang's other members
        already = rungs.sent(rung + 1)
        if already >= max(rungs.quota(rung), least):
            continue
        # The first promotion is the way to the full run; further ones must leave room for it.
        room = 0.0 if already == 0 else full_run_seconds(situation)
        for one in rungs.promotable(rung):
            yield rung_segment(situation, one.state, rung + 1, one.reason, room)


def enter(situation: Situation) -> Answer:
    """Another trial, while its promotions and the full run still fit behind it; if nobody is left, even if no
    whole full run fits any more: one trial there must be."""
    refusal = None if _nobody_is_left(situation) else no_room(situation)
    if refusal:
        return refusal
    if not situation.candidates:
        return NeedCandidates(_wanted_candidates(situation)) if situation.may_ask else None
    state = situation.next_candidate
    rung = situation.entry_of(state)
    if rung == situation.entry:
        return rung_segment(situation, state, rung, f"new trial ({state.trial.origin})")
    reason = f"new trial ({state.trial.origin}, at rung {rung}: below it no promotion is expected)"
    return rung_segment(situation, state, rung, reason, full_run_seconds(situation))


def _wanted_candidates(situation: Situation) -> int:
    """As many as there are free workers, and no more than surely have the time to start."""
    if not situation.several:
        return 1
    room = situation.plan.max_trials - situation.rungs.started
    return max(1, int(min(situation.free, room, fitting_trials(situation))))


def start_full_run(situation: Situation) -> Answer:
    """The best finalist runs in full; the runner-up follows if it failed or if there is time, or beside it on
    another worker."""
    top, rungs = situation.plan.top_rung, situation.rungs
    if situation.history.running and not situation.several:
        return None
    if top == 0 and not situation.candidates and _wants_another(situation):
        return NeedCandidates(1)
    runner_up = has_full_run(situation)
    grading, known = grade_finalists(situation)
    if grading is not None or not known:
        return grading

    def start(state: TrialState) -> Answer:
        reason = "full run starts" if top == 0 or rungs.earned(state) else "runner-up starts"
        reason += rungs.preference(state)
        return full_run_link(situation, state, reason, runner_up=runner_up)

    return first(start(state) for state in rungs.finalists() if not state.running)


def _wants_another(situation: Situation) -> bool:
    """On a ladder of one rung: one more configuration may run in full."""
    history = situation.history
    waiting = (s for s in history.active.values() if not s.stuck and s.trial_id not in history.full_done)
    if any(not s.running for s in waiting):
        return False
    fits = full_run_seconds(situation) * PESSIMISM <= situation.left
    room = fits or not has_full_run(situation)
    return room and situation.may_ask and len(history.trials) < situation.plan.max_trials


# -------------------------------------------------------------------- when they apply


def always(situation: Situation) -> bool:
    """In every situation."""
    return True


def promotion_is_due(situation: Situation) -> bool:
    """A rung below the last one owes a promotion, and somebody there may go on."""
    below = range(situation.plan.top_rung - 1)
    return any(situation.rungs.due(rung) and situation.rungs.best(rung) for rung in below)


def full_run_is_due(situation: Situation) -> bool:
    """The last rung before the full run owes one, and it need not wait: another one fits behind it. The only
    one waits till the end, for more trials improve the choice."""
    rungs, last = situation.rungs, situation.plan.top_rung - 1
    return last >= 0 and rungs.due(last) and second_full_run_fits(situation) and bool(rungs.best(last))


def another_may_enter(situation: Situation) -> bool:
    """The ladder has rungs to compete at, and trials are left. A promotion that is due and has to wait (it
    does not fit, or its worker is taken) keeps its turn, and the last part belongs to the finalists."""
    plan = situation.plan
    if plan.top_rung == 0 or situation.rungs.started >= plan.max_trials:
        return False
    owed = promotion_is_due(situation) or full_run_is_due(situation)
    return _nobody_is_left(situation) or not (owed or _time_for_finalists(situation))


def no_full_run_is_owed(situation: Situation) -> bool:
    """Else the full run comes first, even the one that waited till the end."""
    return not situation.rungs.due(situation.plan.top_rung - 1)


def _nobody_is_left(situation: Situation) -> bool:
    """All that have run so far failed."""
    return not situation.rungs.anybody_at(0)


def _time_for_finalists(situation: Situation) -> bool:
    plan = situation.plan
    few_rungs = situation.entry > 0 or plan.top_rung == 1
    late = situation.left < FINALISTS_SHARE * plan.budget_seconds
    return few_rungs and late and situation.rungs.anybody_at(plan.top_rung - 1)
