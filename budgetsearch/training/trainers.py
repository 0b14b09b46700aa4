"""Who carries out a worker's jobs: the training of adapters, or a recipe of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Score,
    ScoreJob,
    SegmentResult,
    TrainJob,
)
from budgetsearch.core.reports import Beat, CardUse, Notice


class Trainer(Protocol):
    """What a worker asks for; its exceptions become statuses there.

    The usual one trains a recipe's trials one after the other. Whoever trains several at once, as gangs of
    adapters on one resident base do, or foresees memory, brings its own (``Recipe.trainer``).
    """

    def train(self, job: TrainJob) -> tuple[SegmentResult, ...]:
        """Train the job's segments; results in their order."""
        ...

    def calibrate(self, job: CalibrateJob) -> Calibration:
        """Measure what one class of configurations costs."""
        ...

    def score(self, job: ScoreJob) -> Score:
        """Compare the best trial with what there was before any training."""
        ...

    def forget(self, quantization: str) -> None:
        """Drop what an error left in an unknown state."""
        ...

    def use(self) -> CardUse:
        """What the job did to the card."""
        ...

    def peak_bytes(self) -> int:
        """Peak memory of this process since the job began."""
        ...

    def close(self) -> None:
        """Let go of the card's driver."""
        ...


Send = Callable[[Beat | Notice], None]
"""Takes heartbeats and notices."""
Stopping = Callable[[int], bool]
"""Whether a job of this number was cancelled."""
