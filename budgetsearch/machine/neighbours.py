"""What other processes take of this machine's cores meanwhile."""

from __future__ import annotations

import os

import psutil


class Neighbours:
    """From its making on."""

    def __init__(self) -> None:
        self._idle, self._all, self._own = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times, own = psutil.cpu_times(), os.times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        whole = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return idle, whole, own.user + own.system

    def cores(self) -> float:
        """Cores that others kept busy, on the average; 0 where too little time has passed to tell."""
        idle, whole, own = (
            b - a for a, b in zip((self._idle, self._all, self._own), self._now(), strict=True)
        )
        if whole <= 0:
            return 0.0
        return max(0.0, (whole - idle - own) / whole * (os.cpu_count() or 1))
