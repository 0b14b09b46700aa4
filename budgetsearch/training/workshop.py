"""The worker's hands: resident bases and prepared data, and the jobs done with them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Job,
    Score,
    ScoreJob,
    SegmentResult,
    TrainJob,
    WorkerSetup,
)
from budgetsearch.core.reports import Beat, CardUse, Notice
from budgetsearch.machine.memory import CONTEXT_BYTES
from budgetsearch.machine.watch import LIMIT_SHARE, CardWatcher
from budgetsearch.training import memory
from budgetsearch.training.bases import BasePool
from budgetsearch.training.calibrate import calibrate
from budgetsearch.training.data.tokenizer import load_tokenizer
from budgetsearch.training.data.tokens import open_prepared
from budgetsearch.training.machine import computed_on
from budgetsearch.training.members import OTHERS, OWN, Shop
from budgetsearch.training.recipe import train_gang
from budgetsearch.training.score import score

BEAT_SECONDS = 2.0
"""A heartbeat at most so often."""
RELIEF_SECONDS = 5.0
"""While memory stays full, what nobody holds is given back at most so often: it costs a pause."""


class Workshop:
    """Executes jobs one at a time on one device."""

    def __init__(
        self, setup: WorkerSetup, send: Callable[[Beat | Notice], None], stopping: Callable[[int], bool]
    ) -> None:
        """``send`` takes heartbeats and notices; ``stopping(job_id)``: whether a job was cancelled."""
        memory.wake(setup.device)  # before anything asks CUDA something
        self.setup = setup
        self._send, self._stopping = send, stopping
        self._job_id, self._last_beat, self._quantization = 0, 0.0, ""
        self._relieved, self._most = -RELIEF_SECONDS, math.inf
        self._started = 0.0
        self._meter = memory.PeakMeter(setup.device)
        self.watcher = CardWatcher(
            setup.card_uuid,
            limit_bytes=setup.limit_bytes,
            notify=self._notice,
            own=None if setup.device == "cpu" else self._held_bytes,
        )
        self.watcher.start()
        self.bases = BasePool(
            setup.model_path,
            setup.device,
            trust_remote_code=setup.trust_remote_code,
            half=setup.half,
        )
        tokenizer = load_tokenizer(Path(setup.model_path), trust_remote_code=setup.trust_remote_code)
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
            half=setup.half,
            trust_remote_code=setup.trust_remote_code,
            make_room=lambda: self.bases.drop_others(self._quantization),
            pressed=self._pressed,
            start_peak=self._meter.start,
            other_bases=lambda: self.bases.bytes_of_others(self._quantization),
            notice=self._notice,
            elapsed=lambda: time.monotonic() - self._started,
        )
        self._computed_on = computed_on(setup.device)

    def train(self, job: TrainJob) -> tuple[SegmentResult, ...]:
        """Train the job's segments, all at once."""
        self._begin(job)
        base, load_seconds = self.bases.get(job.quantization)
        results = train_gang(
            base, job.segments, self.shop, job.eval_examples, load_seconds, course=job.course
        )
        return tuple(dataclasses.replace(result, computed_on=self._computed_on) for result in results)

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
        return dataclasses.replace(score(base, job, self.shop, started), computed_on=self._computed_on)

    def forget(self, quantization: str) -> None:
        """Drop a base that an error left in an unknown state, and the memory it held."""
        self.bases.drop(quantization)

    def use(self) -> CardUse:
        """What the job did to the card."""
        return self.watcher.use()

    def close(self) -> None:
        """Let go of the card's driver."""
        self.watcher.close()

    def peak_bytes(self) -> int:
        """Peak memory of this process since the job began: the allocator's and the context beside it, or the
        resident set."""
        return self._meter.job() + self._context_bytes()

    def _context_bytes(self) -> int:
        """What the card holds for this process beside the allocator's blocks, as NVML sees it."""
        if self.setup.device == "cpu":
            return 0
        own = self.watcher.take().own_bytes
        return CONTEXT_BYTES if own is None else max(0, own - self._reserved_bytes())

    def _reserved_bytes(self) -> int:
        return int(torch.cuda.memory_reserved(self.setup.device))

    def _held_bytes(self) -> int:
        """What this process holds of the card where the driver does not say, as in a container."""
        return self._reserved_bytes() + CONTEXT_BYTES

    def _cap(self) -> None:
        """Hold the allocator where the watcher draws its line: a cache beyond it would always look full."""
        if not self.setup.limit_bytes:
            return
        beside = max(CONTEXT_BYTES, self._context_bytes())
        self._most = max(0.0, LIMIT_SHARE * self.setup.limit_bytes - beside)
        if self.setup.device != "cpu":
            total = torch.cuda.get_device_properties(self.setup.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self._most / total), self.setup.device)

    def _begin(self, job: Job) -> None:
        self._job_id, self._quantization, self._started = job.job_id, job.quantization, time.monotonic()
        self._cap()
        self._meter.start()
        self.watcher.begin()

    def _pressed(self) -> str:
        """Whether memory is nearly full: see ``Shop.pressed``."""
        peak = self._meter.step()
        if peak > LIMIT_SHARE * self._most:
            return OWN
        now = time.monotonic()
        if not self.watcher.pressed() or now - self._relieved < RELIEF_SECONDS:
            return ""
        self._relieved = now
        memory.empty_cache(self.setup.device)  # what the allocator keeps for later counts as used
        return OTHERS if self.watcher.check() else ""

    def _notice(self, text: str) -> None:
        self._send(Notice(self._job_id, text))

    def _beat(self, trial_id: int | None, activity: str, tokens: int, loss: float | None) -> None:
        now = time.monotonic()
        if now - self._last_beat >= BEAT_SECONDS:
            self._last_beat = now
            seen = self.watcher.latest()
            self._send(
                Beat(
                    *(self._job_id, trial_id, activity, tokens, loss),
                    used_bytes=seen.used_bytes if seen else 0,
                    utilization=seen.utilization if seen else None,
                    watts=seen.watts if seen else None,
                    celsius=seen.celsius if seen else None,
                )
            )
