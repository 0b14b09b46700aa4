"""The worker's hands: resident bases and prepared data, and the jobs done with them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from budgetsearch.core.records import (
    Beat,
    CalibrateJob,
    Calibration,
    Job,
    Score,
    ScoreJob,
    SegmentResult,
    TrainJob,
    WorkerSetup,
)
from budgetsearch.gpu.watch import MemoryProbe
from budgetsearch.training import memory
from budgetsearch.training.bases import BasePool
from budgetsearch.training.calibrate import calibrate
from budgetsearch.training.members import Shop
from budgetsearch.training.recipe import train_gang
from budgetsearch.training.score import score
from budgetsearch.training.tokens import load_tokenizer, open_prepared

BEAT_SECONDS = 2.0
"""A heartbeat at most so often."""


class Workshop:
    """Executes jobs one at a time on one device."""

    def __init__(
        self, setup: WorkerSetup, send: Callable[[Beat], None], stopping: Callable[[int], bool]
    ) -> None:
        """``send`` takes heartbeats; ``stopping(job_id)`` tells whether a job was cancelled."""
        self.setup = setup
        self._send, self._stopping = send, stopping
        self._job_id, self._last_beat, self._quantization = 0, 0.0, ""
        self._probe = MemoryProbe(setup.card_index)
        self.bases = BasePool(setup.model_path, setup.device, trust_remote_code=setup.trust_remote_code)
        tokenizer = load_tokenizer(Path(setup.model_path))
        self.shop = Shop(
            data=open_prepared(Path(setup.data_path)),
            model_path=Path(setup.model_path),
            checkpoint_path=Path(setup.checkpoint_path),
            device=setup.device,
            targets=setup.targets,
            base_name=setup.model_name,
            seed=setup.seed,
            pad=tokenizer.pad_token_id or 0,
            beat=self._beat,
            stopping=lambda: self._stopping(self._job_id),
            peak_bytes=self.peak_bytes,
            optimizer=setup.optimizer,
            torch_compile=setup.torch_compile,
            make_room=lambda: self.bases.drop_others(self._quantization),
        )
        if setup.device != "cpu" and setup.limit_bytes:
            total = torch.cuda.get_device_properties(setup.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, setup.limit_bytes / total), setup.device)

    def train(self, job: TrainJob) -> tuple[SegmentResult, ...]:
        """Train the job's segments, all at once."""
        self._begin(job)
        base, load_seconds = self.bases.get(job.quantization)
        return tuple(train_gang(base, job.segments, self.shop, job.eval_examples, load_seconds))

    def calibrate(self, job: CalibrateJob) -> Calibration:
        """Measure one quantization."""
        self._begin(job)
        base, load_seconds = self.bases.get(job.quantization)
        return calibrate(base, job, self.shop, load_seconds)

    def score(self, job: ScoreJob) -> Score:
        """Score base and adapter side by side."""
        started = time.monotonic()
        self._begin(job)
        base, _ = self.bases.get(job.quantization)
        return score(base, job, self.shop, started)

    def forget(self, quantization: str) -> None:
        """Drop a base that an error left in an unknown state, and the memory it held."""
        self.bases.drop(quantization)

    def peak_bytes(self) -> int:
        """Peak memory of this process since the job began."""
        return memory.peak_bytes(self.setup.device)

    def _begin(self, job: Job) -> None:
        self._job_id, self._quantization = job.job_id, job.quantization
        memory.start_peak(self.setup.device)

    def _beat(self, trial_id: int | None, activity: str, tokens: int, loss: float | None) -> None:
        now = time.monotonic()
        if now - self._last_beat >= BEAT_SECONDS:
            self._last_beat = now
            self._send(Beat(self._job_id, trial_id, activity, tokens, loss, self._probe.used()))
