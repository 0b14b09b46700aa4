"""The full run: a chain of segments, planned anew at each link, that ends where the time left allows."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

from budgetsearch.core.decisions import Run
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.landing import MARGIN, STEPS_KEPT
from budgetsearch.core.policy.answers import Answer, Refusal
from budgetsearch.core.policy.costs import PESSIMISM
from budgetsearch.core.policy.metric_plan import FINALISTS_GRADED, GRADE_SHARE
from budgetsearch.core.policy.planning import FULL_EVAL_SHARE
from budgetsearch.core.policy.situation import LIMIT_FACTOR, LIMIT_SECONDS, Situation, segment_to
from budgetsearch.core.records import Landing, Schedule, Segment
from budgetsearch.core.schedule import cooled, ending_at, full_schedule

LINK_PATIENCE = 1.5
"""A link that is not the last one ends itself, and the rest is planned anew, where it takes so many times as
long as foreseen."""


def full_run_link(
    situation: Situation, state: TrialState, reason: str, *, runner_up: bool = False
) -> Run | Refusal | None:
    """The next link of the full run's chain, ending where the time that is left allows.

    A runner-up that is cut short must still get a good part of its way, for it cools down there; so must
    whoever lost its checkpoints: else the time is better spent on a trial that still has its own.
    """
    restarts = state.lost and not state.tokens
    if (runner_up or restarts) and (refusal := _cut_short(situation, state)):
        return refusal
    end = _full_run_end(situation, state)
    if end - state.tokens < situation.plan.step_of(state.trial.params):
        return _last_evaluation(situation, state) or _time_refusal(situation, state)
    segment = _link(situation, state, end)
    before = state.full_stop_tokens
    moved = f" (the end moves from {before})" if before not in (None, end) else ""
    unit = "units" if situation.plan.free else "tokens"
    text = f"{reason}: {unit} {state.tokens} to {segment.stop_tokens} of {end}{moved}"
    assert segment.landing is not None
    # It ends itself in time; whoever does not hangs.
    return situation.run(segment, text, LIMIT_SECONDS + LINK_PATIENCE * segment.landing.seconds)


def _link(situation: Situation, state: TrialState, end: int) -> Segment:
    link = _link_tokens(situation, state)
    stop = end if state.tokens + 1.3 * link >= end else state.tokens + link
    segment = segment_to(situation, state, situation.plan.top_rung, stop, _schedule(situation, state, end))
    due = stop - state.evaluated_tokens >= _evaluation_tokens(situation, state)
    segment = replace(segment, evaluate=stop >= end or due or state.best_loss is None)
    if segment.evaluate and (stop >= end or _grading_is_due(situation, state, stop)):
        segment = replace(segment, answers=situation.plan.metric_answers)
    return replace(segment, landing=_landing(situation, state, segment))


def _schedule(situation: Situation, state: TrialState, end: int) -> Schedule:
    """To a new end, from where the trial stands."""
    before = _planned(situation, state, end)
    return ending_at(before, state.tokens, end) if state.tokens < end else before


def _planned(situation: Situation, state: TrialState, end: int) -> Schedule:
    """The schedule that the full run follows so far: the trunk until ``end``, if it has not begun."""
    params = situation.plan.knobs(state.trial.params)
    planned = end if state.full_stop_tokens is None else state.full_stop_tokens
    return full_schedule(params, state.trial.warmup_tokens, planned, state.full_cooldown_tokens)


def _landing(situation: Situation, state: TrialState, segment: Segment) -> Landing:
    """By when the link must be done: the last one when the time is up, another when it takes far too long."""
    costs, params = situation.costs, segment.params
    overhead = costs.overhead_seconds(params, evaluated=segment.evaluate, pessimistic=True)
    overhead += costs.grading_seconds(params, segment.answers, pessimistic=True)
    seconds, token = situation.left, costs.train_seconds(params, 1.0)
    if segment.stop_tokens < segment.schedule.stop_tokens:
        train = LINK_PATIENCE * token * (segment.stop_tokens - segment.start_tokens)
        seconds = min(seconds, situation.load_seconds(state) + train + LINK_PATIENCE * overhead)
    write = costs.overhead_seconds(params, evaluated=False)
    return Landing(seconds, 1.0 / token, overhead, min(write, overhead), _goal(situation, state))


def _last_evaluation(situation: Situation, state: TrialState) -> Run | Refusal | None:
    """Where no further link fits: measure the loss of what the last ones trained, if that still fits."""
    planned = state.full_stop_tokens
    if planned is None or state.tokens <= state.evaluated_tokens:
        return None
    needed = _last_seconds(situation, state, pessimistic=False) + situation.load_seconds(state)
    if needed > situation.left:
        return Refusal("the evaluation of the full run's last tokens", needed, situation.left)
    segment = segment_to(
        situation, state, situation.plan.top_rung, state.tokens, _planned(situation, state, planned)
    )
    segment = replace(segment, answers=situation.plan.metric_answers)
    return situation.run(segment, "full run goes on: its last tokens are evaluated", situation.left)


def _time_refusal(situation: Situation, state: TrialState) -> Refusal | None:
    """Not even one step of the full run fits; None where it is the data that end."""
    return _without(
        situation, state, "the next segment", math.ceil(situation.plan.step_of(state.trial.params))
    )


def _cut_short(situation: Situation, state: TrialState) -> Refusal | None:
    """A full run that began now would not get a good part of its way."""
    way = state.trial.rung_tokens[situation.plan.top_rung] - state.tokens
    return _without(situation, state, "a good part of another full run", math.ceil(way / situation.plan.eta))


def _without(situation: Situation, state: TrialState, what: str, tokens: int) -> Refusal | None:
    """Why so many further tokens do not fit; None if they do."""
    free, token = _token_seconds(situation, state)
    if int(free / token) >= tokens:
        return None
    return Refusal(what, situation.left - free + tokens * token, situation.left)


def _full_run_end(situation: Situation, state: TrialState) -> int:
    """The full run's last token, planned anew at each link: as far as it may go and the time that is left
    takes it."""
    return min(_goal(situation, state), _affordable_end(situation, state))


def _goal(situation: Situation, state: TrialState) -> int:
    """So far the full run may go: R where the runner-up fits behind it, else ``max_epochs``."""
    room_for_two = _runner_up_fits(situation, state)
    goal = state.trial.rung_tokens[situation.plan.top_rung] if room_for_two else state.trial.max_tokens
    if _cools(state):  # nobody gives up what it has cooled down for
        goal = max(goal, state.full_stop_tokens or 0)
    return goal


def _affordable_end(situation: Situation, state: TrialState) -> int:
    """The last token that fits into what is left, with a checkpoint at every link, if the machine is as fast
    as it was; the run itself lands earlier where it is not."""
    whole = situation.plan.whole  # nothing lands it, and what is not done in time leaves nothing
    free, token = _token_seconds(situation, state, pessimistic=whole)
    kept = math.ceil((STEPS_KEPT + 1.0) * situation.plan.step_of(state.trial.params))
    return situation.begin(state) + max(0, int(MARGIN * free / token) - kept)


def _token_seconds(
    situation: Situation, state: TrialState, *, pessimistic: bool = True
) -> tuple[float, float]:
    """Seconds left for the tokens of a full run, and what each of them may take."""
    last = _last_seconds(situation, state)
    token = _link_seconds(situation, state, pessimistic=pessimistic)
    return situation.left - situation.load_seconds(state) - last, token


def _cools(state: TrialState) -> bool:
    """The full run's cooldown has begun."""
    planned = state.full_stop_tokens
    if planned is None:
        return False
    return cooled(Schedule(0, planned, state.full_cooldown_tokens), state.tokens) > 0.0


