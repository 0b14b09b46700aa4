"""Every family trains as plain PEFT would train it, alone and in gangs, and loads again in plain PEFT."""

from __future__ import annotations

import math
import re
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from budgetsearch.core.errors import ModelError
from budgetsearch.machine.configs import find_shape
from budgetsearch.machine.shapes import ModelShape
from budgetsearch.training.anatomy import examine
from budgetsearch.training.bases import load_base
from budgetsearch.training.experts import PackedExperts, WornExperts
from budgetsearch.training.parts import Parts
from budgetsearch.training.targets import targets_of
from tests.support.families import FAMILIES, build, has_experts
from tests.support.models_page import PAGE, row_of
from tests.support.tiny import make_tiny_model
from tests.support.zoo import Zoo, export, four_bits

TYPICAL = ("llama_tied", "gpt2", "opt", "qwen3_next", "gpt_oss", "nemotron_h", "mistral3", "qwen3_5")
"""One of each kind; the others are in the slow lane."""
EXACT = 1e-10
ROUNDED = 1e-6
"""Of a loss: where a model computes a part of itself in float32 whatever it is held in."""


def lanes() -> list[object]:
    """All families, those that are not typical marked as slow."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if name in TYPICAL else slow) for name in FAMILIES]


@pytest.mark.parametrize("family", lanes())
def test_a_family_trains_as_plain_peft_and_loads_again(family: str, tmp_path: Path) -> None:
    """Alone, in a gang and with gradient checkpointing the losses are the textbook's; no adapter is dead;
    what is exported gives the same loss on every class that loads the base."""
    zoo = Zoo(build(family, tmp_path / "base"))
    alone, (member,) = zoo.train([0])
    assert torch.allclose(zoo.textbook(), alone[:, 0], rtol=0, atol=EXACT)
    assert alone[-1] < alone[0]
    assert [name for name, b in member.b.items() if not b.any()] == []
    beside, _ = zoo.train([1])
    together, _ = zoo.train([0, 1])
    assert torch.allclose(torch.cat([alone, beside], dim=1), together, rtol=0, atol=ROUNDED)
    again, _ = zoo.train([0], recompute=True)
    assert torch.allclose(alone, again, rtol=0, atol=EXACT)

    folder, said = export(member, tmp_path / "adapter"), zoo.wearing(member)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        assert said == pytest.approx(zoo.card(folder, other=False), abs=ROUNDED)
        if family != "llama4":  # whose whole reads no text without an image in transformers 5.24
            there = zoo.card(folder, other=True)
            assert (zoo.known.other is None) == (there is None)
            assert there is None or said == pytest.approx(there, abs=ROUNDED)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name == "gpt_oss" else pytest.mark.slow)
        for name in FAMILIES
        if has_experts(name)
    ],
)
def test_routed_experts_train_as_plain_peft_and_load_again(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time; a plan counts what they wear; the sum with their weights is not kept for the backward
    pass."""
    zoo = Zoo(build(family, tmp_path / "base"), "experts")
    kept: list[weakref.ref[torch.Tensor]] = []
    make = WornExperts.made
    monkeypatch.setattr(WornExperts, "made", lambda *given: remembered(make(*given), kept))
    alone, (member,) = zoo.train([0], after_forward=lambda: at_most(kept, 0))
    monkeypatch.undo()
    assert kept
    assert torch.allclose(zoo.textbook(), alone[:, 0], rtol=0, atol=EXACT)
    assert alone[-1] < alone[0]
    assert [name for name, b in member.b.items() if not b.any()] == []
    with pytest.raises(ModelError, match="one member at a time"):
        zoo.train([0, 1])
    shape, _ = find_shape(str(zoo.path), None, zoo.path)
    weights = sum(weight.numel() for weight in member.weights().values())
    assert 4 * shape.weights_per_rank("experts") == weights
    folder, said = export(member, tmp_path / "adapter"), zoo.wearing(member)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        assert said == pytest.approx(zoo.card(folder, other=False), abs=ROUNDED)
        there = zoo.card(folder, other=True) if family != "llama4" else None
        assert there is None or said == pytest.approx(there, abs=ROUNDED)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name == "qwen2_moe" else pytest.mark.slow)
        for name in FAMILIES
        if has_experts(name) and name != "llama4"
    ],
)
def test_experts_in_4_bits_are_those_of_the_cards_lines(family: str, tmp_path: Path) -> None:
    """What training reports on packed experts plain PEFT and bitsandbytes give again, on both classes."""
    said, (card, other) = four_bits(build(family, tmp_path / "base"), tmp_path / "adapter")
    assert said == pytest.approx(card, abs=ROUNDED)
    assert other is None or said == pytest.approx(other, abs=ROUNDED)


