"""The recipe on a tiny model: exact resume, exact accumulation, loadable checkpoints, clean bases."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from budgetsearch.core.errors import CheckpointError
from budgetsearch.core.records import Schedule, Segment
from budgetsearch.training import checkpoints
from budgetsearch.training.bases import BasePool, load_base
from budgetsearch.training.evaluate import example_losses, mean_loss
from budgetsearch.training.recipe import Shop, TrialTraining, train_segment
from budgetsearch.training.tokens import PreparedData, prepare

PARAMS = {"quantization": "fp32", "rank": 4, "alpha": 8, "learning_rate": 1e-2, "dropout": 0.1}


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, rows_file: Path, session_cache: Path) -> PreparedData:
    """The tokenized rows."""
    return prepare(tiny_model, str(rows_file), None, seed=0, max_length=128, cache=session_cache)


@pytest.fixture
def shop(prepared: PreparedData, tiny_model: Path, tmp_path: Path) -> Shop:
    """What segments share, with checkpoints in a folder of the test's own."""
    return Shop(
        data=prepared,
        model_path=tiny_model,
        checkpoint_path=tmp_path,
        device="cpu",
        targets="all-linear",
        base_name=str(tiny_model),
        seed=0,
        pad=0,
        beat=lambda activity, tokens, loss: None,
        stopping=lambda: False,
        peak_bytes=lambda: 1,
    )


def make_segment(start: int = 0, stop: int = 1500, **changes: Any) -> Segment:
    """A segment of the trial under test."""
    segment = Segment(
        trial_id=3,
        params=PARAMS,
        seed=7,
        rung=0,
        start_tokens=start,
        stop_tokens=stop,
        schedule=Schedule(warmup_tokens=300, stop_tokens=3000, cooldown_tokens=600),
        batch_size=4,
        micro_batch=4,
    )
    return dataclasses.replace(segment, **changes)


def base(tiny_model: Path) -> Any:
    """A fresh base model."""
    return load_base(str(tiny_model), "fp32", "cpu")


@pytest.mark.parametrize("quantization", ["fp32", "nf4"])
def test_a_paused_trial_equals_one_that_was_never_paused(
    shop: Shop, tiny_model: Path, quantization: str
) -> None:
    """Weights, average, moments, random-number state and losses are bit-equal, dropout included,
    and another trial ran on the same base in between."""
    params = {**PARAMS, "quantization": quantization}
    fresh = load_base(str(tiny_model), quantization, "cpu")
    whole, bare = train_segment(fresh, make_segment(0, 3000, params=params), shop, 8)
    first, bare = train_segment(bare, make_segment(0, 1500, trial_id=4, params=params), shop, 8)
    _, bare = train_segment(bare, make_segment(0, 400, trial_id=5, seed=99, params=params), shop, 8)
    rest = make_segment(first.tokens, 3000, trial_id=4, checkpoint_in=first.checkpoint_out, params=params)
    resumed, _ = train_segment(bare, rest, shop, 8)
    assert whole.tokens == resumed.tokens
    assert whole.example_losses == resumed.example_losses
    expected = checkpoints.load(shop.checkpoint_path / str(whole.checkpoint_out))
    actual = checkpoints.load(shop.checkpoint_path / str(resumed.checkpoint_out))
    assert expected.progress == actual.progress
    assert expected.tensors.keys() == actual.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(tensor, actual.tensors[name]), name


def test_training_lowers_the_validation_loss(shop: Shop, tiny_model: Path, prepared: PreparedData) -> None:
    """A few dozen steps are clearly better than the bare base."""
    model = base(tiny_model)
    before = mean_loss(*example_losses(model, prepared.valid, 8, pad=0, device="cpu"))
    result, _ = train_segment(model, make_segment(0, 6000), shop, 8)
    assert result.status == "ok"
    assert result.loss is not None
    assert result.loss < 0.8 * before


def test_half_the_micro_batch_gives_the_same_gradient(shop: Shop, tiny_model: Path) -> None:
    """One step with micro-batches of 4, 2 and 1 leads to the same weights, to rounding."""
    params = {**PARAMS, "dropout": 0.0}
    found = []
    for micro in (4, 2, 1):
        segment = make_segment(0, 1, micro_batch=micro, params=params)
        training = TrialTraining.set_up(base(tiny_model), segment, shop)
        training.adapter.model.train()
        training.step_on([3, 11, 20, 41])
        found.append({n: p.detach().clone() for n, p in training.adapter.weights.items()})
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.allclose(tensor, other[name], atol=1e-5), name


