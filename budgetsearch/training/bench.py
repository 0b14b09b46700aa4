"""What a worker needs for its jobs, whatever it trains: card's watcher, signs of life, the job's clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from budgetsearch.core.records import Job, WorkerSetup
from budgetsearch.core.reports import Beat, CardUse, Notice
from budgetsearch.machine.memory import CONTEXT_BYTES
from budgetsearch.machine.watch import CardWatcher
from budgetsearch.training import memory
from budgetsearch.training.heart import Heart


class Bench:
    """Of one worker process, on one device; one job at a time."""

    def __init__(
        self, setup: WorkerSetup, send: Callable[[Beat | Notice], None], stopping: Callable[[int], bool]
    ) -> None:
        """``send`` takes heartbeats and notices; ``stopping(job_id)``: whether a job was cancelled."""
        memory.wake(setup.device)  # before anything asks CUDA something
        self.setup = setup
        self._send, self._stopping = send, stopping
        self._job_id, self._started = 0, 0.0
        self._meter = memory.PeakMeter(setup.device)
        self.watcher = CardWatcher(
            setup.card_uuid,
            limit_bytes=None if setup.device == "cpu" else setup.limit_bytes,
            notify=self._notice,
            own=None if setup.device == "cpu" else self._held_bytes,
        )
        self.watcher.start()
        self._heart = Heart(send, self.watcher)

    def use(self) -> CardUse:
        """What the job did to the card."""
        return self.watcher.use()

    def close(self) -> None:
        """Let go of the card's driver."""
        self.watcher.close()

    def _begin(self, job: Job) -> None:
        self._job_id, self._started = job.job_id, time.monotonic()
        self._meter.start()
        self.watcher.begin()

    def _elapsed(self) -> float:
        """Seconds since the job began."""
        return time.monotonic() - self._started

    def _cancelled(self) -> bool:
        """Whether the job was told to stop."""
        return self._stopping(self._job_id)

    def _held_bytes(self) -> int:
        """What this process holds of the card where the driver does not say, as in a container."""
        return self._reserved_bytes() + CONTEXT_BYTES

    def _reserved_bytes(self) -> int:
        return int(torch.cuda.memory_reserved(self.setup.device))

    def _notice(self, text: str) -> None:
        self._send(Notice(self._job_id, text))

    def _beat(self, trial_id: int | None, activity: str, tokens: int, loss: float | None) -> None:
        self._heart.beat(self._job_id, trial_id, activity, tokens, loss)
