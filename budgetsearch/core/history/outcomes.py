"""What a segment's end means for its trial, and for others that it teaches about memory.

Parts of the fold: what they change is the history that they are given.
"""

from __future__ import annotations

import math
import statistics
from bisect import insort
from collections.abc import Iterable
from dataclasses import replace

from budgetsearch.core.bases import cost_class
from budgetsearch.core.events import SegmentEnded
from budgetsearch.core.history.history import History
from budgetsearch.core.history.retention import forget_after, lose
from budgetsearch.core.history.trial import (
    Checkpoint,
    TrialState,
    best_of,
    settle,
    turned_worse,
    with_checkpoint,
)
from budgetsearch.core.metric import Values
from budgetsearch.core.records import Segment, SegmentResult
from budgetsearch.core.resources.memory import problem, taught

BEYOND_NOISE = 2.0
"""Standard errors by which a training loss must have fallen."""
MAX_CRASHES = 1
"""A segment whose worker died is issued again so often, then its trial is given up."""
MAX_TIMEOUTS = 1
"""A trial that its watchdog stopped goes on so often, then it is given up."""
MAX_STRANDED = 3
"""Where a trial lost so many workers in a row, it is what takes them down."""


def segment_ended(history: History, event: SegmentEnded) -> None:
    """A segment has ended.

    Raises:
        KeyError: its job, its trial or its status is not known here.
    """
    result = event.result
    segment = _take_running(history, event.job_id, result.trial_id)
    history.results.append((segment, result))
    history.result_jobs.append(event.job_id)
    if history.measured is not None:
        history.measured.add(segment, result)
    state = history.trials[result.trial_id]
    result = comparable(state, result)
    if result.revisions:  # it ended where its own clock let it
        segment = segment.flown(result.revisions)
        state.full_stop_tokens = segment.schedule.stop_tokens
        state.full_cooldown_tokens = segment.schedule.cooldown_tokens
    state.running = False
    state.ended_wall = history.wall
    state.seconds += sum(result.seconds.values())
    state.peak_bytes = max(state.peak_bytes, result.peak_bytes)
    state.steps += result.steps
    # Whoever made room for other processes may have it back next time.
    micro = segment.micro_batch if result.micro_batch is None else result.micro_batch
    if micro < segment.micro_batch and not result.yielded:  # one of a gang may begin with less than its own
        state.micro_batch = min(state.micro_batch, micro)
        _note_shrunk(history, segment, micro)
    size = result.began or history.job_sizes[event.job_id]
    if not result.yielded:
        _note_gang(history, segment, result, size)
    alone = size == 1
    if event.job_id not in history.running:
        del history.job_sizes[event.job_id], history.running_since[event.job_id]
    state.unread = state.unread + 1 if result.status == "unread" else 0
    again = result.status == "cancelled" or result.status in BLAMELESS
    if segment.answers and not again:
        state.graded_tokens = result.tokens  # whatever came of it
    if not segment.only_grades or again or result.status == "ok":  # else its trial is what it was
        OUTCOMES[result.status](history, state, segment, result, alone)
    _note_end_of_full_run(history, state, segment, result)
    _note_disk(history, event.job_id, segment, result)
    forget_after(history, state)


def _note_disk(history: History, job_id: int, segment: Segment, result: SegmentResult) -> None:
    if history.unwritten and result.checkpoint_out not in (None, segment.checkpoint_in):
        history.unwritten.clear()
        history.ahead = None
    if result.status == "unwritten":
        history.unwritten.add(job_id)


def _note_shrunk(history: History, segment: Segment, micro_batch: int) -> None:
    """Memory ran out on the way: whoever needs as much starts smaller."""
    history.shrunk.append((segment.params, micro_batch))
    for state in history.trials.values():
        state.micro_batch = taught(history.shrunk, state.trial.params, state.micro_batch, history.free)


