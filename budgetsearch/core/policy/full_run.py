"""The full run: a chain of segments, planned anew at each link, that ends where the time left allows."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

from budgetsearch.core.decisions import Run
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.policy.costs import PESSIMISM
from budgetsearch.core.policy.planning import FULL_EVAL_SHARE
from budgetsearch.core.policy.rungs import finalists
from budgetsearch.core.policy.situation import View, segment_to
from budgetsearch.core.records import Schedule, cost_class

COOLDOWN_SHARE = 0.2
"""The last fifth of the full run cools down."""


def full_run_link(view: View, state: TrialState, reason: str) -> Run | None:
    """The next link of the full run's chain, ending where the time that is left allows."""
    end = _full_run_end(view, state)
    if end - state.tokens < view.plan.step_tokens:
        return _last_evaluation(view, state)
    schedule = Schedule(
        warmup_tokens=state.trial.warmup_tokens,
        stop_tokens=end,
        cooldown_tokens=_cooldown_tokens(state, end),
    )
    link = _link_tokens(view, state)
    stop = end if state.tokens + 1.3 * link >= end else state.tokens + link
    segment = segment_to(view, state, view.plan.top_rung, stop, schedule)
    due = stop - state.evaluated_tokens >= _evaluation_tokens(view, state)
    segment = replace(segment, evaluate=stop >= end or due or state.best_loss is None)
    before = state.full_stop_tokens
    moved = f" (the end moves from {before})" if before not in (None, end) else ""
    text = f"{reason}: tokens {state.tokens} to {stop} of {end}{moved}"
    return view.run(segment, text, view.left - _evaluation_room(view, state))


def _last_evaluation(view: View, state: TrialState) -> Run | None:
    """Where no further link fits: measure the loss of what the last ones trained, if that still fits."""
    planned = state.full_stop_tokens
    if planned is None or state.tokens <= state.evaluated_tokens:
        return None
    if view.costs.overhead_seconds(state.trial.params) + view.load_seconds(state) > view.left:
        return None
    schedule = Schedule(state.trial.warmup_tokens, planned, _cooldown_tokens(state, planned))
    segment = segment_to(view, state, view.plan.top_rung, state.tokens, schedule)
    return view.run(segment, "full run goes on: its last tokens are evaluated", view.left)


def _full_run_end(view: View, state: TrialState) -> int:
    """The full run's last token, re-planned at each link: R where the runner-up fits behind it, else
    all the time that is left, ``max_epochs`` at most.
    """
    room_for_two = _runner_up_fits(view, state)
    goal = state.trial.rung_tokens[view.plan.top_rung] if room_for_two else state.trial.max_tokens
    if _cools(state):  # nobody gives up what it has cooled down for
        goal = max(goal, state.full_stop_tokens or 0)
    return min(goal, _affordable_end(view, state))


def _affordable_end(view: View, state: TrialState) -> int:
    """The last token that surely fits into what is left, with a checkpoint at every link."""
    params = state.trial.params
    last = view.costs.overhead_seconds(params, pessimistic=True) + _evaluation_room(view, state)
    return state.tokens + int((view.left - view.load_seconds(state) - last) / _link_seconds(view, state))


def _cools(state: TrialState) -> bool:
    """Whether the full run's cooldown has begun."""
    planned = state.full_stop_tokens
    return planned is not None and state.tokens > planned - state.full_cooldown_tokens


def _cooldown_tokens(state: TrialState, end: int) -> int:
    """The last fifth of the full run; one that has begun keeps its beginning, wherever the end moves."""
    if _cools(state) and state.full_stop_tokens is not None:
        return max(1, end - (state.full_stop_tokens - state.full_cooldown_tokens))
    return max(1, int(COOLDOWN_SHARE * end))


def _runner_up_fits(view: View, state: TrialState) -> bool:
    """Whether another finalist can run in full after this one."""
    if view.plan.top_rung == 0:  # anyone could be next
        return _seconds_to_top(view, state) + full_run_seconds(view) * PESSIMISM <= view.left
    others = [s for s in finalists(view) if s is not state and not s.running]
    if not others:
        return False
    return _seconds_to_top(view, state) + _seconds_to_top(view, others[0]) <= view.left


def _seconds_to_top(view: View, state: TrialState) -> float:
    tokens = max(0, state.trial.rung_tokens[view.plan.top_rung] - state.tokens)
    last = view.costs.overhead_seconds(state.trial.params, pessimistic=True)
    return tokens * _link_seconds(view, state) + last


def gets_far_enough(view: View, state: TrialState) -> bool:
    """A runner-up whose time is cut short must still get a good part of the way: it cools down there."""
    way = state.trial.rung_tokens[view.plan.top_rung] - state.tokens
    return _affordable_end(view, state) - state.tokens >= way / view.plan.eta


def worth_a_restart(view: View, state: TrialState) -> bool:
    """Whoever lost its checkpoints trains in full from its beginning only if that gets a good part of the
    way: else its time is better spent on a trial that still has its own.
    """
    return bool(state.tokens) or not state.lost or gets_far_enough(view, state)


def has_full_run(view: View) -> bool:
    """Whether somebody has run in full, or does so now on another worker."""
    return _has_whole_full_run(view) or (view.several and bool(view.history.full_trials))


def _has_whole_full_run(view: View) -> bool:
    return any(view.history.trials[i].dead is None for i in view.history.full_done)


def full_run_seconds(view: View) -> float:
    """Expected seconds of the full run from the last rung before it."""
    ladder = view.plan.ladder
    training = ladder[-1] - (ladder[-2] if len(ladder) > 1 else 0.0)
    links = max(1.0, training / view.plan.checkpoint_every_seconds)
    writes = statistics.fmean(view.costs.bare_overheads.values()) * (links - 1)
    evaluated = any(view.costs.overheads[n] > view.costs.bare_overheads[n] for n in view.costs.overheads)
    evaluations = FULL_EVAL_SHARE * training if evaluated else 0.0
    return (view.costs.typical_seconds(training) + writes + evaluations) * view.costs.margin


def _link_tokens(view: View, state: TrialState) -> int:
    rate = view.plan.reference_rates[cost_class(state.trial.params)]
    return max(math.ceil(view.plan.step_tokens), int(view.plan.checkpoint_every_seconds * rate))


def _link_seconds(view: View, state: TrialState) -> float:
    """Pessimistic seconds of one token in a full run: training, its checkpoints and its evaluations."""
    params = state.trial.params
    write = view.costs.overhead_seconds(params, evaluated=False, pessimistic=True)
    train = view.costs.train_seconds(params, 1.0, pessimistic=True)
    evaluations = 0.0
    if view.costs.evaluation_seconds(params):
        evaluations = PESSIMISM * FULL_EVAL_SHARE * view.costs.train_seconds(params, 1.0)
    return train + evaluations + write / _link_tokens(view, state)


def _evaluation_room(view: View, state: TrialState) -> float:
    """What a link that is stopped at its limit leaves, so that what it trained can still be evaluated."""
    params = state.trial.params
    steps = view.costs.train_seconds(params, 2 * view.plan.step_tokens, pessimistic=True)
    return view.costs.overhead_seconds(params, pessimistic=True) + steps


def _evaluation_tokens(view: View, state: TrialState) -> float:
    """A full run's loss is measured so often that it takes a small share of the time."""
    params = state.trial.params
    return view.costs.evaluation_seconds(params) / FULL_EVAL_SHARE / view.costs.train_seconds(params, 1.0)
