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
from typing import NamedTuple

from budgetsearch.core.decisions import Decision, Finish, NeedCandidates, Run, Wait
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy import rules
from budgetsearch.core.policy.answers import Answer, Refusal, first
from budgetsearch.core.policy.forecast import no_other_full_run
from budgetsearch.core.policy.gangs import gather
from budgetsearch.core.policy.situation import Situation

IN_VAIN = "so there is no adapter"
"""How the reason of a run ends that brought none."""


class Rule(NamedTuple):
    """One row: what it does is in ``answer``, when it may in ``applies``."""

    name: str
    answer: Callable[[Situation], Answer]
    applies: Callable[[Situation], bool]


RULES = (
    # name, what it does, when it applies
    Rule("go on", rules.go_on, rules.always),
    Rule("by hand", rules.by_hand, rules.always),
    Rule("scout", rules.scout, rules.always),
    Rule("promote", rules.promote, rules.promotion_is_due),
    Rule("promote to the full run", rules.start_full_run, rules.full_run_is_due),
    Rule("enter", rules.enter, rules.another_may_enter),
    Rule("promote the finalists", rules.promote_finalists, rules.no_full_run_is_owed),
    Rule("run finalists in full", rules.start_full_run, rules.always),
)
"""In order of precedence: the first that applies and has an answer decides."""


def decide(
    plan: Plan, history: History, candidates: Sequence[TrialState], now: float, free_slots: int
) -> Decision:
    """The next step. ``now`` is in active seconds of the run.

    ``Wait`` is returned only while something runs.
    """
    why: Refusal | None = None
    if free_slots > 0:
        situation = Situation.of(plan, history, candidates, now, free_slots)
        answer = answer_of(situation)
        if isinstance(answer, Run):
            return gather(situation, answer, answer_of)
        if isinstance(answer, NeedCandidates):
            return answer
        why = answer or no_other_full_run(situation)
    return Wait() if history.running else Finish(_why_finished(plan, history, why))


def answer_of(situation: Situation) -> Answer:
    """The answer of the first rule that applies and has one."""
    return first(rule.answer(situation) for rule in RULES if rule.applies(situation))


def _end(plan: Plan) -> str:
    return "the length that the recipe has" if plan.free else "the end of its data (--max-epochs)"


def _why_finished(plan: Plan, history: History, refusal: Refusal | None) -> str:
    why = "no trial finished a segment"
    if history.full_done:
        ended = [history.trials[number] for number in history.full_done]
        at_the_end = any(state.tokens >= state.trial.max_tokens for state in ended)
        why = "the full run is over" + (f", at {_end(plan)}" if at_the_end else "")
    elif history.incumbent is not None:
        why = "no further segment fits into the time that is left"
    elif history.trials and all(s.dead == "infeasible" for s in history.trials.values()):
        why = "nothing of the search space fits into memory"
    if len(history.trials) >= plan.max_trials:
        why += ", with no time for another" if plan.single else ", and --max-trials allows no further one"
    return f"{why}: {refusal}" if refusal else why
