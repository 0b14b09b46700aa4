"""Every active second of a run is charged exactly once, to what it was used for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from budgetsearch.core.events import Charged, Event
from budgetsearch.core.ports import Clock
from budgetsearch.core.records import Phase, SegmentResult


@dataclass
class Charges:
    """Charges the time that passes; the events add up to the time of the last of them."""

    clock: Clock
    append: Callable[[Event], None]
    """Writes an event to the ledger."""
    until: float = 0.0
    """Up to here all is charged, in active seconds of the run."""

    def result(self, result: SegmentResult) -> None:
        """Charge what the worker measured, never more than what has passed."""
        passed = max(0.0, self.clock.now() - self.until)
        measured = sum(result.seconds.values())
        scale = min(1.0, passed / measured) if measured > 0 else 0.0
        for phase, seconds in result.seconds.items():
            self.charge(phase, seconds * scale, result.trial_id)  # type: ignore[arg-type]

    def rest(self, phase: Phase) -> None:
        """Charge everything since the last charge to one phase."""
        self.charge(phase, self.clock.now() - self.until)

    def charge(self, phase: Phase, seconds: float, trial_id: int | None = None) -> None:
        """Charge so many seconds, to a trial where they are one's."""
        if seconds > 0:
            self.until += seconds
            self.append(Charged(phase, seconds, trial_id))
