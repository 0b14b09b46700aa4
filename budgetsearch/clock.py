"""The run's own clock: active seconds, summed over the processes that worked on it."""

from __future__ import annotations

import time

import psutil


class RunClock:
    """Seconds of the run so far: ``spent`` by earlier processes, and this one's since it began."""

    def __init__(self, spent: float = 0.0, already: float = 0.0) -> None:
        """``already`` are the seconds that this process ran before the clock was made."""
        self._offset = spent + already
        self._start = time.monotonic()

    def now(self) -> float:
        """Active seconds of the run; monotonic, so it is immune to changes of the wall clock."""
        return self._offset + time.monotonic() - self._start


def process_age() -> float:
    """Seconds since this process was started: importing Python's packages is charged as well."""
    return max(0.0, time.time() - psutil.Process().create_time())