def _runner_up_fits(situation: Situation, state: TrialState) -> bool:
    """Another finalist can run in full after this one."""
    if situation.plan.top_rung == 0:  # anyone could be next
        return _seconds_to_top(situation, state) + full_run_seconds(situation) * PESSIMISM <= situation.left
    others = [s for s in situation.rungs.finalists() if s is not state and not s.running]
    if not others:
        return False
    return _seconds_to_top(situation, state) + _seconds_to_top(situation, others[0]) <= situation.left


def _seconds_to_top(situation: Situation, state: TrialState) -> float:
    tokens = max(0, state.trial.rung_tokens[situation.plan.top_rung] - situation.begin(state))
    last = _last_seconds(situation, state)
    return tokens * _link_seconds(situation, state) + last


def _last_seconds(situation: Situation, state: TrialState, *, pessimistic: bool = True) -> float:
    """Seconds of the evaluation, the answers and the checkpoint at the end."""
    costs, params = situation.costs, state.trial.params
    seconds = costs.overhead_seconds(params, pessimistic=pessimistic)
    return seconds + costs.grading_seconds(params, pessimistic=pessimistic)


def has_full_run(situation: Situation) -> bool:
    """Somebody has run in full, or does so now on another worker."""
    history = situation.history
    done = any(history.trials[number].dead is None for number in history.full_done)
    return done or (situation.several and bool(history.full_trials))


