"""A whole run in a second or two: the real API, driver, worker loop, ledger, checkpoints and exporter.

Two things are replaced. The worker is a fork of a process that has imported everything (a real one takes
seconds to start), and its workshop does not train: it says what ``SyntheticWorld`` says and writes real
checkpoints. And the clock leaps over the seconds that the world says have passed, so a budget of twelve
minutes takes seconds. Real seconds count beside the leapt ones.

A checkpoint's tensors hold its trial and its tokens, so that an adapter tells where it comes from.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file

from budgetsearch import api
from budgetsearch.core.errors import CheckpointError, RunFolderError, UnreadableError
from budgetsearch.core.history.history import History
from budgetsearch.core.policy import deadline
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Job,
    Score,
    ScoreJob,
    Segment,
    SegmentResult,
    TrainJob,
    WorkerSetup,
)
from budgetsearch.core.reports import Beat, CardUse, JobEnded, Notice, Report
from budgetsearch.core.results import untrained
from budgetsearch.engines import local, pipes
from budgetsearch.engines.local import LocalEngine
from budgetsearch.machine import clock
from budgetsearch.machine.clock import RunClock
from budgetsearch.run import process as leaving
from budgetsearch.training import adapters_recipe, checkpoints
from budgetsearch.training.adapters import Adapter
from budgetsearch.training.bases import load_base
from budgetsearch.training.checkpoints import Progress
from tests.support.worlds import SyntheticWorld

HOURS = 0.2
"""Budget of a fast run: 720 s, most of them leapt over."""
ORIGIN = "origin"
"""The tensor of a checkpoint that says which trial wrote it, and when."""
SPACE = """\
dimensions:
  quantization: {kind: choice, values: [fp32, nf4]}
  rank: {kind: choice, values: [2, 4], ordered: true}
  learning_rate: {kind: float, low: 1.0e-4, high: 1.0e-2, log: true}
"""


CLOCKS: list[LeapClock] = []
"""All that were made; the last one counts."""


class LeapClock(RunClock):
    """The run's clock, which may be told that time has passed."""

    def __init__(self, spent: float = 0.0, already: float = 0.0, *, wall: bool = False) -> None:
        super().__init__(spent, already, wall=wall)
        self.leapt = 0.0
        CLOCKS.append(self)

    def now(self) -> float:
        """Real and leapt seconds."""
        return super().now() + self.leapt

    def leap(self, seconds: float) -> None:
        """Let so many seconds have passed."""
        self.leapt += max(0.0, seconds)


class ForkedProcess:
    """Looks like ``subprocess.Popen``, but forks this process and runs the worker's loop in the fork."""

    before_work: Callable[[], None] = staticmethod(lambda: None)
    """Called in the fork, for tests."""

    def __init__(
        self, arguments: Sequence[str], *, stderr: BinaryIO, pass_fds: Sequence[int], **more: Any
    ) -> None:
        orders, self_orders = os.pipe()
        self_reports, reports = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _work(orders, reports, stderr.fileno(), (*pass_fds, *KEPT))
        os.close(orders)
        os.close(reports)
        self.stdin = os.fdopen(self_orders, "w", encoding="utf-8")
        self.stdout = os.fdopen(self_reports, "r", encoding="utf-8")
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended."""
        until = time.monotonic() + (1e9 if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            time.sleep(0.002)
        return code

    def kill(self) -> None:
        """Signal 9."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


KEPT: list[int] = []
"""File descriptors that a fork keeps open."""


