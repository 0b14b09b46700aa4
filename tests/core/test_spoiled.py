"""Who runs in full: not one that the last training made worse, however far it came."""

from __future__ import annotations

from typing import Any

from budgetsearch.core.policy.evidence import clearly_worse
from budgetsearch.core.policy.rungs import Rungs
from tests.support.factories import Story

LOSSES = tuple(0.1 * (k % 7) for k in range(32))


def order(later: float, noise: float = 0.0, *, examples: bool = True) -> list[int]:
    """Finalists where trial 0 came from 1.0 at rung 0 to ``later`` at rung 1; trial 1 has 1.2 at rung 0."""
    story = Story.planned()

    def train(trial: int, loss: float, rung: int, sign: float) -> None:
        some = tuple(loss + one + sign * noise * (k % 2 - 0.5) for k, one in enumerate(LOSSES))
        more: dict[str, Any] = {"example_losses": some} if examples else {}
        story.end(story.start(trial, rung), loss, **more)

    for number, loss in enumerate((1.0, 1.2)):
        train(story.trial(), loss, 0, -1.0 if number else 1.0)
    train(0, later, 1, -1.0)
    assert story.history.plan is not None
    return [state.trial.trial_id for state in Rungs(story.history.plan, story.history).finalists()]


def test_who_came_furthest_runs_in_full_unless_that_made_it_worse() -> None:
    """An overfitted trial: more of the same would not help it."""
    assert [0, 1] == order(0.9)
    assert [1, 0] == order(1.1), "although it is still better than the other"
    assert [0, 1] == order(1.0), "equal is not worse"


def test_noise_gives_nobody_the_place() -> None:
    """Two standard errors of the same examples must lie between them."""
    assert [0, 1] == order(1.02, noise=0.5)
    assert not clearly_worse([1.0, 2.0] * 8, [1.1, 1.9] * 8)
    assert clearly_worse([1.0, 2.0] * 8, [1.1, 2.1] * 8)


def test_without_losses_by_example_nobody_can_tell() -> None:
    """A rung's loss is one number then, and its noise is unknown."""
    assert [0, 1] == order(1.4, examples=False)
    assert not clearly_worse([1.0], [1.1])
