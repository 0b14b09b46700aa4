"""The rules in situations made by hand: which of them decides, which may not, and what a refusal says."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from budgetsearch.core.decisions import Finish, NeedCandidates, Run, Wait
from budgetsearch.core.events import Asked
from budgetsearch.core.policy import decide as decide_module
from budgetsearch.core.policy.answers import Refusal, first
from budgetsearch.core.policy.decide import RULES, answer_of, decide
from budgetsearch.core.policy.rules import another_may_enter, full_run_is_due, promotion_is_due
from budgetsearch.core.policy.rungs import Rungs
from budgetsearch.core.policy.situation import Situation
from tests.support.factories import Story


def situation_of(story: Story, now: float | None = None) -> Situation:
    """What a rule looks at; now, or at that second of the run."""
    plan, history = story.history.plan, story.history
    assert plan is not None
    return Situation.of(plan, history, history.candidates, history.spent if now is None else now, 1)


def reason(situation: Situation) -> str:
    """Why what was decided runs."""
    answer = answer_of(situation)
    assert isinstance(answer, Run)
    return answer.reason


def trained(losses: list[float], **plan: Any) -> Story:
    """A story of so many trials with a loss at rung 0."""
    story = Story.planned(**plan)
    for loss in losses:
        story.train(story.trial(), loss)
    return story


def everything_at_once() -> Story:
    """A scout, promotions and a full run are due, a trial was interrupted, and a new one waits."""
    story = trained([1.0, 0.5, 0.6, 0.7, 0.8, 0.9], eta=2, scouts=1)
    for number in (1, 2):
        story.train(number, 0.4 + number / 100, rung=1)
    story.end(story.start(story.trial()), status="cancelled")
    story.add(Asked("promote", 5))
    story.trial()
    return story


def test_the_order_of_the_rules_is_the_order_of_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all of them could answer the first decides; without it the next one does, and so on."""
    due = [
        "rung 0 goes on",
        "asked for by hand: promotion",
        "scout",
        "promotion: place 3 of 7 at rung 0, 0.100 ahead of place 4",
        "full run starts",
    ]
    free = ["new trial", "promotion: place 1 of 1 at rung 0", "runner-up starts|full run starts"]
    # While somebody has earned more nobody enters, so the lower rules meet in a situation of their own.
    calm = trained([1.0])
    calm.trial()
    for story, first_row, reasons in ((everything_at_once(), 0, due), (calm, len(due), free)):
        for row, expected in enumerate(reasons, start=first_row):
            monkeypatch.setattr(decide_module, "RULES", RULES[row:])
            assert re.match(expected, reason(situation_of(story))), RULES[row].name
    assert len(RULES) == len(due) + len(free)


def test_nobody_enters_while_a_promotion_has_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A promotion that is due keeps its turn, whether or not it can run now."""
    situation = situation_of(everything_at_once())
    assert promotion_is_due(situation)
    assert not another_may_enter(situation)
    assert next(rule for rule in RULES if rule.name == "enter").answer(situation) is not None


def test_the_only_full_run_waits_and_one_of_two_does_not() -> None:
    """Early a second full run fits behind the first; in the last seconds before the reserve none does."""
    story = everything_at_once()
    plan = story.history.plan
    assert plan is not None
    times = (story.history.spent, plan.budget_seconds - plan.reserve_seconds - 4.0)
    assert [True, False] == [full_run_is_due(situation_of(story, now)) for now in times]


@pytest.mark.parametrize("eta", [2, 3, 5])
def test_a_whole_group_owes_a_promotion_and_every_group_has_a_place(eta: int) -> None:
    """Of n trials floor(n / eta) should go on, and the best ceil(n / eta) may."""
    story = Story.planned(eta=eta)
    assert story.history.plan is not None
    for number in range(1, 2 * eta + 2):
        story.train(story.trial(), 1.0 + number / 100)
        rungs = Rungs(story.history.plan, story.history)
        assert (number // eta, math.ceil(number / eta)) == (rungs.quota(0), len(rungs.best(0)))
        assert (number >= eta) == rungs.due(0)


@pytest.mark.parametrize("status", ["diverged", "out_of_memory", "running", "promoted"])
def test_who_cannot_go_on_is_never_promoted(status: str) -> None:
    """The best trial of the rung ended badly, runs, or has gone on: the promotion goes to the next."""
    story = trained([0.1, *([1.0] * 6)], eta=2)
    segment = story.start(0, rung=1)
    if status == "promoted":
        story.end(segment, 0.1)
    elif status != "running":
        story.end(segment, status=status)
    waiting = [state.trial_id for _, state in situation_of(story).rungs.waiting(0)]
    assert [1, 2, 3, 4, 5, 6] == waiting
    assert all(one.state.trial_id != 0 for one in situation_of(story).rungs.promotable(0))


def test_what_fits_in_no_memory_has_not_come_to_a_rung() -> None:
    """It has started; it does not count among those of which one goes on."""
    story = Story.planned()
    story.end(story.start(story.trial()), status="out_of_memory")
    rungs = situation_of(story).rungs
    assert (1, 0) == (rungs.started, rungs.entered(0))


def test_without_a_free_worker_nothing_starts() -> None:
    """While something runs the answer is to wait; when nothing does, the search is over."""
    story = trained([1.0])
    plan = story.history.plan
    assert plan is not None
    assert Finish("any") == decide(plan, story.history, [], 100.0, 0)
    story.start(story.trial())
    assert Wait() == decide(plan, story.history, [], 100.0, 0)


def test_the_end_says_how_many_seconds_are_missing() -> None:
    """What would run next, what it needs, and what is left before the reserve."""
    story = Story.planned()
    story.trial()
    plan, history = story.history.plan, story.history
    assert plan is not None
    late = plan.budget_seconds - plan.reserve_seconds - 10.5
    end = decide(plan, history, history.candidates, late, 1)
    assert isinstance(end, Finish)
    pattern = (
        r"no trial finished a segment: the next segment needs (\d+) s, 10 s are left before the reserve: "
    )
    found = re.fullmatch(pattern + r"(\d+) s are missing", end.reason)
    assert found is not None
    assert int(found[1]) == 10 + int(found[2])


def test_of_refusals_the_one_that_misses_least_is_told() -> None:
    """A decision comes before all of them, and nothing behind it is asked."""
    near, far = Refusal("near", 20.2, 15.9), Refusal("far", 60.0, -3.0)
    assert near == first([None, far, near])
    assert "near needs 21 s, 15 s are left before the reserve: 6 s are missing" == str(near)
    assert "far needs 60 s, 0 s are left before the reserve: 60 s are missing" == str(far)
    asked = iter([far, NeedCandidates(1), near])
    assert NeedCandidates(1) == first(asked)
    assert near == next(asked)
    assert first([]) is None
