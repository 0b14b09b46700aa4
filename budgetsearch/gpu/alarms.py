"""What a user should know of the card while a run goes on, each thing once."""

from __future__ import annotations

from budgetsearch.gpu.host import MIB, gib
from budgetsearch.gpu.nvml import Reading

OTHERS_SHARE, OTHERS_BYTES = 0.01, 256 * MIB
"""Growth of other processes below the larger of these is not worth a word. Estimate: an idle CUDA context
takes 200 to 500 MB, a desktop that opens a window less."""
THROTTLE_SECONDS = 10.0
"""A card that is slowed down for less has only met a peak of power or heat."""


class Alarms:
    """Turns readings into sentences."""

    def __init__(self) -> None:
        self._others_at_start: int | None = None
        self._told_growth = 0
        self._since: dict[str, float] = {}
        self._told_reasons: set[str] = set()

    def look(self, reading: Reading, others_bytes: int | None, now: float) -> list[str]:
        """What is new in a reading, taken at ``now`` seconds; usually nothing."""
        return self._others(reading, others_bytes) + self._throttling(reading, now)

    def _others(self, reading: Reading, others_bytes: int | None) -> list[str]:
        if others_bytes is None:
            return []
        if self._others_at_start is None:
            self._others_at_start = others_bytes
        growth = others_bytes - self._others_at_start
        least = max(OTHERS_SHARE * reading.total_bytes, OTHERS_BYTES, 2 * self._told_growth)
        if growth <= least:
            return []
        self._told_growth = growth
        return [
            f"Another process took {gib(growth)} of the card since the run began; {gib(reading.free_bytes)} "
            "are free. Stop it (nvidia-smi shows it), or the micro-batches will shrink."
        ]

    def _throttling(self, reading: Reading, now: float) -> list[str]:
        reasons = reading.throttled or ()
        self._since = {reason: self._since.get(reason, now) for reason in reasons}
        lasting = [reason for reason, since in self._since.items() if now - since > THROTTLE_SECONDS]
        new = [reason for reason in lasting if reason not in self._told_reasons]
        self._told_reasons.update(new)
        return [
            f"The card has run below its speed for {THROTTLE_SECONDS:.0f} s: {reason}. Tokens per second "
            "suffer; nvidia-smi -q -d PERFORMANCE tells more."
            for reason in new
        ]