def _work(orders: int, reports: int, log: int, kept: Sequence[int]) -> None:
    """Become a worker: nothing of the driver's is open any more, as after an exec."""
    from budgetsearch.engines import worker

    try:
        os.dup2(orders, 0)
        os.dup2(reports, 1)
        os.dup2(log, 2)
        start = 3
        for fd in sorted(kept):
            os.closerange(start, fd)
            start = fd + 1
        os.closerange(start, 1024)
        sys.stdin = os.fdopen(0, "r", encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
        torch.set_num_threads(1)
        ForkedProcess.before_work()
        worker.main()
    finally:
        os._exit(1)


@dataclass
class Behaviour:
    """What a fast worker does wrong; read in the fork."""

    world: SyntheticWorld = field(default_factory=lambda: SyntheticWorld(tokens_per_second=400.0))
    during: Callable[[Segment], None] = lambda segment: None
    """Called in the middle of each segment."""
    heeds_cancel: bool = True


BEHAVIOUR = Behaviour()


class FastWorkshop:
    """Does what ``Workshop`` does, without training."""

    def __init__(
        self, setup: WorkerSetup, send: Callable[[Beat | Notice], None], stopping: Callable[[int], bool]
    ) -> None:
        self.setup, self._send, self._stopping = setup, send, stopping
        self._base = _base(setup.model_path)

    def train(self, job: TrainJob) -> tuple[SegmentResult, ...]:
        """Read what there is to read, pass through the middle, write what there is to write."""
        lost = {s.trial_id: result for s in job.segments if (result := self._lost(s)) is not None}
        whole = replace(job, segments=tuple(s for s in job.segments if s.trial_id not in lost))
        done = {result.trial_id: result for result in self._train(whole)} if whole.segments else {}
        return tuple((lost | done)[segment.trial_id] for segment in job.segments)

    def _lost(self, segment: Segment) -> SegmentResult | None:
        if not segment.checkpoint_in:
            return None
        try:
            saved = checkpoints.load(Path(self.setup.checkpoint_path) / segment.checkpoint_in)
        except CheckpointError as error:
            return untrained(segment, "lost", str(error))
        except UnreadableError as error:
            return untrained(segment, "unread", str(error))
        if saved.progress.tokens != segment.start_tokens or saved.tensors[ORIGIN][0] != segment.trial_id:
            raise ValueError(f"{segment.checkpoint_in} is not where trial {segment.trial_id} stopped")
        return None

    def _train(self, job: TrainJob) -> list[SegmentResult]:
        self._send(Beat(job.job_id, job.segments[0].trial_id, "train"))
        for segment in job.segments:
            BEHAVIOUR.during(segment)
        if BEHAVIOUR.heeds_cancel and self._stopping(job.job_id):
            results: Sequence[Any] = BEHAVIOUR.world.interrupt(job, 0.5) or ()
        else:
            results, _ = BEHAVIOUR.world.perform(job)
        return [self._saved(s, result) for s, result in zip(job.segments, results, strict=True)]

    def _saved(self, segment: Segment, result: SegmentResult) -> SegmentResult:
        if not result.checkpoint_out:
            return result
        target = Path(self.setup.checkpoint_path) / result.checkpoint_out
        try:
            write_checkpoint(target, self._base, segment, result, self.setup)
        except OSError as error:
            return replace(untrained(segment, "unwritten", str(error)), seconds=result.seconds)
        return result

    def calibrate(self, job: CalibrateJob) -> Calibration:
        """What the world says, and the ten seconds that it took."""
        (found,), seconds = BEHAVIOUR.world.perform(job)
        assert isinstance(found, Calibration)
        return replace(found, seconds={"calibrate": seconds}, checkpoint_seconds=0.5)

    def score(self, job: ScoreJob) -> Score:
        """What the world says, of a checkpoint that is really there."""
        load_file(Path(self.setup.checkpoint_path) / job.checkpoint / "adapter_model.safetensors")
        (found,), seconds = BEHAVIOUR.world.perform(job)
        assert isinstance(found, Score)
        return replace(found, seconds={"score": seconds})

    def forget(self, quantization: str) -> None:
        """Nothing is resident."""

    def use(self) -> CardUse | None:
        """Nothing was watched."""
        return None

    def close(self) -> None:
        """Nothing is open."""

    def peak_bytes(self) -> int:
        """Nothing is measured."""
        return 1


@cache
def _base(path: str) -> Any:
    return load_base(path, "fp32", "cpu")


def write_checkpoint(
    folder: Path, base: Any, segment: Segment, result: SegmentResult, setup: WorkerSetup
) -> None:
    """A real checkpoint, whose numbers say where it comes from."""
    params = {**segment.params, "rank": int(segment.params["rank"])}
    adapter = _fresh(setup.model_path, int(params["rank"]), setup.targets, setup.model_name)
    mark = origin(segment.trial_id, result.tokens)
    checkpoints.save(
        folder,
        adapter={name: torch.full(tensor.shape, mark) for name, tensor in adapter.exportable().items()},
        config=adapter.config,
        tensors={ORIGIN: torch.tensor([segment.trial_id, result.tokens])},
        progress=Progress(result.tokens, result.tokens // 64),
    )


@cache
def _fresh(path: str, rank: int, targets: str, name: str) -> Adapter:
    return Adapter.fresh(_base(path), {"rank": rank}, targets=targets, seed=0, base_name=name)


def origin(trial_id: int, tokens: int) -> float:
    """What every weight of a trial's adapter is: float32 holds it exactly."""
    return float(trial_id) + float(tokens % 4096) / 4096.0


class FastEngine(LocalEngine):
    """The local engine over forked workers; the clock leaps over what a job is said to have taken."""

    empty_poll = 0.1
    """Real seconds that an empty poll waits; the rest of its time is leapt over. Not less: a worker
    that a loaded machine slows would be taken for one that hangs."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._submitted = 0.0

    def submit(self, job: Job) -> None:
        """Remember when."""
        super().submit(job)
        self._submitted = CLOCKS[-1].now()

    def poll(self, timeout: float) -> list[Report]:
        """Wait a little; where nothing comes, the whole of ``timeout`` has passed all the same."""
        found = super().poll(min(timeout, self.empty_poll))
        if not found and self._job is not None:
            CLOCKS[-1].leap(timeout - self.empty_poll)
        for report in found:
            if isinstance(report, JobEnded):
                taken = sum(sum(getattr(r, "seconds", {}).values()) for r in report.results)
                CLOCKS[-1].leap(self._submitted + taken - CLOCKS[-1].now())
        return found


def install(*, workshop_too: bool = True) -> None:
    """From now on runs of this process are fast ones. For processes that do nothing else."""
    pipes.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=ForkedProcess, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )
    local.LocalEngine = FastEngine  # type: ignore[misc]
    clock.RunClock = LeapClock  # type: ignore[misc]
    deadline.CLOSING_SECONDS = 20.0  # of a machine with other work
    if workshop_too:
        adapters_recipe.Workshop = FastWorkshop  # type: ignore[misc,assignment]
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Place:
    """A folder with a model, data, a space and a cache, ready for runs."""

    path: Path

    def make(self) -> Place:
        """Write everything that a run needs and warm its caches."""
        from budgetsearch.training.data.tokens import Sources, prepare
        from tests.support.rows import write_rows
        from tests.support.tiny import make_tiny_model

        self.path.mkdir(parents=True, exist_ok=True)
        make_tiny_model(self.model)
        write_rows(self.path / "train.jsonl", 200)
        (self.path / "space.yaml").write_text(SPACE, encoding="utf-8")
        prepare(
            self.model.resolve(), Sources(str(self.path / "train.jsonl")), max_length=128,
            cache=self.path / "cache",
        )  # fmt: skip
        _base(str(self.model.resolve()))
        return self

    @property
    def model(self) -> Path:
        """The tiny base model."""
        return self.path / "model"

    def live(
        self, run: Path, arrange: Callable[[], None] = lambda: None, *, seed: int = 0, **more: Any
    ) -> int:
        """One process that starts the run or goes on with it, in a fork that ``arrange`` may spoil; returns
        its process number. What it says goes to ``log``."""

        def work() -> None:
            os.environ["BUDGETSEARCH_CACHE"] = str(self.path / "cache")
            install()
            arrange()
            run_or_resume(self, run, seed=seed, **more)

        return forked(work, self.log)

    def whole_life(self, run: Path, arrange: Callable[[], None] = lambda: None, **more: Any) -> int:
        """``live`` to its end; returns its exit code, or minus its signal."""
        return wait_for(self.live(run, arrange, **more))

    @property
    def log(self) -> Path:
        """What the processes said."""
        return self.path / "lives.log"

    def arguments(self, out: Path, seed: int = 0, **more: Any) -> dict[str, Any]:
        """Of ``budgetsearch.run``."""
        return {
            "model": str(self.model),
            "data": str(self.path / "train.jsonl"),
            "space": str(self.path / "space.yaml"),
            "gpu": "cpu",
            "hours": HOURS,
            "max_length": 128,
            "task_examples": 8,
            "out": out,
            "seed": seed,
            **more,
        }


def run_or_resume(place: Place, run: Path, **more: Any) -> None:
    """Start the run, or go on with it, as its user would."""
    if not run.exists():
        api.run(**place.arguments(run, **more))
        return
    try:
        api.resume(run, progress=True)
    except RunFolderError as error:
        # Killed before anything had happened: whoever reads this starts the run again.
        if "budgetsearch run --out" not in str(error):
            raise
        api.run(**place.arguments(run, **more))


def wait_for(pid: int, seconds: float = 60.0) -> int:
    """The exit code of a fork, or minus its signal."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError("a process does not end")
        time.sleep(0.005)


def forked(work: Callable[[], None], log: Path) -> int:
    """Do ``work`` in a fork whose output goes to ``log``; returns its process number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
        # What the parent's libraries registered for the exit expects threads that a fork has not: it is
        # neither run nor taken apart, for some of it crashes at that too.
        leaving.atexit = SimpleNamespace(_run_exitfuncs=lambda: None)
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


__all__ = ["BEHAVIOUR", "FastEngine", "ForkedProcess", "History", "Place", "PlanRequest", "forked", "install"]
