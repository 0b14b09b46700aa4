"""The routed experts of a mixture where their weights lie fused: tensors that hold a matrix for each expert.

What adapters add to them, and what 4 bits unpack to, is as large as the experts themselves in 16 bits. So the
tensors that the model's own code then computes with are made at each pass, and again in the backward pass,
instead of being kept between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

INNER = ".base_layer"
"""PEFT wraps a module once for each of its parameters: what follows the name of all but the outermost."""


def fused_parameters(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The parameters of a module that hold a matrix for each expert, in its order, with their shapes."""
    if isinstance(module, PackedExperts):
        return {name: tuple(state.shape) for name, state in module.states.items()}
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: tuple(p.shape) for name, p in own if p.dim() == 3 and len(p) > 1}


def keys_of(name: str, count: int) -> list[str]:
    """What PEFT calls the adapters on so many parameters of a module of this name: the first is innermost."""
    return [name + INNER * (count - 1 - place) for place in range(count)]


def module_of(key: str) -> str:
    """The name of the module whose layer or parameter PEFT calls so."""
    while key.endswith(INNER):
        key = key.removesuffix(INNER)
    return key


def depth_of(key: str) -> int:
    """How many of PEFT's wrappers are around the one of this name."""
    return (len(key) - len(module_of(key))) // len(INNER)


class RemadeExperts(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Fused experts some of whose weights are made at each pass."""

    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.made_names: tuple[str, ...] = ()

    def made(self, name: str) -> torch.Tensor:
        """The weights of this name, (experts, outputs, inputs) or (experts, inputs, outputs)."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """What the model asks of its experts beside calling them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("experts"), name)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *given: Any, **named: Any) -> Any:
        """Whatever the experts take and return."""
        made = {name: self.made(name) for name in self.made_names}
        places = {weight.untyped_storage().data_ptr(): name for name, weight in made.items()}
        types = {name: weight.dtype for name, weight in made.items()}
        again: dict[str, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> Any:
            name = places.get(tensor.untyped_storage().data_ptr())
            if name is None or tensor.dtype != types[name]:
                return tensor
            return name, tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(kept: Any) -> torch.Tensor:
            if isinstance(kept, torch.Tensor):
                return kept
            name, *view = kept
            if name not in again:
                again.clear()  # one at a time
                with torch.no_grad():
                    again[name] = self.made(name)
            return again[name].as_strided(*view)

        with saved_tensors_hooks(pack, unpack):
            return functional_call(self.experts, made, given, named)


class Stack(NamedTuple):
    """One member's adapter on one parameter."""

    a: torch.nn.Parameter
    """(1, rank x experts, inputs)."""
    b: torch.nn.Parameter
    """(1, rank x experts, outputs)."""
    scale: torch.Tensor
    """(1, 1, 1): alpha / rank."""


class WornExperts(RemadeExperts):
    """The fused experts of a block with one member's adapter: as in PEFT's parameter wrapper the product of A
    and B is added to the weights. A sum of weights knows no rows, so one member wears it at a time."""

    def __init__(self, experts: torch.nn.Module, stacks: Mapping[str, Stack]) -> None:
        """``stacks`` by parameter."""
        super().__init__(experts)
        self.stacks, self.made_names = dict(stacks), tuple(stacks)
        for name, stack in stacks.items():
            self.register_parameter(f"{name}_a", stack.a)
            self.register_parameter(f"{name}_b", stack.b)

    def made(self, name: str) -> torch.Tensor:
        """The base's weights with the adapter's product added."""
        weight, stack = getattr(self.experts, name), self.stacks[name]
        count = len(weight)
        # PEFT's order: A is expert by expert, B rank by rank.
        a = stack.a[0].view(count, -1, stack.a.shape[-1])
        b = stack.b[0].view(-1, count, stack.b.shape[-1]).transpose(0, 1)
        left, right = (b, a) if not getattr(self.experts, "is_transposed", False) else (a, b)
        scaled = left.transpose(1, 2) * stack.scale[0]
        return torch.baddbmm(weight, scaled.to(weight.dtype), right.to(weight.dtype))


def pack_experts(model: Any, places: Iterable[str], device: str) -> None:
    """Put the fused experts of the modules at these places into 4 bits, made on this device."""
    for place in places:
        parent, _, child = place.rpartition(".")
        experts = model.get_submodule(place)
        setattr(model.get_submodule(parent), child, PackedExperts(experts, device))


class PackedExperts(RemadeExperts):
    """Fused experts in nf4 with double quantization, as bitsandbytes packs any parameter."""

    def __init__(self, experts: torch.nn.Module, device: str) -> None:
        """Packs the experts' weights, one tensor after the other, on ``device``."""
        super().__init__(experts)
        self.states: dict[str, Any] = {}
        from bitsandbytes.functional import quantize_4bit

        for name in fused_parameters(experts):
            weight = getattr(experts, name).data.to(device)
            packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
            parameter = torch.nn.Parameter(packed, requires_grad=False)
            parameter.quant_state = state
            setattr(experts, name, parameter)
            self.states[name] = state
        self.made_names = tuple(self.states)

    def made(self, name: str) -> torch.Tensor:
        """The weights unpacked."""
        from bitsandbytes.functional import dequantize_4bit

        with torch.no_grad():
            weight: torch.Tensor = dequantize_4bit(getattr(self.experts, name).data, self.states[name])
        return weight
