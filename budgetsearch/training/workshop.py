"""The worker's hands: resident bases and prepared data, and the jobs done with them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from budgetsearch.core.bases import Base, ModelSetup, one_of
from budgetsearch.core.metric import is_task
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
from budgetsearch.core.reports import Beat, Notice
from budgetsearch.machine.memory import CONTEXT_BYTES
from budgetsearch.machine.watch import LIMIT_SHARE
from budgetsearch.training import fused, memory
from budgetsearch.training.bases import BasePool
from budgetsearch.training.bench import Bench
from budgetsearch.training.calibrate import calibrate
from budgetsearch.training.data.tokenizer import load_tokenizer
from budgetsearch.training.data.tokens import open_prepared
from budgetsearch.training.machine import computed_on
from budgetsearch.training.members import OTHERS, OWN, Shop
from budgetsearch.training.metric import Grader
from budgetsearch.training.recipe import train_gang
from budgetsearch.training.score import score
from budgetsearch.training.task_metric import TaskMetric
from budgetsearch.training.threads import Threads

NOTICED_SECONDS = 2.0
"""The rate of a shorter training says little of the machine."""
RELIEF_SECONDS = 5.0
"""While memory stays full, what nobody holds is given back at most so often: it costs a pause."""


class Workshop(Bench):
    """Trains adapters: gangs of them on resident bases."""

    def __init__(
        self, setup: WorkerSetup, send: Callable[[Beat | Notice], None], stopping: Callable[[int], bool]
    ) -> None:
        """``send`` takes heartbeats and notices; ``stopping(job_id)``: whether a job was cancelled."""
        super().__init__(setup, send, stopping)
        self._quantization, self._told_plain = "", False
        self._relieved, self._most = -RELIEF_SECONDS, math.inf
        self.bases = BasePool(
            setup.model_path,
            setup.device,
            trust_remote_code=setup.trust_remote_code,
            half=setup.half,
            plainly=self._plainly,
            targets=setup.worn or setup.targets,
            paths={one.label: one.model_path for one in setup.models},
        )
        self._grader, self._task = _metric(setup)
        alone = ModelSetup("", setup.model_path, setup.model_name, setup.data_path)
        self._shops = {one.label: self._shop(one) for one in setup.models or (alone,)}
        self.shop = next(iter(self._shops.values()))
        self._computed_on = computed_on(setup.device)
        self._threads = Threads(setup.device, self._notice)

    def _shop(self, model: ModelSetup) -> Shop:
        """What the trials of one model share."""
        setup = self.setup
        data = open_prepared(Path(model.data_path))
        if model.label:
            data = data.without(model.left_out)
        tokenizer = load_tokenizer(Path(model.model_path), trust_remote_code=setup.trust_remote_code)
        return Shop(
            data=data,
            model_path=Path(model.model_path),
            checkpoint_path=Path(setup.checkpoint_path),
            device=setup.device,
            targets=setup.targets,
            worn=setup.worn,
            base_name=model.model_name,
            seed=setup.seed,
            pad=tokenizer.pad_token_id or 0,
            beat=self._beat,
            stopping=self._cancelled,
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
            elapsed=self._elapsed,
            grader=self._grader,
            task=self._task,
            bytes_of=data.valid_bytes() if model.label else (),
        )

    def train(self, job: TrainJob) -> tuple[SegmentResult, ...]:
        """Train the job's segments, all at once."""
        self._begin(job)
        base, load_seconds = self.bases.get(job.quantization)
        if not job.course:
            self._threads.settle(base, self.shop)
        results = train_gang(
            base, job.segments, self.shop, job.eval_examples, load_seconds, course=job.course
        )
        self._note_rate(job, results)
        return tuple(dataclasses.replace(result, computed_on=self._machine()) for result in results)

    def _note_rate(self, job: TrainJob, results: Sequence[SegmentResult]) -> None:
        """Hold the rate of a job against that of others of its kind."""
        seconds = sum(result.seconds.get("train", 0.0) for result in results)
        tokens = sum(r.tokens - s.start_tokens for s, r in zip(job.segments, results, strict=True))
        if seconds > NOTICED_SECONDS and tokens > 0:
            first = job.segments[0]
            self._threads.note((job.quantization, len(results), first.recompute), tokens / seconds)

    def _machine(self) -> dict[str, str]:
        """What decides how sums round now."""
        return {**self._computed_on, "threads": str(torch.get_num_threads())}

    def calibrate(self, job: CalibrateJob) -> Calibration:
        """Measure one quantization."""
        self._begin(job)
        base, load_seconds = self.bases.get(job.quantization)
        self._threads.settle(base, self.shop)
        return calibrate(base, job, self.shop, load_seconds)

    def score(self, job: ScoreJob) -> Score:
        """Score base and adapter side by side."""
        started = time.monotonic()
        self._begin(job)
        base, _ = self.bases.get(job.quantization)
        return dataclasses.replace(score(base, job, self.shop, started), computed_on=self._machine())

    def forget(self, quantization: str) -> None:
        """Drop a base that an error left in an unknown state, and the memory it held."""
        self.bases.drop(quantization)

    def close(self) -> None:
        """Let go of the card's driver, and end the metric's process."""
        super().close()
        if self._grader is not None:
            self._grader.close()

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
        self._quantization = job.quantization
        self.shop = one_of(self._shops, Base.parse(job.quantization).model)
        self._cap()
        super()._begin(job)

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

    def _plainly(self, why: str) -> None:
        """A base wears no fused kernels: said once, where somebody has installed them."""
        if fused.version() and not self._told_plain:
            self._told_plain = True
            self._notice(f"{fused.PACKAGE} is not used: {why}; steps take about a quarter longer")


def _metric(setup: WorkerSetup) -> tuple[Grader | None, TaskMetric | None]:
    """What grades answers to validation rows, or the task that is asked in their place. A task is loaded now:
    it may take a moment, which no job should count as its own."""
    if is_task(setup.metric):
        return None, TaskMetric.load(setup.metric, setup.metric_folder)
    return (Grader(setup.metric, setup.metric_folder) if setup.metric else None), None