def remembered(made: torch.Tensor, kept: list[weakref.ref[torch.Tensor]]) -> torch.Tensor:
    """The tensor, and a weak reference to it in the list."""
    kept.append(weakref.ref(made))
    return made


def at_most(kept: list[weakref.ref[torch.Tensor]], number: int) -> None:
    """Insist that so many of them are alive."""
    assert sum(one() is not None for one in kept) <= number


@pytest.mark.parametrize("family", lanes())
def test_a_family_is_what_its_anatomy_says(family: str, tmp_path: Path) -> None:
    """Adapters are on linear layers of the language part alone, no router and no expert among them; the
    counts, a plan's too, are the loaded model's; 4 bits are where they are promised, or nf4 is refused."""
    path = build(family, tmp_path)
    found = examine(path)
    assert row_of(family, found) in PAGE.read_text(encoding="utf-8").splitlines()
    base = load_base(str(path), "fp32", "cpu")
    parts = Parts(base)
    assert sum(p.numel() for p in base.parameters()) == found.weights
    assert found.class_name == type(base).__name__
    shape, _ = find_shape(str(path), None, path)
    assert shape.weights == pytest.approx(found.weights, rel=0.01)
    assert shape.experts == pytest.approx(found.experts, abs=0.01 * found.weights)
    for name in found.targets.names:
        assert name.startswith(f"{parts.language}.") or not parts.language
        assert not re.search(r"router|\bexperts\b|vision|visual|audio|lm_head", name)
    left_out = {name for names in found.targets.left_out.values() for name in names}
    assert set(parts.linears) == {*found.targets.names, *left_out}
    if "nf4" in found.refused or family == "mamba":  # whose own code multiplies by unpacked weights
        with pytest.raises(ModelError, match=r"linear layers|do not run"):
            load_base(str(path), "nf4", "cpu")
        return
    from bitsandbytes.nn import Linear4bit

    packed = load_base(str(path), "nf4", "cpu")
    kept = {id(m.weight): m for m in packed.modules() if isinstance(m, Linear4bit)}
    counted = sum(m.in_features * m.out_features for m in kept.values())
    counted += sum(math.prod(shape) for names in Parts(packed).fused.values() for shape in names.values())
    assert counted == pytest.approx(found.packable + found.packed_experts, abs=0.01 * found.weights)
    nested = [m for m in packed.modules() if isinstance(m, PackedExperts)]
    assert bool(nested) == bool(found.packed_experts)
    assert shape.packed_experts("nf4", "all-linear") == found.packed_experts
    assert packed.get_memory_footprint(return_buffers=False) == pytest.approx(
        held_bytes(shape, "nf4"), rel=0.06
    )


def test_what_a_file_holds_beside_weights_is_not_counted(tmp_path: Path) -> None:
    """Masks, tables of positions, decays: the files of GPT-2, of old Llamas and of MiniMax have them."""
    folder = make_tiny_model(tmp_path / "model", layers=2)
    plain = find_shape(str(folder), None, folder)[0]
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["model.layers.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    weights["model.layers.0.self_attn.diagonal_decay"] = torch.ones(4, 64, 64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert plain == find_shape(str(folder), None, folder)[0]


def held_bytes(shape: ModelShape, quantization: str) -> float:
    """Bytes of the weights as a plan counts them, without the scales of their blocks."""
    shrunk = shape.block_weights + shape.packed_experts(quantization, "all-linear")
    return shrunk / 2 + 4 * (shape.weights - shrunk)


def test_where_no_gradient_reaches_any_layer_all_of_them_wear_adapters(tmp_path: Path) -> None:
    """A head of zeros says nothing of the layers below it: it may learn first."""
    folder = make_tiny_model(tmp_path / "model", layers=1)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert 7 == len(targets_of(load_base(str(folder), "fp32", "cpu"), "all-linear").names)