def _note_gang(history: History, segment: Segment, result: SegmentResult, size: int) -> None:
    """Memory ran out with so many: in training the worker found what fits, else it is at most half."""
    whole = result.status == "out_of_memory" and result.micro_batch is None
    fits = max(1, size // 2) if whole else result.gang
    if fits < size and (whole or result.status == "ok"):
        name = cost_class(segment.params, history.free)
        history.gang_limits[name] = min(fits, history.gang_limits.get(name, fits))


def _take_running(history: History, job_id: int, trial_id: int) -> Segment:
    segments = history.running[job_id]
    segment = next((s for s in segments if s.trial_id == trial_id), None)
    if segment is None:
        raise KeyError(f"trial {trial_id} in job {job_id}")
    segments.remove(segment)
    if not segments:
        del history.running[job_id]
    return segment


def _advance(history: History, state: TrialState, segment: Segment, result: SegmentResult) -> None:
    """A checkpoint was written: take it, and its loss where there is one."""
    if not result.checkpoint_out:
        return
    state.tokens, state.checkpoint = result.tokens, result.checkpoint_out
    loss = result.loss
    merits, is_final = _merits(history, segment, result)
    new = Checkpoint(result.checkpoint_out, result.tokens, loss, 0, 0, merits, is_final)
    if loss is not None:
        state.evaluated_tokens = result.tokens
        if history.plan is not None and segment.rung == history.plan.top_rung:
            state.full_losses.append(loss)
            state.full_examples.append(result.example_losses)
            state.full_marks.append(result.tokens)
        _take_best(state, result, new)
    elif (loss := judged_loss(state, segment, result)) is not None:
        new = replace(new, loss=loss)
        _take_best(state, result, new)
        state.judged = True
    new = replace(new, evaluated_tokens=state.evaluated_tokens, full_losses=len(state.full_losses))
    history.holders.add(state.trial_id)
    state.held = with_checkpoint(state.held, new)
    if segment.only_grades or (state.judged and result.loss is not None):  # now it is known
        state.judged = state.judged and segment.only_grades
        settle(state)


def _merits(history: History, segment: Segment, result: SegmentResult) -> tuple[Values, bool]:
    """What the metric says of a checkpoint, and whether it was to say anything."""
    metric = history.plan.metric if history.plan else None
    return metric.merits(result.metric) if metric else (), segment.answers > 0


def _take_best(state: TrialState, result: SegmentResult, new: Checkpoint) -> None:
    if state.best_loss is not None:
        old = Checkpoint("", state.best_tokens, state.best_loss, 0, 0, state.merits, state.is_final)
        if best_of((new, old)) is old:
            return
    state.best_loss, state.best_checkpoint, state.best_tokens = new.loss, new.name, new.tokens
    state.best_examples, state.merits, state.is_final = result.example_losses, new.merits, new.is_final
    if result.train_loss is not None:
        state.best_train = result.train_loss, result.train_noise


def comparable(state: TrialState, result: SegmentResult) -> SegmentResult:
    """The result with a loss that can be held against the trial's best: one on fewer examples, for the time
    had ended, is corrected by what these examples differ from all."""
    some, best = result.example_losses, state.best_examples
    if result.loss is None or state.best_loss is None or not 0 < len(some) < len(best):
        return result
    apart = statistics.fmean(new - old for new, old in zip(some, best, strict=False))
    return replace(result, loss=state.best_loss + apart)


def judged_loss(state: TrialState, segment: Segment, result: SegmentResult) -> float | None:
    """What the loss of a full run that was stopped may be, if its training loss has fallen beyond noise since
    the trial's best checkpoint; else None."""
    stopped = segment.landing is not None and result.status == "timeout"
    if not stopped or result.train_loss is None or state.best_train is None or state.best_loss is None:
        return None
    before, noise = state.best_train
    apart = result.train_loss - before
    if apart >= -BEYOND_NOISE * math.hypot(noise, result.train_noise):
        return None
    return max(0.0, state.best_loss + apart)


def _ended_ok(
    history: History, state: TrialState, segment: Segment, result: SegmentResult, alone: bool
) -> None:
    _advance(history, state, segment, result)
    state.crashes = state.stranded = 0
    if result.tokens < segment.goal_tokens:
        return
    state.rung = max(state.rung, segment.rung)
    if result.loss is not None:
        _rank(history, state, segment.rung, result.loss)
        state.example_losses[segment.rung] = result.example_losses


def _rank(history: History, state: TrialState, rung: int, loss: float) -> None:
    ranked = history.ranks.setdefault(rung, [])
    if rung in state.losses:
        ranked.remove((state.losses[rung], state.trial_id))
    insort(ranked, (loss, state.trial_id))
    state.losses[rung] = loss
    if state.goal > rung and rung not in history.passed:
        history.passed.add(rung)
        history.ahead = None


def _ended_early(
    history: History, state: TrialState, segment: Segment, result: SegmentResult, alone: bool
) -> None:
    _advance(history, state, segment, result)
    if result.status == "timeout":
        # One that got somewhere goes on once, with a limit from what was learned; others hang.
        state.timeouts += 1
        # In a gang any member may be the one that hangs: each goes on alone once.
        if state.timeouts > MAX_TIMEOUTS or (alone and result.tokens <= segment.start_tokens):
            state.dead = "timeout"


def _ended_diverged(
    history: History, state: TrialState, segment: Segment, result: SegmentResult, alone: bool
) -> None:
    state.dead = "diverged"


def _ended_out_of_memory(
    history: History, state: TrialState, segment: Segment, result: SegmentResult, alone: bool
) -> None:
    """In training the worker shrinks what it can by itself; elsewhere a gang did not fit, or a base."""
    if is_infeasible(segment, result):
        state.dead = "infeasible"
        history.refused.append(state.trial.params)
        rule_out_infeasible(history, history.candidates)
    elif alone:
        state.micro_batch = max(1, segment.micro_batch // 2)


def _ended_crashed(
    history: History, state: TrialState, segment: Segment, result: SegmentResult, alone: bool
) -> None:
    state.crashes += 1
    if state.crashes > MAX_CRASHES:
        state.dead = "crashed"


def _stranded(
    history: History, state: TrialState, segment: Segment, result: SegmentResult, alone: bool
) -> None:
    """Where there is only one worker, the engine itself gives up in time."""
    if history.plan is None or history.plan.workers == 1:
        return
    state.stranded += 1
    state.moves += 1
    if state.stranded >= MAX_STRANDED:
        state.dead = state.dead or "crashed"


def _lost(history: History, state: TrialState, segment: Segment, result: SegmentResult, alone: bool) -> None:
    lose(history, str(segment.checkpoint_in), result.detail)


def _blameless(
    history: History, state: TrialState, segment: Segment, result: SegmentResult, alone: bool
) -> None:
    """The trial stands where it stood."""


def _note_end_of_full_run(
    history: History, state: TrialState, segment: Segment, result: SegmentResult
) -> None:
    if state.trial_id not in history.full_trials:
        return
    finished = state.full_stop_tokens is not None and state.tokens >= state.full_stop_tokens
    if state.dead or finished or turned_worse(state):
        history.full_trials.remove(state.trial_id)
        history.full_done.append(state.trial_id)


OUTCOMES = {
    "ok": _ended_ok,
    "timeout": _ended_early,
    "cancelled": _ended_early,
    "diverged": _ended_diverged,
    "out_of_memory": _ended_out_of_memory,
    "crashed": _ended_crashed,
    "lost": _lost,
    "unread": _blameless,
    "unwritten": _blameless,
    "stranded": _stranded,
}
BLAMELESS = frozenset({"lost", "unread", "unwritten", "stranded"})
"""Ends that are nobody's fault: the trial is issued again from the checkpoint that it has."""


def rule_out_infeasible(history: History, candidates: Iterable[TrialState]) -> None:
    """What cannot fit never starts."""
    for state in candidates:
        if history.plan is not None and problem(history.plan, history.refused, state.trial.params):
            state.dead = "infeasible"
            history.ahead = None


def is_infeasible(segment: Segment, result: SegmentResult) -> bool:
    """Whether one sample of one trial alone did not fit into memory."""
    if result.status != "out_of_memory":
        return False
    if result.micro_batch is not None:  # the worker tried everything smaller
        return result.micro_batch <= 1
    return result.gang == 1 and segment.micro_batch <= 1
