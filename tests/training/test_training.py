"""The recipe on a tiny model: exact resume, exact accumulation, loadable checkpoints, clean bases."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from budgetsearch.core.errors import CheckpointError
from budgetsearch.training import checkpoints
from budgetsearch.training.bases import BasePool, load_base
from budgetsearch.training.data.tokens import PreparedData
from budgetsearch.training.evaluate import example_losses, mean_loss
from budgetsearch.training.members import Shop
from budgetsearch.training.recipe import GangTraining
from tests.support.training import PARAMS, base, make_segment, train


@pytest.mark.parametrize("quantization", ["fp32", "nf4"])
def test_a_paused_trial_equals_one_that_was_never_paused(
    shop: Shop, tiny_model: Path, quantization: str
) -> None:
    """Weights, average, moments, random-number state and losses are bit-equal, dropout included,
    and another trial ran on the same base in between."""
    params = {**PARAMS, "quantization": quantization}
    fresh = load_base(str(tiny_model), quantization, "cpu")
    whole = train(fresh, make_segment(0, 3000, params=params), shop)
    first = train(fresh, make_segment(0, 1500, trial_id=4, params=params), shop)
    train(fresh, make_segment(0, 400, trial_id=5, seed=99, params=params), shop)
    rest = make_segment(first.tokens, 3000, trial_id=4, checkpoint_in=first.checkpoint_out, params=params)
    resumed = train(fresh, rest, shop)
    assert whole.tokens == resumed.tokens
    assert whole.example_losses == resumed.example_losses
    expected = checkpoints.load(shop.checkpoint_path / str(whole.checkpoint_out))
    actual = checkpoints.load(shop.checkpoint_path / str(resumed.checkpoint_out))
    assert expected.progress == actual.progress
    for one, other in ((expected.tensors, actual.tensors), (expected.adapter, actual.adapter)):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name


def test_training_lowers_the_validation_loss(shop: Shop, tiny_model: Path, prepared: PreparedData) -> None:
    """A few dozen steps are clearly better than the bare base."""
    model = base(tiny_model)
    (losses,) = example_losses(model, prepared.valid, range(min(8, len(prepared.valid))), pad=0, device="cpu")
    targets = [prepared.valid.targets(row) for row in range(len(losses))]
    before = mean_loss(losses, targets)
    result = train(model, make_segment(0, 6000), shop)
    assert result.status == "ok"
    assert result.loss is not None
    assert result.loss < 0.8 * before


def test_half_the_micro_batch_gives_the_same_gradient(shop: Shop, tiny_model: Path) -> None:
    """One step with micro-batches of 4, 2 and 1 leads to the same weights, to rounding."""
    params = {**PARAMS, "dropout": 0.0}
    found = []
    for micro in (4, 2, 1):
        segment = make_segment(0, 1, micro_batch=micro, params=params)
        training = GangTraining.set_up(base(tiny_model), [segment], shop)
        training.train()
        found.append(training.members[0].adapter.weights())
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
    train(resident, make_segment(0, 300, trial_id=1, params=params), shop)
    result = train(resident, make_segment(0, 1500, params=params), shop)
    fresh = load_base(str(tiny_model), quantization, "cpu")
    model = PeftModel.from_pretrained(fresh, shop.checkpoint_path / str(result.checkpoint_out))
    count = min(8, len(prepared.valid))
    (losses,) = example_losses(model.eval(), prepared.valid, range(count), pad=0, device="cpu", batch=4)
    targets = [prepared.valid.targets(row) for row in range(len(losses))]
    assert result.example_losses == pytest.approx(losses, abs=1e-5)
    assert result.loss == pytest.approx(mean_loss(losses, targets), abs=1e-5)


def test_the_base_is_bare_and_unchanged_after_a_trial(shop: Shop, tiny_model: Path) -> None:
    """Same modules, same bits: the next trial finds the base as it was loaded."""
    model = base(tiny_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, make_segment(0, 800), shop)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("rate", [1e6, float("nan")])
def test_a_diverging_trial_is_a_result_and_leaves_the_base_clean(
    shop: Shop, tiny_model: Path, rate: float
) -> None:
    """It is reported as diverged, without a checkpoint, and a good trial trains on the same base."""
    wild = make_segment(0, 6000, params={**PARAMS, "learning_rate": rate})
    model = base(tiny_model)
    result = train(model, wild, shop)
    assert result.status == "diverged"
    assert result.checkpoint_out is None
    good = train(model, make_segment(0, 800), shop)
    alone = train(base(tiny_model), make_segment(0, 800, trial_id=9), shop)
    assert alone.example_losses == good.example_losses


def test_a_segment_told_to_stop_checkpoints_where_it_is(shop: Shop, tiny_model: Path) -> None:
    """It ends early as cancelled, and going on from its checkpoint gives the uninterrupted result."""
    calls = [0]

    def stopping() -> bool:
        calls[0] += 1
        return calls[0] > 5

    hasty = dataclasses.replace(shop, stopping=stopping)
    model = base(tiny_model)
    early = train(model, make_segment(0, 3000), hasty)
    assert early.status == "cancelled"
    assert 0 < early.tokens < 3000
    rest = make_segment(early.tokens, 3000, checkpoint_in=early.checkpoint_out, attempt=1)
    resumed = train(model, rest, shop)
    whole = train(base(tiny_model), make_segment(0, 3000, trial_id=8), shop)
    assert whole.example_losses == resumed.example_losses


def test_a_damaged_checkpoint_is_named(shop: Shop, tiny_model: Path) -> None:
    """One changed byte is found by its checksum; a missing file as well."""
    result = train(base(tiny_model), make_segment(0, 300), shop)
    folder = shop.checkpoint_path / str(result.checkpoint_out)
    file = folder / checkpoints.STATE_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"trainer\.safetensors has changed"):
        checkpoints.load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoints.load(folder)


@pytest.mark.parametrize("quantization", ["bf16", "nf4", "int8"])
def test_quantized_bases_train_on_the_cpu(shop: Shop, tiny_model: Path, quantization: str) -> None:
    """Every quantization of the spaces is real: forward, backward and a falling loss."""
    pool = BasePool(str(tiny_model), "cpu")
    model, seconds = pool.get(quantization)
    assert seconds > 0
    params = {**PARAMS, "quantization": quantization}
    short = train(model, make_segment(0, 300, params=params), shop)
    long = train(model, make_segment(0, 4000, params=params), shop)
    assert pool.get(quantization) == (model, 0.0)
    assert short.loss is not None
    assert long.loss is not None
    assert long.loss < short.loss