def full_run_seconds(situation: Situation) -> float:
    """Expected seconds of the full run from the last rung before it."""
    ladder, costs = situation.plan.ladder, situation.costs
    training = ladder[-1] - (ladder[-2] if len(ladder) > 1 else 0.0)
    links = max(1.0, training / situation.plan.checkpoint_every_seconds)
    writes = statistics.fmean(costs.bare_overheads.values()) * (links - 1)
    evaluated = any(costs.overheads[n] > costs.bare_overheads[n] for n in costs.overheads)
    evaluations = FULL_EVAL_SHARE * training if evaluated else 0.0
    if situation.plan.metric_answers:
        answers = situation.plan.metric_answers * statistics.fmean(costs.answers.values())
        evaluations += GRADE_SHARE * training + (FINALISTS_GRADED + 1) * answers
    return (costs.typical_seconds(training) + writes + evaluations) * costs.margin


def _link_tokens(situation: Situation, state: TrialState) -> int:
    rate = situation.plan.reference_rates[situation.plan.cost_class(state.trial.params)]
    rate /= situation.costs.measured.pace(state.trial.params)
    step = math.ceil(situation.plan.step_of(state.trial.params))
    return max(step, int(situation.plan.checkpoint_every_seconds * rate))


def _link_seconds(situation: Situation, state: TrialState, *, pessimistic: bool = True) -> float:
    """Seconds of one token in a full run: training, its checkpoints and its evaluations."""
    params, costs = state.trial.params, situation.costs
    write = costs.overhead_seconds(params, evaluated=False, pessimistic=pessimistic)
    train = costs.train_seconds(params, 1.0, pessimistic=pessimistic)
    evaluations = 0.0
    if costs.evaluation_seconds(params):
        evaluations = FULL_EVAL_SHARE * costs.train_seconds(params, 1.0)
        evaluations *= PESSIMISM if pessimistic else 1.0
    if situation.plan.metric_answers:
        evaluations += GRADE_SHARE * costs.train_seconds(params, 1.0)
    return train + evaluations + write / _link_tokens(situation, state)


def _evaluation_tokens(situation: Situation, state: TrialState) -> float:
    """A full run's loss is measured so often that it takes a small share of the time."""
    params, costs = state.trial.params, situation.costs
    return costs.evaluation_seconds(params) / FULL_EVAL_SHARE / costs.train_seconds(params, 1.0)


def _grading_is_due(situation: Situation, state: TrialState, tokens: int) -> bool:
    """Answers on the way, too, take a small share of the time."""
    costs, params = situation.costs, state.trial.params
    way = (tokens - max(0, state.graded_tokens)) * costs.train_seconds(params, 1.0)
    return costs.grading_seconds(params) <= GRADE_SHARE * way


# ---------------------------------------------------------------------- which finalist it is


def grade_finalists(situation: Situation) -> tuple[Answer, bool]:
    """Of the finalists of the highest rung the first by their loss answer before one of them runs in full, as
    long as that leaves the time for the run; one after the other, or each on its worker.

    Returns the next of them, and whether a full run may start now.
    """
    asked = [s for s in _graded_first(situation) if s.graded_tokens < s.tokens]
    answer = next((_grading(situation, s) for s in asked if not s.running), None)
    return answer, not any(s.running and s.goal == s.rung for s in asked)


def _graded_first(situation: Situation) -> list[TrialState]:
    """The finalists between whom the metric decides: none where there is no choice."""
    if not situation.plan.metric_answers or situation.plan.top_rung == 0:
        return []
    first = situation.rungs.by_loss()
    same = [s for s in first if s.rung == first[0].rung][:FINALISTS_GRADED]
    return same if len(same) > 1 else []


def _grading(situation: Situation, state: TrialState) -> Run | None:
    """Answers of the checkpoint that the trial has; None where the full run behind them would not fit."""
    costs, params = situation.costs, state.trial.params
    seconds = costs.grading_seconds(params, pessimistic=True) + situation.load_seconds(state)
    if seconds + _seconds_to_top(situation, state) / situation.plan.eta > situation.left:
        return None
    schedule = Schedule(state.trial.warmup_tokens, state.tokens)
    segment = segment_to(situation, state, state.rung, state.tokens, schedule)
    segment = replace(segment, evaluate=False, answers=situation.plan.metric_answers)
    reason = f"finalist: {situation.plan.metric_answers} answers of it are graded"
    return situation.run(segment, reason, LIMIT_SECONDS + LIMIT_FACTOR * seconds)
