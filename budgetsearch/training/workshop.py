"""The worker's hands: resident bases and prepared data, and the jobs done with them."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path

import psutil
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
from budgetsearch.training.bases import BasePool
from budgetsearch.training.calibrate import calibrate
from budgetsearch.training.recipe import Shop, train_segment
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
        self._job_id, self._last_beat = 0, 0.0
        self._probe = MemoryProbe(setup.card_index)
        self._trial_id: int | None = None
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
        )
        if setup.device != "cpu" and setup.limit_bytes:
            total = torch.cuda.get_device_properties(setup.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, setup.limit_bytes / total), setup.device)

    def train(self, job: TrainJob, index: int) -> SegmentResult:
        """Train the job's segment number ``index``."""
        segment = job.segments[index]
        self._begin(job, segment.trial_id)
        base, load_seconds = self.bases.get(job.quantization)
        result, bare = train_segment(base, segment, self.shop, job.eval_examples)
        self.bases.replace(job.quantization, bare)
        seconds = {**result.seconds, "load": result.seconds.get("load", 0.0) + load_seconds}
        return dataclasses.replace(result, seconds=seconds)

    def calibrate(self, job: CalibrateJob) -> Calibration:
        """Measure one quantization."""
        self._begin(job, None)
        base, load_seconds = self.bases.get(job.quantization)
        result, bare = calibrate(base, job, self.shop, load_seconds, is_memory_error)
        self.bases.replace(job.quantization, bare)
        return result

    def score(self, job: ScoreJob) -> Score:
        """Score base and adapter side by side."""
        started = time.monotonic()
        self._begin(job, None)
        base, _ = self.bases.get(job.quantization)
        result, bare = score(base, job, self.shop, started)
        self.bases.replace(job.quantization, bare)
        return result

    def forget(self, quantization: str) -> None:
        """Drop a base that an error left in an unknown state, and the memory it held."""
        self.bases.drop(quantization)
        gc.collect()

    def peak_bytes(self) -> int:
        """Peak memory of this process since the job began: the card's, on the CPU the resident set."""
        if self.setup.device != "cpu":
            return int(torch.cuda.max_memory_allocated(self.setup.device))
        return max_resident_bytes()

    def _begin(self, job: Job, trial_id: int | None) -> None:
        self._job_id, self._trial_id = job.job_id, trial_id
        if self.setup.device != "cpu":
            torch.cuda.reset_peak_memory_stats(self.setup.device)
        else:
            forget_resident_peak()

    def _beat(self, activity: str, tokens: int, loss: float | None) -> None:
        now = time.monotonic()
        if now - self._last_beat >= BEAT_SECONDS:
            self._last_beat = now
            self._send(Beat(self._job_id, self._trial_id, activity, tokens, loss, self._probe.used()))


def forget_resident_peak() -> None:
    """Start the peak of the resident set anew, where the kernel can (Linux: man 5 proc, clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass  # then the peak is that of the whole process


def max_resident_bytes() -> int:
    """Largest resident set of this process since the peak was last forgotten."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return int(psutil.Process().memory_info().rss)


def is_memory_error(error: BaseException) -> bool:
    """Whether an exception of torch, bitsandbytes or Python means that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
