"""The final scores belong to one checkpoint: after stops and resumes they are whole and of the best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from budgetsearch.core.events import Resumed, Scored
from budgetsearch.core.history.fold import apply, fold
from budgetsearch.core.history.history import History
from budgetsearch.core.records import Score, ScoreJob, SegmentResult
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.run.driver import Driver
from budgetsearch.run.jobs import limit_of
from budgetsearch.storage.ledger import read_entries
from tests.support.simulation import make_driver
from tests.support.worlds import SyntheticWorld


def scored(path: Path) -> list[Scored]:
    """All scores of a ledger, in order."""
    return [entry.event for entry in read_entries(path) if isinstance(entry.event, Scored)]


def run(driver: Driver) -> History:
    """To its end."""
    history = driver.run()
    driver.ledger.close()
    return history


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The ledger of a run that was stopped while answers were generated: it has the losses."""
    path = tmp_path / "ledger.sqlite"
    driver = make_driver(path)

    def stop() -> str:
        flying = [running.job for running in driver._in_flight.under_way.values()]
        return "SIGTERM" if any(isinstance(job, ScoreJob) and job.task_examples for job in flying) else ""

    driver.stop_requested = stop
    history = run(driver)
    assert history.score is not None
    assert history.score.base_accuracy is None
    return path


def test_what_is_missing_of_the_scores_is_measured_after_a_resume(stopped: Path) -> None:
    """The answers; the losses are those of before."""
    history = run(make_driver(stopped, clock=VirtualClock(fold(read_entries(stopped)).spent + 1.0)))
    assert history.score is not None
    assert (3.0, 0.5) == (history.score.base_loss, history.score.adapter_accuracy)
    assert [3.0, None] == [event.score.base_loss for event in scored(stopped)]


class Better(SyntheticWorld):
    """Whatever is trained here ends with a lower loss than anything before."""

    def _train(self, segment: object, examples: int) -> SegmentResult:
        found = super()._train(segment, examples)  # type: ignore[arg-type]
        return replace(found, loss=found.loss / 100) if found.loss else found


def test_another_best_checkpoint_is_scored_anew(stopped: Path) -> None:
    """A later deadline, and a better adapter in it: the older score is not shown for it."""
    before = fold(read_entries(stopped))
    assert before.incumbent is not None
    clock = VirtualClock(before.spent + 1.0)
    history = run(make_driver(stopped, Better(), budget=1440.0, clock=clock))
    best = history.incumbent
    assert best is not None
    assert best.best_checkpoint != before.incumbent.best_checkpoint
    events = scored(stopped)
    assert [before.incumbent.best_checkpoint, *2 * [best.best_checkpoint]] == [e.checkpoint for e in events]
    assert [before.incumbent.trial_id, *2 * [best.trial_id]] == [e.trial_id for e in events]
    assert history.score is not None
    assert history.score.task_examples
    middle = list(read_entries(stopped))
    resumed = next(n for n, entry in enumerate(middle) if isinstance(entry.event, Resumed))
    states = list(folded(middle, resumed))
    assert any(score is None for score in states), "a stale score was shown"


def test_the_limit_of_a_score_keeps_time_for_a_kill() -> None:
    """The patience where there is enough, a third where there is not, and nothing of nothing."""
    assert 8.0 == limit_of(10.0, 2.0)
    assert 1.0 == pytest.approx(limit_of(1.5, 2.0))
    assert limit_of(-0.5, 2.0) < 0


def folded(entries: list, start: int) -> Iterator[Score | None]:  # type: ignore[type-arg]
    """The score after each entry from there on."""
    history = fold(entries[:start])
    for entry in entries[start:]:
        apply(history, entry)
        yield history.score
