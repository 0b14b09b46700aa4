"""The hand-written backward pass of adapters against autograd, in float64, and what it keeps and makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from budgetsearch.training.adapters import Adapter
from budgetsearch.training.gang import Gang, Pass, Worn
from budgetsearch.training.targets import KNOWN, Known

WIDTH, OUT, LENGTH = 6, 5, 3
RANKS, SCALES = (4, 2, 1), (2.0, 0.5, 3.0)
NAMES = ("q", "k", "v", "o")


class Block(torch.nn.Module):
    """Three layers that read the same input, and one that reads what becomes of it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        for name in NAMES:
            inputs = OUT if name == "o" else WIDTH
            layer = Conv1D(OUT, inputs) if kind == "Conv1D" else torch.nn.Linear(inputs, OUT, kind == "bias")
            setattr(self, name, layer)
        self.double().requires_grad_(False)

    def forward(self, x: torch.Tensor, use: str = "qkv") -> torch.Tensor:
        x = x * 1.5
        parts = {name: getattr(self, name)(x) for name in "qkv"}
        found: torch.Tensor = self.o(torch.stack([parts[name].sin() for name in use]).prod(dim=0))
        return found


def members(count: int, dropout: float) -> list[Adapter]:
    """Adapters of unlike ranks and scales whose B is not zero."""
    found = []
    for rank, scale in zip(RANKS[:count], SCALES, strict=False):
        a = {n: torch.randn(rank, OUT if n == "o" else WIDTH, dtype=torch.double) for n in NAMES}
        b = {n: torch.randn(rank, OUT, dtype=torch.double) for n in NAMES}
        found.append(Adapter(a, b, {"lora_alpha": scale * rank, "r": rank, "lora_dropout": dropout}))
    return found


def textbook(
    block: Block, adapters: Sequence[Adapter], rows: Sequence[int], masks: Any, x: Any, use: str
) -> Any:
    """The same by autograd alone: (result, gradients of the input, of every A and of every B)."""
    weights = [{n: w.clone().requires_grad_(True) for n, w in a.weights().items()} for a in adapters]
    x = x.clone().requires_grad_(True)

    def layer(name: str, given: torch.Tensor) -> torch.Tensor:
        out = getattr(block, name)(given)
        dropped = given * masks[name].view_as(given) if masks else given
        parts = zip(dropped.split(list(rows)), weights, adapters, strict=True)
        keep = [a.scale / (1.0 - a.dropout) if masks else a.scale for a in adapters]
        more = [
            scale * linear(linear(part, w[f"{name}/A"]), w[f"{name}/B"].t())
            for (part, w, _), scale in zip(parts, keep, strict=True)
        ]
        found: torch.Tensor = out + torch.cat(more)
        return found

    parts = {name: layer(name, x * 1.5) for name in "qkv"}
    result = layer("o", torch.stack([parts[name].sin() for name in use]).prod(dim=0))
    result.square().sum().backward()
    return result.detach(), x.grad, [{n: t.grad for n, t in w.items()} for w in weights]


