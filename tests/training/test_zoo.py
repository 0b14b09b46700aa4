"""Every family trains as plain PEFT would train it, alone and in gangs, and loads again in plain PEFT."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from budgetsearch.core.errors import ModelError
from budgetsearch.machine.configs import find_shape
from budgetsearch.training.anatomy import examine
from budgetsearch.training.bases import load_base
from budgetsearch.training.parts import Parts
from budgetsearch.training.targets import targets_of
from tests.support.families import FAMILIES, build
from tests.support.models_page import PAGE, row_of
from tests.support.tiny import make_tiny_model
from tests.support.zoo import Zoo, export

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
    assert counted == pytest.approx(found.packable, abs=0.04 * found.weights)


def test_where_no_gradient_reaches_any_layer_all_of_them_wear_adapters(tmp_path: Path) -> None:
    """A head of zeros says nothing of the layers below it: it may learn first."""
    folder = make_tiny_model(tmp_path / "model", layers=1)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert 7 == len(targets_of(load_base(str(folder), "fp32", "cpu"), "all-linear").names)
