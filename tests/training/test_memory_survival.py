"""Memory runs out in the middle of a segment of the real trainer: the run goes on as if it had not."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import budgetsearch
from budgetsearch.core.events import Entry, SegmentEnded, SegmentStarted
from budgetsearch.core.history.history import History
from budgetsearch.core.records import Job, Schedule, Segment, SegmentResult, TrainJob, WorkerSetup
from budgetsearch.core.reports import Beat, JobEnded, Notice, Report
from budgetsearch.engines.worker import execute
from budgetsearch.machine.detect import Card
from budgetsearch.machine.memory import CONTEXT_BYTES
from budgetsearch.machine.profiles import profile
from budgetsearch.run import preflight
from budgetsearch.storage.ledger import read_history
from budgetsearch.training import checkpoints
from budgetsearch.training.members import OTHERS, OWN
from budgetsearch.training.memory import is_memory_error
from budgetsearch.training.recipe import GangTraining
from budgetsearch.training.workshop import Workshop
from tests.support.fake_nvml import GIB, FakeCard, FakePynvml

LIMIT = 10 * GIB
UUID = "GPU-aaaa0000"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    """A card of 40 GiB that NVML shows; nothing computes on it."""
    found = FakeCard(uuid=UUID, total=40 * GIB, used=GIB, percent=80, milliwatts=200_000)
    found.processes = [(os.getpid(), GIB)]
    fake, meter = FakePynvml(found), itertools.count(0, 10**6)
    monkeypatch.setattr(fake, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: next(meter))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return found


@pytest.fixture
def setup(setup: WorkerSetup, tmp_path: Path) -> WorkerSetup:
    """A worker on the CPU whose memory is that of the card."""
    return replace(setup, checkpoint_path=str(tmp_path), card_uuid=UUID, limit_bytes=LIMIT)


def job() -> TrainJob:
    """Two members with an effective batch of 8, half of it at a time."""
    segments = tuple(
        Segment(
            trial_id=number,
            params={"quantization": "fp32", "rank": 4, "learning_rate": 1e-2, "dropout": 0.1},
            seed=number,
            rung=0,
            start_tokens=0,
            stop_tokens=6000,
            schedule=Schedule(200, 6000),
            batch_size=8,
            micro_batch=4,
        )
        for number in range(2)
    )
    return TrainJob(0, segments, eval_examples=4, limit_seconds=600.0)


def trained(setup: WorkerSetup, folder: Path, sent: list[Any]) -> tuple[SegmentResult, ...]:
    """What a worker makes of the job, with its checkpoints in a folder of their own."""
    folder.mkdir()
    workshop = Workshop(replace(setup, checkpoint_path=str(folder)), sent.append, lambda job_id: False)
    try:
        return workshop.train(job())
    finally:
        workshop.close()


Trouble = Callable[[Workshop, FakeCard], None]


def allocator(workshop: Workshop, card: FakeCard) -> None:
    """torch finds no room for a tensor."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def own_use(workshop: Workshop, card: FakeCard) -> None:
    """A step comes near the cap; between two steps nothing of it is left to be seen."""
    peaks = iter([round(0.98 * LIMIT) - CONTEXT_BYTES])
    workshop._meter.step = lambda: next(peaks, GIB)  # type: ignore[method-assign]


def another_process(workshop: Workshop, card: FakeCard) -> None:
    """Another process takes what was free."""
    card.used = card.total - 50 * 2**20
    card.processes = [(os.getpid(), GIB), (4242, card.used - GIB)]
    for _ in range(2):
        workshop.watcher.take()


