"""Losses at completion tokens only, and gangs on every family of models that PEFT can target."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from budgetsearch.core.errors import ModelError
from budgetsearch.core.records import Schedule, Segment
from budgetsearch.training import losses
from budgetsearch.training.adapters import Adapter
from budgetsearch.training.batches import collate
from budgetsearch.training.gang import Gang, Pass
from budgetsearch.training.losses import FrozenHeadLoss, has_plain_head, target_losses
from budgetsearch.training.members import Shop
from budgetsearch.training.recipe import GangTraining, train_gang

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 258,
    "bos_token_id": None,
    "eos_token_id": 257,
    "initializer_range": 0.2,
}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 24},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 24, "final_logit_softcapping": 5.0},
    "Gemma3": {"head_dim": 8, "sliding_window": 24},
    "Phi3": {},
    "Phi": {},
    "Granite": {"logits_scaling": 3.0},
}


def model_of(family: str) -> Any:
    """A random model of a family in float64, frozen."""
    import transformers

    name = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES[family]})
    causal = "Gemma3" if family == "Gemma3" else family
    torch.manual_seed(0)
    model = getattr(transformers, f"{causal}ForCausalLM")(config).double().eval()
    model.requires_grad_(False)
    has_plain_head(model)
    return model


def row_losses(model: Any, ids: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a row's trained tokens, from all the logits of that row alone."""
    logits = model(input_ids=ids[None].long(), attention_mask=torch.ones(1, len(ids))).logits[0]
    return cross_entropy(logits[:-1][trained[1:]], ids[trained].long(), reduction="none")


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_all_the_logits(family: str, shop: Shop) -> None:
    """Rows of different lengths side by side without a mask give each row's own losses, soft caps and
    scales of logits included."""
    model, data = model_of(family), shop.data.train
    rows = [3, 11, 20, 41]
    assert len({data.lengths[row] for row in rows}) > 1
    found = target_losses(model, collate([data], [rows], pad=0))
    expected = torch.cat([row_losses(model, *map(torch.tensor, data.row(row))) for row in rows])
    assert torch.allclose(expected, found, rtol=0.0, atol=1e-10)


def test_only_plain_heads_are_fused() -> None:
    """Soft caps and scales are noticed by what the model computes, not by its name."""
    plain = {family: has_plain_head(model_of(family)) for family in FAMILIES}
    assert {"Gemma2", "Granite"} == {family for family, is_plain in plain.items() if not is_plain}


@pytest.mark.parametrize("family", FAMILIES)
def test_gangs_work_on_every_family(family: str, shop: Shop) -> None:
    """Two unlike members end where each ends alone. Gemma 2 takes its softmax in float32 over the padded
    width, so there the sums round differently."""
    tolerance = 1e-5 if family == "Gemma2" else 1e-10
    model = model_of(family)
    segments = [
        Segment(
            trial_id=n,
            params={"quantization": "fp32", "rank": 2 + 2 * n, "learning_rate": 1e-2, "dropout": 0.1 * n},
            seed=n,
            rung=0,
            start_tokens=0,
            stop_tokens=500,
            schedule=Schedule(0, 500),
            batch_size=4 - 2 * n,
            micro_batch=2,
        )
        for n in (0, 1)
    ]
    together = GangTraining.set_up(model, segments, shop)
    together.train()
    for segment, member in zip(segments, together.members, strict=True):
        alone = GangTraining.set_up(model, [segment], shop)
        alone.train()
        assert all(b.abs().max() > 0 for b in member.adapter.b.values())
        for name, weight in alone.members[0].adapter.weights().items():
            assert torch.allclose(weight, member.adapter.weights()[name], rtol=0.0, atol=tolerance), name


def test_the_fused_loss_has_the_gradient_of_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients of the hidden states, chunk borders included, with weights of the losses."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 3 * 11)
    torch.manual_seed(0)
    weight, bias = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    hidden = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    labels, share = torch.randint(0, 11, (8,)), torch.rand(8, dtype=torch.float64)
    plain = cross_entropy(hidden @ weight.t() + bias, labels, reduction="none")
    (expected,) = torch.autograd.grad((plain * share).sum(), hidden)
    fused = FrozenHeadLoss.apply(hidden, weight, bias, labels)
    (actual,) = torch.autograd.grad((fused * share).sum(), hidden)
    assert torch.allclose(plain, fused, atol=1e-12)
    assert torch.allclose(expected, actual, atol=1e-12)
    assert torch.autograd.gradcheck(lambda h: FrozenHeadLoss.apply(h, weight, bias, labels), (hidden,))


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_logits_of_the_prompt_are_never_computed(family: str, shop: Shop) -> None:
    """The output layer passes one position on for each completion token, and nothing else."""
    model, seen = model_of(family), []
    handle = model.lm_head.register_forward_hook(lambda m, args, output: seen.append(output.shape[:2]))
    target_losses(model, collate([shop.data.train], [[3, 11]], pad=0))
    handle.remove()
    targets = sum(shop.data.train.targets(row) for row in (3, 11))
    assert [(1, targets)] == [tuple(shape) for shape in seen]


def test_a_layer_that_sees_something_else_than_rows_is_refused_in_a_gang() -> None:
    """Members could not be told apart there; the error says what to do."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    config = {"lora_alpha": 1, "r": 1, "lora_dropout": 0.0}
    members = [Adapter({"0": torch.zeros(1, 4)}, {"0": torch.zeros(1, 4)}, config) for _ in range(2)]
    gang = Gang(base, members)
    with gang.worn(), gang.passing(Pass(rows=(2, 2), lengths=(3, 3))):
        assert base(torch.ones(4, 3, 4)).shape == (4, 3, 4)
        with pytest.raises(ModelError, match="--targets"):
            base(torch.ones(7, 4))


def test_a_model_without_an_output_layer_is_named(shop: Shop) -> None:
    """An encoder has no logits to take a loss of."""

    class Headless(torch.nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(ModelError, match="causal language model"):
        target_losses(Headless(), collate([shop.data.train], [[0]], pad=0))


def test_members_must_have_the_same_target_layers(shop: Shop) -> None:
    """A gang of adapters on different layers is refused."""
    model = model_of("Llama")
    segment = Segment(
        0, {"quantization": "fp32", "rank": 2, "learning_rate": 1e-3}, 0, 0, 0, 9, Schedule(0, 9), 2, 2
    )
    training = GangTraining.set_up(model, [segment], shop)
    narrow = dataclasses.replace(shop, targets="q_proj")
    other = GangTraining.set_up(model, [segment], narrow)
    gang = Gang(model, [training.members[0].adapter, other.members[0].adapter])
    with pytest.raises(ModelError, match="same target layers"):
        gang.put_on()


def test_targets_may_be_named(shop: Shop, tiny_model: Path) -> None:
    """Only the named layers carry an adapter, in the gang and in the exported file."""
    from safetensors.torch import load_file

    narrow = dataclasses.replace(shop, targets="q_proj,v_proj")
    segment = Segment(
        0, {"quantization": "fp32", "rank": 2, "learning_rate": 1e-3}, 0, 0, 0, 200, Schedule(0, 200), 2, 2
    )
    (result,) = train_gang(model_of("Llama"), [segment], narrow, 2)
    names = load_file(shop.checkpoint_path / str(result.checkpoint_out) / "adapter_model.safetensors")
    assert {"q_proj", "v_proj"} == {name.split(".")[-3] for name in names}
