"""A run that is asked to stop: it lands within what its budget leaves, whatever flies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.policy.deadline import EXIT_SECONDS, landing_seconds
from budgetsearch.core.records import CalibrateJob, Job, ScoreJob, TrainJob
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.run.driver import Driver
from tests.support.factories import plan
from tests.support.simulation import make_driver
from tests.support.worlds import SyntheticWorld


class Deaf(SyntheticWorld):
    """Nothing in it ends before its time, and nothing reacts when it is told to stop."""

    def perform(self, job: Job) -> tuple[tuple[Any, ...], float]:
        """Scores and calibrations take their time as well."""
        results, seconds = super().perform(job)
        return results, seconds if isinstance(job, TrainJob) else 60.0

    def interrupt(self, job: Job, share: float) -> None:
        """It goes on."""


def stopped_in(path: Path, kind: type[Job], grace: float = 30.0) -> tuple[Driver, float]:
    """A run on a deaf machine that is asked to stop while such a job flies, and when that was."""
    clock, asked = VirtualClock(2.0), [0.0]
    driver = make_driver(path / "ledger.sqlite", Deaf(hang=lambda s: kind is TrainJob), clock=clock)
    driver.grace_seconds = grace

    def stop() -> str:
        asked[0] = clock.now()
        return "SIGTERM" if any(isinstance(f.job, kind) for f in driver._in_flight.under_way.values()) else ""

    driver.stop_requested = stop
    history = driver.run()
    driver.ledger.close()
    assert history.closed is not None
    assert history.closed.state == "interrupted"
    assert history.running == {}
    return driver, asked[0]


@pytest.mark.parametrize("kind", [CalibrateJob, ScoreJob])
def test_what_cannot_be_kept_is_ended_at_once(tmp_path: Path, kind: type[Job]) -> None:
    """Half a calibration or score is worth nothing, so nobody waits for it."""
    driver, asked = stopped_in(tmp_path, kind)
    assert asked == driver.history.spent


def test_a_late_stop_waits_no_longer_than_the_budget_leaves(tmp_path: Path) -> None:
    """A segment that does not hear the stop, and a grace beyond the deadline: export and exit stay."""
    driver, _ = stopped_in(tmp_path, TrainJob, grace=10_000.0)
    known = driver.history.plan
    assert known is not None
    behind = known.reserve_seconds - known.score_seconds
    assert known.budget_seconds - behind == pytest.approx(driver.history.spent)


def test_the_landing_is_within_grace_and_budget() -> None:
    """Export and exit stay, planned or not; a budget that is used up leaves nothing."""
    known = plan(budget_seconds=720.0, reserve_seconds=60.0, score_seconds=40.0)
    assert landing_seconds(known, 720.0, 30.0, 600.0) == 30.0
    assert landing_seconds(known, 720.0, 30.0, 690.0) == 10.0
    assert landing_seconds(known, 720.0, 30.0, 710.0) == 0.0
    assert landing_seconds(None, 720.0, 30.0, 700.0) == 20.0 - EXIT_SECONDS