@pytest.mark.parametrize("quantization", ["fp32", "bf16", "int8", "nf4"])
def test_a_checkpoint_is_a_peft_adapter_with_the_reported_loss(
    shop: Shop, tiny_model: Path, prepared: PreparedData, quantization: str
) -> None:
    """``PeftModel.from_pretrained`` loads it, and on a fresh base the loss of every example is the
    reported one, under every quantization."""
    from peft import PeftModel

    params = {**PARAMS, "quantization": quantization}
    resident = load_base(str(tiny_model), quantization, "cpu")
    _, resident = train_segment(resident, make_segment(0, 300, trial_id=1, params=params), shop, 8)
    result, _ = train_segment(resident, make_segment(0, 1500, params=params), shop, 8)
    fresh = load_base(str(tiny_model), quantization, "cpu")
    model = PeftModel.from_pretrained(fresh, shop.checkpoint_path / str(result.checkpoint_out))
    losses, targets = example_losses(model.eval(), prepared.valid, 8, pad=0, device="cpu", batch=4)
    assert result.example_losses == pytest.approx(losses, abs=1e-5)
    assert result.loss == pytest.approx(mean_loss(losses, targets), abs=1e-5)


def test_the_base_is_bare_and_unchanged_after_a_trial(shop: Shop, tiny_model: Path) -> None:
    """Same modules, same bits: the next trial finds the base as it was loaded."""
    model = base(tiny_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, bare = train_segment(model, make_segment(0, 800), shop, 8)
    after = bare.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("rate", [1e6, float("nan")])
def test_a_diverging_trial_is_a_result_and_leaves_the_base_clean(
    shop: Shop, tiny_model: Path, rate: float
) -> None:
    """It is reported as diverged, without a checkpoint, and a good trial trains on the same base."""
    wild = make_segment(0, 6000, params={**PARAMS, "learning_rate": rate})
    result, bare = train_segment(base(tiny_model), wild, shop, 8)
    assert result.status == "diverged"
    assert result.checkpoint_out is None
    good, _ = train_segment(bare, make_segment(0, 800), shop, 8)
    alone, _ = train_segment(base(tiny_model), make_segment(0, 800, trial_id=9), shop, 8)
    assert alone.example_losses == good.example_losses


def test_a_segment_told_to_stop_checkpoints_where_it_is(shop: Shop, tiny_model: Path) -> None:
    """It ends early as cancelled, and going on from its checkpoint gives the uninterrupted result."""
    calls = [0]

    def stopping() -> bool:
        calls[0] += 1
        return calls[0] > 5

    hasty = dataclasses.replace(shop, stopping=stopping)
    early, bare = train_segment(base(tiny_model), make_segment(0, 3000), hasty, 8)
    assert early.status == "cancelled"
    assert 0 < early.tokens < 3000
    rest = make_segment(early.tokens, 3000, checkpoint_in=early.checkpoint_out, attempt=1)
    resumed, _ = train_segment(bare, rest, shop, 8)
    whole, _ = train_segment(base(tiny_model), make_segment(0, 3000, trial_id=8), shop, 8)
    assert whole.example_losses == resumed.example_losses


def test_a_damaged_checkpoint_is_named(shop: Shop, tiny_model: Path) -> None:
    """One changed byte is found by its checksum; a missing file as well."""
    result, _ = train_segment(base(tiny_model), make_segment(0, 300), shop, 8)
    folder = shop.checkpoint_path / str(result.checkpoint_out)
    file = folder / checkpoints.STATE_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"trainer\.safetensors has changed"):
        checkpoints.load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.load(folder)


@pytest.mark.parametrize("quantization", ["bf16", "nf4", "int8"])
def test_quantized_bases_train_on_the_cpu(shop: Shop, tiny_model: Path, quantization: str) -> None:
    """Every quantization of the spaces is real: forward, backward and a falling loss."""
    pool = BasePool(str(tiny_model), "cpu")
    model, seconds = pool.get(quantization)
    assert seconds > 0
    params = {**PARAMS, "quantization": quantization}
    short, bare = train_segment(model, make_segment(0, 300, params=params), shop, 8)
    long, bare = train_segment(bare, make_segment(0, 4000, params=params), shop, 8)
    pool.replace(quantization, bare)
    assert pool.get(quantization) == (bare, 0.0)
    assert short.loss is not None
    assert long.loss is not None
    assert long.loss < short.loss
