"""What the looks at a card during one job come to."""

from __future__ import annotations

from collections import Counter

from budgetsearch.core.records import CardUse
from budgetsearch.gpu.nvml import Reading


class Tally:
    """Adds up readings; the sum is a ``CardUse``."""

    def __init__(self) -> None:
        self._last: Reading | None = None
        self._last_time = 0.0
        self._samples = 0
        self._peak_bytes = 0
        self._others_bytes = 0
        self._utilization: list[float] = []
        self._joules: float | None = None
        self._celsius: float | None = None
        self._throttled: Counter[str] = Counter()

    def add(self, reading: Reading, others_bytes: int, now: float) -> None:
        """Count one reading, taken at ``now`` seconds of any clock."""
        if self._last is not None:
            joules = _joules(self._last, reading, now - self._last_time)
            if joules is not None:
                self._joules = (self._joules or 0.0) + joules
        self._last, self._last_time = reading, now
        self._samples += 1
        self._peak_bytes = max(self._peak_bytes, reading.used_bytes)
        self._others_bytes = max(self._others_bytes, others_bytes)
        if reading.utilization is not None:
            self._utilization.append(reading.utilization)
        if reading.celsius is not None:
            self._celsius = max(reading.celsius, self._celsius or reading.celsius)
        self._throttled.update(reading.throttled or ())

    def use(self) -> CardUse:
        """The sum so far."""
        known = len(self._utilization)
        return CardUse(
            samples=self._samples,
            peak_bytes=self._peak_bytes,
            others_bytes=self._others_bytes,
            utilization=sum(self._utilization) / known if known else None,
            joules=self._joules,
            celsius=self._celsius,
            throttled={reason: count / self._samples for reason, count in self._throttled.items()},
        )


def _joules(before: Reading, after: Reading, seconds: float) -> float | None:
    """Energy between two readings: by the card's counter, else by its power; None: nobody can say."""
    if before.joules is not None and after.joules is not None and after.joules >= before.joules:
        return after.joules - before.joules
    if before.watts is not None and after.watts is not None:
        return (before.watts + after.watts) / 2 * seconds
    return None
