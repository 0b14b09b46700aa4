"""Signs of life of a job, with what its card looked like."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from budgetsearch.core.reports import Beat
from budgetsearch.machine.watch import CardWatcher

BEAT_SECONDS = 2.0
"""A heartbeat at most so often."""


class Heart:
    """Sends a beat when the last one is old enough."""

    def __init__(self, send: Callable[[Beat], None], watcher: CardWatcher) -> None:
        """``send`` takes the beats; ``watcher`` knows the card."""
        self._send, self._watcher, self._last = send, watcher, 0.0

    def beat(self, job_id: int, trial_id: int | None, activity: str, tokens: int, loss: float | None) -> None:
        """The job is alive; a loss that is not finite is left out."""
        now = time.monotonic()
        if now - self._last < BEAT_SECONDS:
            return
        self._last = now
        seen = self._watcher.latest()
        self._send(
            Beat(
                *(job_id, trial_id, activity, tokens),
                loss if loss is None or math.isfinite(loss) else None,
                used_bytes=seen.used_bytes if seen else 0,
                utilization=seen.utilization if seen else None,
                watts=seen.watts if seen else None,
                celsius=seen.celsius if seen else None,
            )
        )