@pytest.mark.parametrize("trouble", [allocator, own_use, another_process], ids=lambda f: f.__name__)
def test_a_segment_goes_on_as_if_nothing_had_been(
    trouble: Trouble, setup: WorkerSetup, card: FakeCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer at once from the last step on: the same batches, losses and weights, and it is told."""
    sent: list[Any] = []
    calm = trained(setup, tmp_path / "calm", sent)
    assert not any(isinstance(message, Notice) for message in sent)
    assert [(r.status, r.gang, r.micro_batch) for r in calm] == [("ok", 2, 4)] * 2

    sent.clear()
    passes = iter(range(10**6))
    step_on, made = GangTraining.step_on, []
    begun = Workshop.__init__

    def remembered(self: Workshop, *args: Any) -> None:
        made.append(self)
        begun(self, *args)

    def interrupted(self: GangTraining, gang: Any, group: Any) -> None:
        if next(passes) == 7:  # in the middle of the fourth step
            trouble(made[-1], card)
        step_on(self, gang, group)

    monkeypatch.setattr(Workshop, "__init__", remembered)
    monkeypatch.setattr(GangTraining, "step_on", interrupted)
    rough = trained(setup, tmp_path / "rough", sent)

    assert [(r.status, r.gang, r.micro_batch) for r in rough] == [("ok", 1, 4)] * 2
    told = [message.text for message in sent if isinstance(message, Notice)]
    assert any("went on with 1" in text for text in told)
    if trouble is another_process:
        assert any("nother process" in text for text in told)
    expected = {allocator: "out of memory", own_use: OWN, another_process: OTHERS}[trouble]
    assert all(expected in result.detail for result in rough)
    assert {result.yielded for result in rough} == {trouble is another_process}
    for before, after in zip(calm, rough, strict=True):
        assert (before.tokens, before.steps) == (after.tokens, after.steps)
        assert before.loss == pytest.approx(after.loss, rel=1e-4)
        assert before.train_loss == pytest.approx(after.train_loss, rel=1e-4)
        expected = checkpoints.load(tmp_path / "calm" / str(before.checkpoint_out)).tensors
        found = checkpoints.load(tmp_path / "rough" / str(after.checkpoint_out)).tensors
        for name, tensor in expected.items():
            assert torch.allclose(tensor, found[name], rtol=1e-3, atol=1e-5), name


def test_a_full_card_that_stays_full_shrinks_to_one_row_and_no_further(
    setup: WorkerSetup, card: FakeCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing smaller is possible then, and the allocator still has the last word."""
    monkeypatch.setattr("budgetsearch.training.workshop.RELIEF_SECONDS", 0.0)
    card.used = card.total - 2**20
    sent: list[Any] = []
    found = trained(setup, tmp_path / "full", sent)
    assert [(r.status, r.gang, r.micro_batch) for r in found] == [("ok", 1, 1)] * 2


def test_what_nobody_holds_is_given_back_before_anything_shrinks(
    setup: WorkerSetup, card: FakeCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator's cache counts as used: freeing it is enough."""

    def freed(device: str) -> None:
        card.used = GIB

    monkeypatch.setattr("budgetsearch.training.workshop.memory.empty_cache", freed)
    card.used = card.total - 2**20
    found = trained(setup, tmp_path / "cache", [])
    assert [(r.gang, r.micro_batch) for r in found] == [(2, 4)] * 2


def test_the_job_tells_what_it_did_to_the_card(setup: WorkerSetup, card: FakeCard, tmp_path: Path) -> None:
    """Peak, mean utilization and energy of this job; heartbeats carry the last look."""
    sent: list[Any] = []
    workshop = Workshop(setup, sent.append, lambda job_id: False)
    workshop.train(job())
    use = workshop.use()
    workshop.close()
    assert use.peak_bytes == GIB
    assert use.utilization == pytest.approx(0.8)
    beats = [message for message in sent if isinstance(message, Beat)]
    assert {(beat.used_bytes, beat.utilization, beat.watts) for beat in beats} == {(GIB, 0.8, 200.0)}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(`", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_a_library_without_room_for_its_workspace_is_out_of_memory(words: str, expected: bool) -> None:
    """cuBLAS and cuDNN allocate beside torch's allocator: a smaller micro-batch leaves them room."""
    assert expected == is_memory_error(RuntimeError(words))


# ------------------------------------------------------------------- a whole run


class InProcess:
    """The engine of one worker, without its process, so that a test can reach into it."""

    slots = 1

    def __init__(self, setup: Any, log: Path, **rest: Any) -> None:
        self.job: Job | None = None
        self.reports: list[Report] = []
        self.workshop: Workshop | None = None

    def warm_up(self) -> None:
        """Nothing to start."""

    def prepare(self, setup: WorkerSetup) -> None:
        """Take the setup."""
        self.workshop = Workshop(setup, self.reports.append, lambda job_id: False)

    def submit(self, job: Job) -> None:
        """Remember the job."""
        self.job = job

    def poll(self, timeout: float) -> Sequence[Report]:
        """Do it."""
        if self.job is not None and self.workshop is not None:
            job, self.job = self.job, None
            results = execute(self.workshop, job)
            self.reports.append(JobEnded(job.job_id, results, self.workshop.use()))
        found, self.reports[:] = list(self.reports), []
        return found

    def cancel(self, job_id: int) -> None:
        """Nothing can be interrupted."""

    kill = cancel

    def close(self) -> None:
        """Let go of the card."""
        if self.workshop is not None:
            self.workshop.close()


class Neighbour:
    """Takes the card's memory during the first segment, and gives it back at its end."""

    def __init__(self, card: FakeCard) -> None:
        self.card, self.there = card, False

    def see(self, entry: Entry, history: History) -> None:
        """See the port ``Watcher``."""
        if isinstance(entry.event, SegmentStarted) and not self.there:
            self.there = True
            self.card.used = self.card.total - 2**20
            self.card.processes.append((4242, self.card.used - GIB))
        elif isinstance(entry.event, SegmentEnded):
            self.card.used = GIB
            del self.card.processes[1:]


@pytest.fixture
def on_the_card(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    """Runs of this process believe that they train on the card."""
    found = Card(profile("cpu"), "cpu", card.name, 30 * GIB, card.total, index=0, uuid=UUID)
    monkeypatch.setattr(preflight, "detect", lambda *args, **kwargs: found)
    monkeypatch.setattr("budgetsearch.engines.local.LocalEngine", InProcess)
    return card


@pytest.mark.slow
def test_a_run_survives_a_neighbour_and_its_ledger_tells(
    on_the_card: FakeCard, tiny_model: Path, rows_file: Path, session_cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The budget is kept, the adapter is there, and ledger, report and status say what happened."""
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(session_cache))
    result = budgetsearch.run(
        model=str(tiny_model), data=str(rows_file), gpu="cpu", hours=45 / 3600, out=tmp_path / "run",
        batch_size=8, max_length=128, watchers=[Neighbour(on_the_card)],
    )  # fmt: skip
    assert result.state == "finished"
    assert result.spent_seconds <= 45
    history = read_history(result.ledger)
    told = " / ".join(text for _, text in history.notices)
    assert OTHERS in told
    assert "nother process" in told
    first = history.results[0][1]
    assert first.status == "ok"
    assert OTHERS in first.detail
    assert first.yielded
    assert all(state.dead is None for state in history.trials.values())
    assert sum(use.joules or 0.0 for use in history.uses) >= 1000 * len(history.uses)
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "Noticed on the way" in report
    assert "kWh" in report
    assert OTHERS in str(budgetsearch.status(tmp_path / "run")["notices"])
