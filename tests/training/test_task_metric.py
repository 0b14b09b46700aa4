"""A task of lm-eval as the metric: base and adapter are asked its documents, one number for each."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from budgetsearch.core.records import ScoreJob
from budgetsearch.tools.compare import harness as comparing
from budgetsearch.tools.compare.tasks import Task
from budgetsearch.training import score as scoring
from budgetsearch.training.adapters import worn
from budgetsearch.training.data.tokenizer import load_tokenizer
from budgetsearch.training.members import Shop
from budgetsearch.training.score import metric_of, time_answers
from budgetsearch.training.task_metric import MAX_FAILURES, Sitting, TaskMetric, seeded
from tests.support.local_tasks import write_choice_task, write_own_tasks
from tests.support.training import base, make_segment

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval)")

DOCUMENTS = 8
BLACK = (3,)
"""Documents that the code of one task fails for."""


@pytest.fixture
def definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks on local files; comparisons know no others, for to list lm-eval's own takes long."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "definitions"
    write_choice_task(folder)
    write_own_tasks(folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(comparing, "task_manager", lambda folder: manager)
    return folder


@pytest.fixture
def checkpoint(shop: Shop, tiny_model: Path) -> Path:
    """An adapter of random weights that change what the base says."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(
        r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    folder = shop.checkpoint_path / "trial0003"
    get_peft_model(base(tiny_model), lora).save_pretrained(folder)
    return folder


def asking(shop: Shop, definitions: Path, name: str) -> Shop:
    """The same with a task as the metric."""
    task = TaskMetric.load(f"lm_eval:{definitions / name}_local.yaml", "/")
    assert (f"lm_eval:{name}_local", "", 12) == (task.metric, task.trouble, len(task.documents))
    return dataclasses.replace(shop, task=task)


def compared(model: Any, tiny_model: Path, definitions: Path, name: str) -> tuple[float, ...]:
    """What ``compare --tasks`` finds."""
    task = Task(f"{name}_local", f"{name}_local")
    return comparing.ask_harness(
        model, load_tokenizer(tiny_model), task, limit=DOCUMENTS, folder=definitions, chat=False, batch=3
    ).grades


@pytest.mark.parametrize("name", ["surprise", "choices"])
def test_base_and_adapter_have_the_values_that_a_comparison_finds(
    name: str, shop: Shop, checkpoint: Path, definitions: Path, tiny_model: Path
) -> None:
    """By the adapter's weights, and not by the base's, which is bare again afterwards; graded by lm-eval, or
    by code that lies beside the definition. The accuracy on validation rows is measured as ever."""
    model, graded = base(tiny_model), asking(shop, definitions, name)
    plain = compared(model, tiny_model, definitions, name)
    tuned = compared(worn(base(tiny_model), checkpoint), tiny_model, definitions, name)
    if name == "surprise":
        assert not set(plain) & set(tuned)
    values, detail = metric_of(model, checkpoint, make_segment(answers=DOCUMENTS, micro_batch=2), graded)
    assert ("", pytest.approx(values, abs=1e-4)) == (detail, tuned)
    assert not hasattr(model, "peft_config")
    job = ScoreJob(1, "fp32", checkpoint.name, 0, DOCUMENTS, 2, 600.0)
    found = scoring.score(model, job, graded, time.monotonic())
    assert pytest.approx(found.adapter_metric, abs=1e-4) == tuned
    assert pytest.approx(found.base_metric, abs=1e-4) == plain
    assert found.task_examples == len(list(shop.data.questions()))


def test_what_is_said_is_the_adapters_and_what_fails_costs_its_document(
    shop: Shop, checkpoint: Path, definitions: Path, tiny_model: Path
) -> None:
    """Generated; with time to spare all documents are asked, both models the same ones."""
    model, graded = base(tiny_model), asking(shop, definitions, "spoken")
    segment = make_segment(answers=DOCUMENTS, micro_batch=1)
    values, detail = metric_of(model, checkpoint, segment, graded)
    assert [place for place, value in enumerate(values) if value is None] == list(BLACK)
    assert "lm_eval:spoken_local gave no number for 1 documents (ValueError: no such colour)" == detail
    job = ScoreJob(1, "fp32", checkpoint.name, 0, 4, 1, 600.0, further=True)
    found = scoring.score(model, job, graded, time.monotonic())
    assert 12 == len(found.base_metric) == len(found.adapter_metric)
    assert values == found.adapter_metric[:DOCUMENTS]
    assert found.base_metric != found.adapter_metric
    (again, _) = metric_of(model, checkpoint, dataclasses.replace(segment, answers=600), graded)
    assert found.adapter_metric == again


def test_the_clock_is_kept_token_by_token(
    shop: Shop, checkpoint: Path, definitions: Path, tiny_model: Path
) -> None:
    """What was answered in time stands; the calibration reckons with the rest of what it gave up."""
    model, graded = base(tiny_model), asking(shop, definitions, "spoken")
    passes = itertools.count()
    late = dataclasses.replace(graded, stopping=lambda: next(passes) >= 40)
    values, _ = metric_of(model, checkpoint, make_segment(answers=DOCUMENTS, micro_batch=1), late)
    known = [value for value in values if value is not None]
    assert (DOCUMENTS, True) == (len(values), 0 < len(known) < DOCUMENTS - 1)
    assert not hasattr(model, "peft_config")
    whole = time_answers(model, graded, 1, 60.0)
    begun = itertools.count()
    given_up = time_answers(model, dataclasses.replace(graded, stopping=lambda: next(begun) >= 6), 1, 60.0)
    assert whole > 0
    assert given_up > whole / 8


def test_a_task_that_cannot_be_asked_costs_no_run(
    shop: Shop, checkpoint: Path, definitions: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is gone, or every question fails: there are no values, and it is said why. Memory that runs
    out makes the batches smaller."""
    gone = TaskMetric.load(f"lm_eval:{definitions}/nothing.yaml", "/")
    segment, model = make_segment(answers=DOCUMENTS, micro_batch=2), base(tiny_model)
    values, detail = metric_of(model, checkpoint, segment, dataclasses.replace(shop, task=gone))
    assert ((), True) == (values, "cannot be asked here (TaskError: there is no file" in detail)
    assert 0.0 == time_answers(model, dataclasses.replace(shop, task=gone), 2, 1.0)

    graded, asked, batches = asking(shop, definitions, "choices"), Sitting._asked, list[int]()

    def fails(sitting: Sitting, documents: Any) -> Any:
        batches.append(sitting.batch)
        raise RuntimeError("no")

    def fits_two(sitting: Sitting, documents: Any) -> Any:
        batches.append(sitting.batch)
        if sitting.batch > 2:
            raise MemoryError
        return asked(sitting, documents)

    monkeypatch.setattr(Sitting, "_asked", fails)
    values, detail = metric_of(model, checkpoint, dataclasses.replace(segment, answers=12), graded)
    assert ((), True, 3) == (values, "12 documents (RuntimeError: no)" in detail, len(batches))
    assert len(batches) <= MAX_FAILURES
    monkeypatch.setattr(Sitting, "_asked", fits_two)
    batches.clear()
    values, detail = metric_of(model, checkpoint, segment, graded)
    assert ([4, 2, 2], "") == (batches, detail)
    assert None not in values


def test_training_goes_on_with_its_own_random_numbers() -> None:
    """Whoever samples in a task draws the same each time, and nothing of it is left."""
    before = torch.get_rng_state(), random.getstate()
    drawn = []
    for _ in range(2):
        with seeded("cpu"):
            drawn.append((torch.rand(1).item(), random.random()))
    assert drawn[0] == drawn[1]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
