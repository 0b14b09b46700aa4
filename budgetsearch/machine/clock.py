"""The run's own clock: active seconds, or with a deadline all seconds since the run began."""

from __future__ import annotations

import math
import os
import re
import time
from dataclasses import dataclass
from datetime import datetime

import psutil

from budgetsearch.core.errors import SettingsError

SLURM_END = "SLURM_JOB_END_TIME"
"""Slurm tells a job so when it will be ended, in seconds since the epoch."""


class RunClock:
    """Seconds of the run so far: those of earlier processes, and this one's since it began.

    Within a process a monotonic clock counts, so changes of the wall clock do not. Active seconds stand still
    while the machine is suspended; with a deadline they do not, for the deadline does not wait either.
    """

    def __init__(self, spent: float = 0.0, already: float = 0.0, *, wall: bool = False) -> None:
        """``already`` are the seconds that this process ran before the clock was made; ``wall``: count what
        passes while the machine sleeps."""
        boottime = getattr(time, "CLOCK_BOOTTIME", None) if wall else None
        self._source = time.CLOCK_MONOTONIC if boottime is None else boottime
        self._offset = spent + already
        self._start = time.clock_gettime(self._source)

    def now(self) -> float:
        """Seconds of the run; never runs back."""
        return self._offset + time.clock_gettime(self._source) - self._start


@dataclass(frozen=True)
class Timing:
    """How long a process may work on a run, and by which clock."""

    clock: RunClock
    budget_seconds: float
    """Of the whole run."""
    down_seconds: float = 0.0
    """What passed since the run's last process, where it counts: with a deadline."""

    def seconds_left(self) -> float:
        """Seconds until the run must be over; negative once they are spent."""
        return self.budget_seconds - self.clock.now()


def timing_of_new(hours: float, deadline: float | None, already: float) -> Timing:
    """Of a run that begins now: ``hours`` of active time, less if the deadline (since the epoch) is sooner.

    Raises:
        SettingsError: the deadline is over.
    """
    if deadline is None:
        return Timing(RunClock(already=already), hours * 3600)
    left = deadline - (time.time() - already)
    if left <= 0:
        raise SettingsError(f"--deadline: that time was {-left:.0f} s ago. Give one that is still to come.")
    return Timing(RunClock(already=already, wall=True), min(hours * 3600, left))


def timing_of_resumed(
    spent: float, budget_seconds: float, began: float | None, deadline: float | None, already: float
) -> Timing:
    """Of a run that goes on.

    Args:
        spent: seconds up to its last entry.
        budget_seconds: what it may take in all, as last decided.
        began: when it began, in seconds since the epoch, if it has a deadline: then the time between its
            processes counts.
        deadline: a new one, in seconds since the epoch; None: as it was.
        already: seconds that this process has been running.
    """
    now = spent + already
    if began is not None:
        now = max(now, time.time() - began)
    clock = RunClock(spent=now, wall=began is not None or deadline is not None)
    if deadline is not None:
        until = now + deadline - time.time()
        budget_seconds = until if began is not None else min(budget_seconds, until)
    return Timing(clock, budget_seconds, now - spent - already)


def budget_of_resumed(hours: float | None, spent: float, before: float) -> float:
    """Seconds that a run that goes on may take in all: ``before``, or the ``hours`` that it is given now.

    Raises:
        SettingsError: they are no number, or spent already.
    """
    if hours is None:
        return before
    if not (math.isfinite(hours) and hours * 3600 > spent):
        least = math.ceil(spent / 36 + 1) / 100
        raise SettingsError(
            f"--hours {hours:g} is for the whole run, which has taken {spent / 3600:.3f} h already. Give "
            f"{least:.2f} or more."
        )
    return hours * 3600


def process_age() -> float:
    """Seconds since this process was started: importing Python's packages is charged as well."""
    return max(0.0, time.time() - psutil.Process().create_time())


def deadline_of(text: str) -> float:
    """Seconds since the epoch of a deadline: a time like 2026-11-24T18:00, local unless it says otherwise, or
    ``slurm``: the end of the Slurm job that this process belongs to.

    Raises:
        SettingsError: it is neither, or there is no such job.
    """
    if text.strip().lower() == "slurm":
        end = os.environ.get(SLURM_END, "")
        if not re.fullmatch("[0-9]{1,12}", end):
            raise SettingsError(
                f"--deadline slurm: {SLURM_END} is not set, or no time: no Slurm job, or an old Slurm. "
                "Give the time itself, like --deadline 2026-11-24T18:00."
            )
        return float(end)
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError, OSError) as problem:
        raise SettingsError(
            f"--deadline {text!r} is no time. Write it like 2026-11-24T18:00 or 2026-11-24T18:00+01:00, or "
            "write slurm."
        ) from problem
