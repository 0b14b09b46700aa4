"""The parts of a model, from its modules alone: language part, blocks, towers, routed experts, layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from budgetsearch.machine.anatomy import experts_of
from budgetsearch.training.experts import fused_parameters

GATE_WIDTH = 8
"""A layer with fewer inputs or outputs is a gate or a set of coefficients: no low rank is below it."""


@dataclass(frozen=True)
class Parts:
    """Where the parts of a model lie, by the names of its modules."""

    model: Any

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(module): name for name, module in self.model.named_modules()}

    @cached_property
    def language(self) -> str:
        """The module that holds the token embeddings and the repeated blocks; empty: the model itself."""
        name = self._names.get(id(self.model.get_input_embeddings()), "")
        while name:
            name = name.rpartition(".")[0]
            if any(_is_stack(child) for child in self.model.get_submodule(name).modules()):
                return name
        return ""

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The lists of repeated blocks of the language part."""
        holder = self.model.get_submodule(self.language)
        direct = [child for child, module in holder.named_children() if _is_stack(module)]
        if not direct:
            direct = [child for child, module in holder.named_modules() if _is_stack(module)]
            direct = [one for one in direct if not any(one.startswith(f"{other}.") for other in direct)]
        return tuple(joined(self.language, child) for child in direct)

    @cached_property
    def towers(self) -> tuple[str, ...]:
        """The topmost modules that see or hear, and what joins them to the language part."""
        head = self._names.get(id(self.model.get_output_embeddings()), "")
        kept = tuple(name for name in (self.language, head, *self.blocks) if name)
        found = []
        for name, module in self._candidates(""):
            inside = not self.language or name.startswith(f"{self.language}.")
            stacked = any(_is_stack(child) for child in module.modules())
            if name not in kept and (stacked if inside else weights_of(module)):
                found.append(name)
        return tuple(found)

    def _candidates(self, place: str) -> Iterator[tuple[str, Any]]:
        """The children of all modules on the way to the language part and of that itself."""
        for child, module in self.model.get_submodule(place).named_children():
            name = joined(place, child)
            if self.language == name or self.language.startswith(f"{name}."):
                yield from self._candidates(name)
            else:
                yield name, module

    @cached_property
    def routed(self) -> Mapping[str, int]:
        """Modules that hold the routed experts, and how many they hold: fused tensors or a list of layers."""
        found = {}
        for name, module in self.in_blocks():
            fused = self._fused(name, module)
            if isinstance(module, torch.nn.ModuleList) and "expert" in name.rpartition(".")[2]:
                found[name] = len(module)
            elif fused:
                found[name] = next(iter(fused.values()))[0]
        return found

    def _fused(self, name: str, module: Any) -> dict[str, tuple[int, ...]]:
        """The fused tensors of a module, if they are of experts: heads may have a matrix each, too."""
        found = fused_parameters(module)
        called = "expert" in name.rpartition(".")[2].lower() or "expert" in type(module).__name__.lower()
        counted = {shape[0] for shape in found.values()} == {self._experts}
        return found if called or counted else {}

    @cached_property
    def _experts(self) -> int:
        config: Any = getattr(self.model, "config", None)
        text = config.get_text_config().to_dict() if hasattr(config, "get_text_config") else {}
        return experts_of(text)

    @cached_property
    def fused(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """The parameters of those that hold fused tensors, with their shapes."""
        names = {name: self._fused(name, self.model.get_submodule(name)) for name in self.routed}
        return {name: parameters for name, parameters in names.items() if parameters}

    @property
    def fused_endings(self) -> tuple[str, ...]:
        """How their names end, behind the number of the block."""
        found = {f"{tail_of(place)}.{name}" for place, names in self.fused.items() for name in names}
        return tuple(sorted(found))

    @cached_property
    def expert_linears(self) -> dict[str, Any]:
        """The linear layers of routed experts that lie in a list."""
        return {n: m for n, m in self.in_blocks() if is_linear(m) and self._is_routed(n)}

    @cached_property
    def linears(self) -> dict[str, Any]:
        """The linear layers of the blocks by their names, routed experts and routers left out."""
        return {
            name: module
            for name, module in self.in_blocks()
            if is_linear(module) and not self._is_routed(name) and not self._is_router(name, module)
        }

    def in_blocks(self) -> Iterator[tuple[str, Any]]:
        """Every module of every block, by its name."""
        for stack in self.blocks:
            yield from self.model.get_submodule(stack).named_modules(prefix=stack)

    def _is_routed(self, name: str) -> bool:
        return any(name.startswith(f"{place}.") for place in self.routed)

    def _is_router(self, name: str, module: Any) -> bool:
        """It chooses experts, or weighs what others make: a gate, and no product of its own."""
        inputs, outputs = sizes_of(module)
        if min(inputs, outputs) < GATE_WIDTH or "router" in name.rpartition(".")[2].lower():
            return True
        if "router" in type(module).__name__.lower():
            return True
        near = {name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[0]}
        return any(
            outputs == count and place.rpartition(".")[0] in near for place, count in self.routed.items()
        )


def _is_stack(module: Any) -> bool:
    """A list of blocks: modules with linear layers in them, which are no layers themselves."""
    if not isinstance(module, torch.nn.ModuleList) or not len(module):
        return False
    return any(is_linear(part) for one in module if not is_linear(one) for part in one.modules())


def joined(*parts: str) -> str:
    """One name from the names of a place and what is in it; empty ones are left out."""
    return ".".join(filter(None, parts))


def tail_of(name: str) -> str:
    """What follows the number of the block: ``mlp.shared_expert.gate_proj``."""
    return re.split(r"\.\d+\.", name)[-1]


def weights_of(module: Any) -> int:
    """Number of its weights."""
    return sum(_numel(p) for p in module.parameters())


def _numel(parameter: Any) -> int:
    """Weights of a parameter, also of one that bitsandbytes packed."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel() if state is not None else parameter.numel())


def is_linear(module: Any) -> bool:
    """A matrix that PEFT can put an adapter on: torch's linear layers, bitsandbytes', GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def sizes_of(module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)
    return int(module.weight.shape[0]), int(module.weight.shape[1])
