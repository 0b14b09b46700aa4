"""Every engine passes the contract; the local one also survives what can happen to processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.errors import EngineError
from budgetsearch.core.records import SegmentResult, WorkerSetup
from budgetsearch.core.reports import Beat
from budgetsearch.engines import local as local_engine
from budgetsearch.engines import worker
from budgetsearch.engines.contract import EngineContract, Harness, await_end, segment, train_job
from budgetsearch.engines.local import LocalEngine
from budgetsearch.engines.simulator import SimulatorEngine, VirtualClock
from tests.support.processes import check_gone
from tests.support.worlds import SyntheticWorld


class TestSimulator(EngineContract):
    """The simulator, on virtual time."""

    @pytest.fixture
    def harness(self) -> Harness:
        """A synthetic world."""
        clock = VirtualClock()
        engine = SimulatorEngine(SyntheticWorld(), clock)
        return Harness(engine, 100, 100_000, lambda: clock.advance(5.0))


@pytest.fixture(scope="module")
def shared(setup: WorkerSetup) -> Iterator[LocalEngine]:
    """A local engine with a real worker process, which takes seconds to start."""
    engine = LocalEngine(setup, Path(setup.checkpoint_path) / "worker.log")
    yield engine
    engine.close()


@pytest.fixture
def local(shared: LocalEngine) -> Iterator[LocalEngine]:
    """The shared engine, idle again after the test."""
    yield shared
    if shared._job is not None:
        shared.close()


def wait_for_beat(engine: LocalEngine) -> None:
    """Poll until the running job gives a sign of life."""
    for _ in range(240):
        if any(isinstance(report, Beat) for report in engine.poll(0.5)):
            return
    raise AssertionError("no heartbeat in two minutes")


class TestLocal(EngineContract):
    """A worker process, real training on the tiny model."""

    @pytest.fixture
    def harness(self, local: LocalEngine) -> Harness:
        """Real training of a tiny model."""
        return Harness(local, 400, 50_000_000, lambda: wait_for_beat(local))


def test_a_second_job_on_a_busy_slot_is_refused(local: LocalEngine) -> None:
    """There is one slot."""
    first = train_job(segment(0, 50_000_000))
    local.submit(first)
    with pytest.raises(EngineError, match=f"while job {first.job_id} runs"):
        local.submit(train_job(segment(1, 100)))


def test_a_worker_that_always_dies_is_given_up_with_its_last_words(
    setup: WorkerSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some deaths in a row the error carries the log's end and its path."""
    import dataclasses

    monkeypatch.setattr(local_engine, "MAX_DEATHS", 2)
    broken = dataclasses.replace(setup, data_path=str(tmp_path / "nowhere"))
    engine = LocalEngine(broken, tmp_path / "worker.log")
    for _ in range(2):
        job = train_job(segment(0, 100))
        engine.submit(job)
        (result,) = await_end(engine, job.job_id).results
        assert result.status == "crashed"
    with pytest.raises(EngineError, match=r"died 2 times(.|\n)*worker\.log"):
        engine.submit(train_job(segment(0, 100)))
    engine.close()


def test_a_worker_that_has_worked_is_started_more_often(
    setup: WorkerSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three configurations in a row that kill it, each tried twice, end no search that goes well."""
    monkeypatch.setattr(local_engine, "MAX_DEATHS", 1)
    engine = LocalEngine(setup, tmp_path / "worker.log")
    statuses = []
    for kill in (False, True, True, False):
        job = train_job(segment(0, 100_000 if kill else 100))
        engine.submit(job)
        if kill:
            engine.end()
        statuses += [result.status for result in await_end(engine, job.job_id).results]
    assert ["ok", "crashed", "crashed", "ok"] == statuses
    engine.close()


def test_an_orphaned_worker_ends_with_its_driver(setup: WorkerSetup, tmp_path: Path) -> None:
    """kill -9 of the process that owns the engine: its worker is gone soon after."""
    script = f"""
import sys
from pathlib import Path
from budgetsearch.core.records import WorkerSetup
from budgetsearch.engines.local import LocalEngine
from budgetsearch.engines.contract import segment, train_job
engine = LocalEngine(WorkerSetup(**{vars(setup)!r}), Path({str(tmp_path / "worker.log")!r}))
engine.submit(train_job(segment(0, 50_000_000)))
print(engine._process.pid, flush=True)
while True:
    engine.poll(1.0)
"""
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    worker = int(owner.stdout.readline())
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    check_gone(worker, "the worker outlived its driver")


@pytest.mark.parametrize("line", ['{"is": "TrainJob", "job_', "[]"])
def test_what_is_no_order_ends_the_worker_and_is_said(line: str) -> None:
    """A thread that dies in silence would leave the driver waiting until its deadline."""
    command = [sys.executable, "-P", "-m", "budgetsearch.engines.worker"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(f"{line}\n")
        process.stdin.flush()  # the driver goes on listening
        assert worker.EXIT_BROKEN == process.wait(timeout=60)
        assert "an order cannot be understood" in process.stderr.read()


class LostCard:
    """Starts processes that find their card gone, as the worker reports it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started = 0
        real = subprocess.Popen

        def popen(arguments: list[str], **options: Any) -> Any:
            self.started += 1
            code = "import sys; sys.stdin.readline(); sys.stdin.readline(); sys.exit(3)"
            return real([sys.executable, "-c", code], **options)

        monkeypatch.setattr(local_engine.subprocess, "Popen", popen)


def test_a_lost_card_is_no_fault_of_the_trial(
    setup: WorkerSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its segments come back as if they had not begun; if it stays away the run ends with what to do."""
    card = LostCard(monkeypatch)
    engine = LocalEngine(setup, tmp_path / "worker.log")
    started = segment(0, 400, start=200, checkpoint="trial0000-before")
    for _ in range(2):
        job = train_job(started)
        engine.submit(job)
        (result,) = await_end(engine, job.job_id).results
        assert isinstance(result, SegmentResult)
        assert (result.status, result.tokens) == ("stranded", started.start_tokens)
        assert result.checkpoint_out is None
        assert "card is lost" in result.detail
    with pytest.raises(EngineError, match=r"card does not answer.*budgetsearch resume RUN"):
        engine.submit(train_job(started))
    assert card.started == 2
    engine.close()


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("CUDA error: GPU is lost. Reboot the system to recover this GPU", True),
        ("No CUDA GPUs are available", True),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", True),
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("CUDA error: device not ready", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("shape '[2, 3]' is invalid for input of size 5", False),
    ],
)
def test_what_says_that_the_card_is_gone(message: str, lost: bool) -> None:
    """A bug of a kernel is the trial's own; a card that fell off the bus is nobody's."""
    assert worker.is_lost(RuntimeError(message)) is lost


def test_a_worker_that_was_ended_for_the_time_did_not_die(local: LocalEngine) -> None:
    """What is told of its job says so, and does not end in a colon with nothing behind it."""
    job = train_job(segment(0, 50_000_000))
    local.submit(job)
    wait_for_beat(local)
    local.kill(job.job_id)
    (result,) = await_end(local, job.job_id).results
    assert "the worker was ended, for its time was over" == result.detail
