"""The run's clock: active seconds, deadlines, Slurm, and what counts across processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import datetime, timedelta

import pytest

from budgetsearch.core.errors import SettingsError
from budgetsearch.machine import clock as clock_module
from budgetsearch.machine.clock import (
    RunClock,
    budget_of_resumed,
    deadline_of,
    timing_of_new,
    timing_of_resumed,
)
from budgetsearch.storage.files import local_time

NOW = 1_700_000_000.0
SetClocks = Callable[..., None]


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> SetClocks:
    """Set what the machine's clocks show; the wall clock starts at NOW."""
    shown = {time.CLOCK_MONOTONIC: 100.0, time.CLOCK_BOOTTIME: 100.0, "wall": NOW}

    def move(*, awake: float = 0.0, asleep: float = 0.0, wall_jump: float = 0.0) -> None:
        shown[time.CLOCK_MONOTONIC] += awake
        shown[time.CLOCK_BOOTTIME] += awake + asleep
        shown["wall"] += awake + asleep + wall_jump

    monkeypatch.setattr(clock_module.time, "clock_gettime", lambda source: shown[source])
    monkeypatch.setattr(clock_module.time, "time", lambda: shown["wall"])
    return move


def test_active_seconds_ignore_the_wall_clock_and_sleep(clocks: SetClocks) -> None:
    """A suspended laptop is not charged, and nobody minds daylight saving."""
    clock = RunClock(spent=10.0, already=2.0)
    clocks(awake=5.0, asleep=3600.0, wall_jump=-7200.0)
    assert clock.now() == pytest.approx(17.0)


def test_a_deadline_does_not_wait_for_a_machine_that_sleeps(clocks: SetClocks) -> None:
    """What passes while it is suspended counts, a changed wall clock does not."""
    timing = timing_of_new(24.0, NOW + 1000.0, 4.0)
    assert timing.budget_seconds == pytest.approx(1004.0)
    clocks(awake=10.0, asleep=300.0, wall_jump=5000.0)
    assert timing.clock.now() == pytest.approx(314.0)


def test_the_sooner_of_hours_and_deadline_counts(clocks: SetClocks) -> None:
    """A tenth of an hour, or a deadline in a day."""
    assert timing_of_new(0.1, NOW + 86_400, 0.0).budget_seconds == pytest.approx(360.0)
    assert timing_of_new(0.1, None, 0.0).budget_seconds == pytest.approx(360.0)


def test_a_deadline_that_is_over_is_refused(clocks: SetClocks) -> None:
    """It says by how much."""
    with pytest.raises(SettingsError, match="60 s ago"):
        timing_of_new(1.0, NOW - 60.0, 0.0)


def test_downtime_is_not_charged_without_a_deadline(clocks: SetClocks) -> None:
    """A run goes on where it stood, whenever that is."""
    timing = timing_of_resumed(500.0, 3600.0, None, None, 3.0)
    assert (timing.clock.now(), timing.budget_seconds, timing.down_seconds) == (503.0, 3600.0, 0.0)


def test_downtime_counts_with_a_deadline(clocks: SetClocks) -> None:
    """The run began 2000 s ago and has worked for 500 of them."""
    timing = timing_of_resumed(500.0, 3600.0, NOW - 2000.0, None, 3.0)
    assert timing.clock.now() == pytest.approx(2000.0)
    assert timing.down_seconds == pytest.approx(1497.0)


def test_time_never_runs_back_if_the_wall_clock_did(clocks: SetClocks) -> None:
    """Somebody set it back between two processes."""
    timing = timing_of_resumed(500.0, 3600.0, NOW - 100.0, None, 3.0)
    assert timing.clock.now() == pytest.approx(503.0)
    assert timing.down_seconds == 0.0


def test_a_new_deadline_moves_the_end(clocks: SetClocks) -> None:
    """Of a run that has one it may be later, too; of one that has not, the hours still count."""
    later = timing_of_resumed(500.0, 3600.0, NOW - 2000.0, NOW + 5000.0, 0.0)
    assert later.budget_seconds == pytest.approx(7000.0)
    first = timing_of_resumed(500.0, 3600.0, None, NOW + 1000.0, 0.0)
    assert first.budget_seconds == pytest.approx(1500.0)
    assert timing_of_resumed(500.0, 3600.0, None, NOW + 10**6, 0.0).budget_seconds == pytest.approx(3600.0)


def test_a_run_that_goes_on_may_be_given_more_hours() -> None:
    """In all, with those before; without them it keeps its own."""
    assert 3600.0 == budget_of_resumed(None, 500.0, 3600.0)
    assert 7200.0 == budget_of_resumed(2.0, 3599.0, 3600.0)
    assert 900.0 == budget_of_resumed(0.25, 500.0, 3600.0)


@pytest.mark.parametrize("hours", [0.1, 0.0, -1.0, math.nan, math.inf])
def test_hours_that_are_spent_already_are_refused_with_some_that_are_not(hours: float) -> None:
    """The message names the option and a number that is taken."""
    with pytest.raises(SettingsError, match=r"--hours .* Give (\d+\.\d\d) or more") as caught:
        budget_of_resumed(hours, 360.0, 3600.0)
    least = float(str(caught.value).rsplit("Give ", 1)[1].split()[0])
    assert least * 3600 == budget_of_resumed(least, 360.0, 3600.0)


def test_times_are_local_unless_they_say_otherwise() -> None:
    """ISO 8601, and back again."""
    there = datetime.now().replace(microsecond=0) + timedelta(hours=3)
    assert deadline_of(there.isoformat()) == there.timestamp()
    assert deadline_of("2026-11-24T18:00+00:00") == 1_795_543_200
    assert deadline_of(local_time(1_795_543_200)) == 1_795_543_200


def test_slurm_tells_when_the_job_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its environment; outside of a job there is none."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1795543200")
    assert deadline_of("slurm") == 1_795_543_200
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    with pytest.raises(SettingsError, match="SLURM_JOB_END_TIME is not set"):
        deadline_of("slurm")


@pytest.mark.parametrize("text", ["tomorrow", "25:00", "2026-13-01", ""])
def test_what_is_no_time_is_refused(text: str) -> None:
    """With an example."""
    with pytest.raises(SettingsError, match="Write it like"):
        deadline_of(text)