@pytest.mark.parametrize("kind", ["bare", "bias", "Conv1D"])
@pytest.mark.parametrize(
    ("rows", "dropout", "use"),
    [((4,), 0.0, "qkv"), ((2, 2, 2), 0.3, "qkv"), ((1, 3, 2), 0.3, "qkv"), ((2, 3, 0), 0.0, "kv")],
    ids=["alone", "alike", "unlike", "one waits and a result that nobody uses"],
)
def test_gradients_are_those_of_autograd(
    kind: str, rows: tuple[int, ...], dropout: float, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the input, of A and of B, in float64, with the same masks; twice, for they add up."""
    torch.manual_seed(0)
    block, x = Block(kind), torch.randn(sum(rows), LENGTH, WIDTH, dtype=torch.double)
    setattr(block, KNOWN, Known(together=(("q", "k", "v"), ("o",))))
    adapters, masks = members(len(rows), dropout), {}
    real = Worn.masks

    def seen(worn: Worn, numbers: Sequence[int], flat: torch.Tensor) -> list[torch.Tensor]:
        found = real(worn, numbers, flat)
        masks.update({sorted(NAMES)[n]: mask for n, mask in zip(numbers, found, strict=False)})
        return found

    monkeypatch.setattr(Worn, "masks", seen)
    now = Pass(rows, [LENGTH] * len(rows), ["seed"] * len(rows), training=True)
    grads: list[Any] = []
    with Gang(block, adapters).worn() as gang:
        for _ in range(2):
            given = x.clone().requires_grad_(True)
            with gang.passing(now):
                result = block(given, use)
                result.square().sum().backward()
            grads.append(given.grad)
        weights = [{n: t.grad.clone() for n, t in a.weights().items()} for a in adapters]
    expected, of_x, of_weights = textbook(block, adapters, rows, masks, x, use)
    assert bool(masks) == bool(dropout)
    torch.testing.assert_close(result.detach(), expected, rtol=1e-12, atol=1e-12)
    for grad in grads:
        torch.testing.assert_close(grad, of_x, rtol=1e-11, atol=1e-11)
    for found, wanted in zip(weights, of_weights, strict=True):
        for name, grad in found.items():
            should = torch.zeros_like(grad) if wanted[name] is None else wanted[name]
            torch.testing.assert_close(grad, 2 * should, rtol=1e-11, atol=1e-11)


def test_what_is_packed_in_4_bits_goes_backward_as_it_went_forward() -> None:
    """The gradient of the input is that of the unpacked weight."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    base = torch.nn.Sequential(layer.to("cpu")).requires_grad_(False)
    a, b = ({"0": torch.randn(2, 64)} for _ in range(2))
    one = Adapter(a, b, {"lora_alpha": 2, "r": 2, "lora_dropout": 0.0})
    dense = dequantize_4bit(layer.weight.data, layer.weight.quant_state) + one.b["0"].t() @ one.a["0"]
    x = torch.randn(3, 4, 64, requires_grad=True)
    with Gang(base, [one]).worn() as gang, gang.passing(Pass((3,))):
        found = base(x)
        found.square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(found.detach(), linear(x, dense).detach(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(x.grad, 2 * linear(x, dense).detach() @ dense, rtol=1e-4, atol=1e-2)


def test_the_16_bit_shadows_are_made_once_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many passes a step has; what they hold then is the weights with their scale."""
    made: list[torch.dtype] = []
    real = Worn._make
    monkeypatch.setattr(Worn, "_make", lambda worn, half: (made.append(half), real(worn, half))[1])
    base = torch.nn.Sequential(torch.nn.Linear(WIDTH, OUT)).requires_grad_(False)
    one = Adapter(
        {"0": torch.randn(2, WIDTH)},
        {"0": torch.randn(2, OUT)},
        {"lora_alpha": 3, "r": 2, "lora_dropout": 0.0},
    )
    with Gang(base, [one]).worn() as gang:
        for changed in (False, False, True):
            if changed:
                one.b["0"].mul_(2.0)
                one.changes += 1
            with gang.passing(Pass((2,))), torch.autocast("cpu", dtype=torch.bfloat16):
                base(torch.randn(2, LENGTH, WIDTH))
        assert made == [torch.bfloat16] * 2
        halves = gang.worn_by.readings[0].halves
        assert halves is not None
        torch.testing.assert_close(halves.b[0].float(), 1.5 * one.b["0"], rtol=0.01, atol=0.01)


def test_nothing_is_kept_but_the_input_and_what_comes_out_of_a() -> None:
    """Once for all layers that read it; no weight, no result."""
    kept: dict[int, tuple[int, ...]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    block, adapters = Block("bare"), members(1, 0.0)
    setattr(block, KNOWN, Known(together=(("q", "k", "v"), ("o",))))
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.double)
    watching = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with Gang(block, adapters).worn() as gang, gang.passing(Pass((2,))), watching:
        parts = [getattr(block, name)(x) for name in "qkv"]
    assert sorted(kept.values()) == [(2 * LENGTH, WIDTH), (2 * LENGTH, 3 * RANKS[0])]
    assert all(part.requires_grad for part in parts)
