"""Gangs: a segment takes along others that would run after it anyway, as many as its quantization carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from budgetsearch.core.decisions import NeedCandidates, Run
from budgetsearch.core.policy.answers import Answer
from budgetsearch.core.policy.situation import Situation
from budgetsearch.core.records import Segment

LENGTH_RATIO = 2.0
"""Members may differ in length by this factor: the rest of the longest trains with fewer at its side."""
LEFT_SHARE = 0.25
"""A gang that may take more of what is left gets no further member: nothing is known, and no adapter stands
on disk, before it ends."""
LIMIT_FACTOR = 1.5
"""The watchdog stops a gang that takes so many times what its members are expected to take alone, one after
the other, or as long as its first member might alone."""


def gather(situation: Situation, lead: Run, rules: Callable[[Situation], Answer]) -> Run | NeedCandidates:
    """The lead with its companions, or the wish for another candidate that could be one.

    A companion is whatever the rules would run next if the members so far were running. The full run goes
    alone, for it wants all the time that is left, and so does what a crash took down before.
    """
    size = situation.gang_size(situation.plan.cost_class(lead.job.segments[0].params))
    run = lead
    while len(run.job.segments) < size and _sociable(situation, lead.job.segments[0]):
        after = situation.after(run)
        if after.now - situation.now > LEFT_SHARE * situation.left:
            break
        answer = rules(after)
        if isinstance(answer, Run) and _fits(situation, lead, answer):
            run = joined(situation, run, answer)
        elif _may_ask(situation, after, answer, size):
            return NeedCandidates(1)
        else:
            break
    return run


def joined(situation: Situation, run: Run, other: Run) -> Run:
    """Both in one job. Its limit is tighter than that of one alone: when a member hangs, all of them wait."""
    segments = _sharing(situation, run.job.segments + other.job.segments)
    expected = sum(map(situation.segment_seconds, segments))
    limit = max(run.job.limit_seconds, LIMIT_FACTOR * expected)
    job = replace(run.job, segments=segments, limit_seconds=min(situation.left, limit))
    return Run(job, run.reasons + other.reasons)


def _sharing(situation: Situation, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """The members with what the calibration found to fit of each, side by side."""
    sizes = situation.plan.gang_micro_batches.get(situation.plan.cost_class(segments[0].params), ())
    most = sizes[min(len(segments), len(sizes)) - 1] if sizes else segments[0].micro_batch
    return tuple(replace(s, micro_batch=min(s.micro_batch, most)) for s in segments)


def _fits(situation: Situation, lead: Run, other: Run) -> bool:
    one, two = lead.job.segments[0], other.job.segments[0]
    lengths = sorted(s.stop_tokens - s.start_tokens for s in (one, two))
    return (
        situation.plan.cost_class(one.params) == situation.plan.cost_class(two.params)
        and one.params.get("targets") == two.params.get("targets")  # members wear the same layers
        and lengths[1] <= LENGTH_RATIO * lengths[0]
        and _sociable(situation, two)
    )


def _sociable(situation: Situation, segment: Segment) -> bool:
    """It may have company: not in the full run, nor to answer, and not after a crash or at a time limit."""
    state = situation.history.trials[segment.trial_id]
    return (
        not segment.answers
        and segment.rung < situation.plan.top_rung
        and not state.crashes
        and not state.timeouts
    )


def _may_ask(situation: Situation, after: Situation, answer: Answer, size: int) -> bool:
    """Another sample may bring a companion: a new trial is next, but none of its kind waits, and not
    a whole gang of others does."""
    if not situation.may_ask:
        return False
    if isinstance(answer, NeedCandidates):
        return True
    enters = isinstance(answer, Run) and answer.job.segments[0].trial_id in {
        state.trial_id for state in after.candidates
    }
    room = len(situation.history.trials) < situation.plan.max_trials
    return enters and room and len(after.candidates) < size
