"""The worker's way from its start to its first result on a card: nothing is asked before CUDA is there."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
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
from budgetsearch.core.reports import JobEnded
from budgetsearch.engines.local import ALLOCATOR, LocalEngine
from budgetsearch.machine.memory import CONTEXT_BYTES
from budgetsearch.machine.watch import LIMIT_SHARE
from budgetsearch.training import bases, memory
from budgetsearch.training.workshop import Workshop
from tests.support.cuda_standin import GIB, REFUSAL, Card, OnCpu, install
from tests.support.training import make_segment

SECONDS = 120.0


@pytest.fixture
def setup(setup: WorkerSetup, tmp_path: Path) -> WorkerSetup:
    """A worker on a card."""
    return replace(setup, checkpoint_path=str(tmp_path), device="cuda:0", limit_bytes=16 * GIB)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """The card that stands in, in this process."""
    return install(lambda module, name, value: monkeypatch.setattr(module, name, value, raising=False))


def ended(engine: LocalEngine, job: Job) -> Any:
    """What becomes of a job."""
    engine.submit(job)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        for report in engine.poll(0.5):
            if isinstance(report, JobEnded):
                return report.results[0]
    raise TimeoutError


def test_a_worker_calibrates_trains_and_scores_on_a_card(setup: WorkerSetup, tmp_path: Path) -> None:
    """The real engine starts the real worker, which meets torch.cuda as it is before anybody started it."""
    engine = LocalEngine(
        setup,
        tmp_path / "worker.log",
        environment={"PYTHONPATH": os.getcwd(), "HF_DEACTIVATE_ASYNC_LOAD": "1"},
        worker="tests.support.cuda_standin",
    )
    segment = make_segment(trial_id=3, stop=300)
    try:
        calibration = ended(engine, CalibrateJob(-1, "fp32", (4,), 4, SECONDS, probe_seconds=0.05))
        result = ended(engine, TrainJob(1, (segment,), eval_examples=2, limit_seconds=SECONDS))
        assert isinstance(result, SegmentResult), result
        score = ended(engine, ScoreJob(2, "fp32", str(result.checkpoint_out), 2, 0, 4, SECONDS))
    finally:
        engine.close()
    words = (tmp_path / "worker.log").read_text(encoding="utf-8")[-2000:]
    assert isinstance(calibration, Calibration) and calibration.status == "ok", words
    assert result.status == "ok", words
    assert isinstance(score, Score) and score.status == "ok", words
    assert result.computed_on["card"] == "Stand-in (compute capability 9.0)"
    assert not torch.cuda.is_initialized()  # the driver itself touches no card


def made(setup: WorkerSetup) -> Workshop:
    """What the worker begins with."""
    with OnCpu():
        return Workshop(setup, lambda message: None, lambda job_id: False)


def test_a_worker_that_does_not_start_cuda_first_does_not_live(
    setup: WorkerSetup, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in refuses as the real one does: without the first line of the workshop its meter fails."""
    monkeypatch.setattr(memory, "wake", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match=REFUSAL.split(":")[0]):
        made(setup)


def test_the_peak_may_be_started_before_cuda_is(card: Card) -> None:
    """Nothing was allocated then, and whoever only wants to look must not take a context on the card."""
    memory.start_peak("cuda:0")
    assert card.calls == [] and not card.started


@pytest.mark.parametrize("context", [0, 3 * CONTEXT_BYTES], ids=["little beside it", "more than foreseen"])
def test_the_allocators_cap_is_where_the_watcher_draws_its_line(
    setup: WorkerSetup, card: Card, monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    """A cache beyond it would look full for ever, and what the card holds beside it counts, as foreseen or as
    measured; cuDNN's attention is out, and CUDA is on."""
    was = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(Workshop, "_context_bytes", lambda workshop: context)
    workshop = made(setup)
    try:
        workshop._begin(TrainJob(1, (make_segment(),), eval_examples=1, limit_seconds=1.0))
        assert card.fraction is not None and setup.limit_bytes is not None
        line = LIMIT_SHARE * setup.limit_bytes - max(CONTEXT_BYTES, context)
        assert line == pytest.approx(card.fraction * card.total)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        workshop.close()
        torch.backends.cuda.enable_cudnn_sdp(was)


def test_whoever_loads_a_base_leaves_cudnn_out_of_attention(
    setup: WorkerSetup, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server has no workshop, and each token that it writes is a shape that cuDNN has not seen yet."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # its threads know no stand-in
    was = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        with OnCpu():
            bases.load_base(setup.model_path, "fp32", "cuda:0")
        assert card.started and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


def test_two_bases_stay_where_only_the_cache_is_in_their_way(card: Card) -> None:
    """What the last job's tensors took is given back before anybody looks how much is free."""
    memory.wake("cuda:0")
    card.cached = 23 * GIB
    pool = bases.BasePool("", "cuda:0")
    pool._models, pool._bytes = {"bf16": object()}, {"bf16": GIB}
    pool._make_room("nf4")
    assert list(pool._models) == ["bf16"]


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, ALLOCATOR), ({"PYTORCH_ALLOC_CONF": "backend:native"}, {}), ({next(iter(ALLOCATOR)): "x"}, {})],
)
def test_the_workers_allocator_grows_its_blocks_unless_the_user_says_otherwise(
    own: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The worker's environment; the user's own stays."""
    for name in ("PYTORCH_ALLOC_CONF", *ALLOCATOR):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    found = LocalEngine(None, tmp_path / "log")._environment
    assert expected == {name: found[name] for name in ALLOCATOR if name in found}
