"""A trial of which no promotion is expected at the first rungs begins at a higher one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from budgetsearch.core.decisions import Run
from budgetsearch.core.events import TrialAdded
from budgetsearch.core.policy.answers import Answer, Refusal
from budgetsearch.core.policy.decide import decide
from budgetsearch.core.policy.jobs import new_trial
from budgetsearch.core.policy.rules import enter
from budgetsearch.core.policy.rungs import Rungs
from budgetsearch.core.policy.situation import Situation
from budgetsearch.core.ports import Proposal
from tests.support.factories import Story, params

LADDER = (10.0, 30.0, 90.0, 200.0)


def add(story: Story, entry: int) -> int:
    """A trial that enters at a rung."""
    number, plan = len(story.history.trials), story.history.plan
    assert plan is not None
    story.add(TrialAdded(new_trial(plan, number, Proposal(params(), "model", entry=entry))))
    return number


def rungs_of(story: Story) -> Rungs:
    """As they stand."""
    assert story.history.plan is not None
    return Rungs(story.history.plan, story.history)


def begun(story: Story, number: int) -> Run:
    """What is decided while the trial waits, nothing else being due."""
    history = story.history
    assert history.plan is not None
    found = decide(history.plan, history, [history.trials[number]], history.spent, 1)
    assert isinstance(found, Run)
    return found


def test_it_trains_to_its_rung_at_once_and_the_reason_says_why() -> None:
    """The first trials show what a rung says; nobody begins with the full run."""
    story = Story.planned(ladder=LADDER)
    for _ in range(3):
        story.train(story.trial(), 1.0)
    usual, higher, highest = add(story, 0), add(story, 1), add(story, 9)
    for number, rung in ((usual, 0), (higher, 1), (highest, 2)):
        run = begun(story, number)
        (segment,) = run.job.segments
        assert (segment.trial_id, segment.rung) == (number, rung)
        assert segment.stop_tokens == story.history.trials[number].trial.rung_tokens[rung]
        assert ("no promotion is expected" in run.reasons[0]) == (rung > 0)


def test_it_waits_where_the_full_run_would_not_fit_behind_it() -> None:
    """As a promotion would: near the end the finalists go on instead."""
    story = Story.planned(ladder=LADDER)
    for _ in range(3):
        story.train(story.trial(), 1.0)
    number, history = add(story, 2), story.history
    assert history.plan is not None
    state = history.trials[number]

    def answer(left: float) -> Answer:
        now = 720.0 - 60.0 - left
        return enter(Situation.of(history.plan, history, [state], now, 1))  # type: ignore[arg-type]

    assert isinstance(answer(60.0), Run), "segments took a tenth of what was foreseen"
    late = answer(20.0)
    assert isinstance(late, Refusal)
    assert "with a full run behind it" in late.what


@pytest.mark.parametrize("retired", [False, True])
def test_it_owes_nobody_a_promotion_and_is_owed_none_below(retired: bool) -> None:
    """It competes where it was, and counts for no rung that it left out; whether it still runs or not."""
    story = Story.planned(ladder=LADDER, eta=2)
    for loss in (1.0, 2.0, 3.0, 4.0):
        story.train(story.trial(), loss)
    number = add(story, 1)
    story.end(story.start(number, 1), 9.0)
    if retired:
        state = story.history.active.pop(number)
        story.history.retired.add(replace(state, dead="dropped"))
    rungs = rungs_of(story)
    assert (rungs.entered(0), rungs.competed(0), rungs.quota(0)) == (4, 4, 2)
    assert (rungs.entered(1), rungs.sent(1), rungs.due(0)) == (1, 0, True)
    story.train(0, 0.5, 1)
    story.train(1, 0.6, 1)
    rungs = rungs_of(story)
    assert (rungs.entered(1), rungs.sent(1), rungs.due(0)) == (3, 2, False)
    assert (rungs.quota(1), rungs.due(1)) == (1, True), "three have come there, whatever way"


def test_of_those_that_wait_whoever_enters_lowest_begins() -> None:
    """A gang of short segments is not held up by a long one."""
    story = Story.planned(ladder=LADDER)
    for _ in range(3):
        story.train(story.trial(), 1.0)
    first, second = add(story, 2), add(story, 0)
    waiting = [story.history.trials[first], story.history.trials[second]]
    assert story.history.plan is not None
    found = decide(story.history.plan, story.history, waiting, story.history.spent, 1)
    assert isinstance(found, Run)
    assert found.job.segments[0].trial_id == second
