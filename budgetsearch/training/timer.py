"""Seconds of a job by what they went into."""

from __future__ import annotations

import time


class Timer:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mark = time.monotonic()

    def lap(self, phase: str) -> float:
        """Charge the time since the last lap to ``phase``; returns it."""
        now = time.monotonic()
        passed, self._mark = now - self._mark, now
        self.seconds[phase] = self.seconds.get(phase, 0.0) + passed
        return passed
