"""Scouts go to the second rung whatever their loss; that takes nobody's promotion away."""

from __future__ import annotations

from budgetsearch.core.policy.rungs import Rungs
from tests.support.factories import Story


def test_a_scout_that_would_not_have_been_promoted_owes_nobody_a_promotion() -> None:
    """The best of those that come later goes on as soon as its group is whole."""
    story = Story.planned(scouts=4, eta=4)
    for loss in (1.0, 2.0, 3.0, 4.0):
        story.end(story.start(story.trial()), loss)
    for scout in range(4):
        story.end(story.start(scout, 1), 1.0 + scout)
    assert story.history.plan is not None
    rungs = Rungs(story.history.plan, story.history)
    assert (rungs.entered(1), rungs.sent(1), rungs.due(0)) == (4, 1, False), "the best had its promotion"
    for loss in (0.5, 5.0, 5.1, 5.2):
        story.end(story.start(story.trial()), loss)
    rungs = Rungs(story.history.plan, story.history)
    assert (rungs.quota(0), rungs.sent(1), rungs.due(0)) == (2, 1, True)
    assert rungs.promotable(0)[0].state.trial_id == 4
    story.start(4, 1)
    rungs = Rungs(story.history.plan, story.history)
    assert (rungs.sent(1), rungs.due(0)) == (2, False)


def test_a_scout_that_went_on_further_counts_wherever_it_stands_now() -> None:
    """It was promoted from the second rung, so it was no stray."""
    story = Story.planned(scouts=4, eta=4)
    for loss in (1.0, 2.0, 3.0, 4.0):
        story.end(story.start(story.trial()), loss)
    for scout, loss in enumerate((4.0, 3.0, 2.0, 1.0)):
        story.end(story.start(scout, 1), loss)
    story.start(3, 2)
    assert story.history.plan is not None
    assert Rungs(story.history.plan, story.history).sent(1) == 2
