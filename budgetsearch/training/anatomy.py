"""The anatomy of a base model before its weights are read: its class, its parts in numbers, where adapters
go, what a quantization shrinks and which ones it cannot have; on the meta device, which needs no card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from budgetsearch.core.errors import ModelError
from budgetsearch.core.targets import ALL_LINEAR
from budgetsearch.machine.anatomy import Table, checkpoint_of, refused_by
from budgetsearch.training.classes import Other, class_of, config_of, empty, other_of, short
from budgetsearch.training.parts import Parts, weights_of
from budgetsearch.training.targets import KNOWN, Known, Targets, leaves, targets_of


@dataclass(frozen=True)
class Anatomy:
    """What is known of a base model before its weights are read; numbers are weights."""

    class_name: str
    auto: bool
    """Whether AutoModelForCausalLM stands for it."""
    language: str
    """Where the language part lies in it."""
    other: Other | None
    """Another class of the same checkpoint."""
    weights: int
    """Of the language part with its head: what stays in memory."""
    towers: int
    """Of what sees or hears, which training on text does not keep."""
    linear: int
    """Of the linear layers of all blocks, routed experts left out."""
    experts: int
    """Of routed experts and their routers."""
    covered: int
    """Of the layers that get adapters."""
    packable: int
    """Of what nf4 and int8 shrink."""
    packed_experts: int
    """Of fused experts, which nf4 shrinks as well unless they wear adapters."""
    expert_names: tuple[str, ...]
    """How the names of their parameters end."""
    targets: Targets
    checkpoint: str = ""
    """How the checkpoint itself is quantized; empty: not at all."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Quantizations that cannot be, and why."""

    def sentence(self) -> str:
        """Where adapters go, for a person."""
        share = self.covered / max(1, self.linear + self.experts)
        text = f"adapters on {leaves(self.targets.names)}: {share:.0%} of the weights of the blocks"
        if self.experts:
            text += f"; {'' if self.targets.on_experts else 'routed experts and '}routers stay as they are"
        if self.towers:
            text += f"; {self.towers / 1e6:,.0f}M weights that see or hear are not kept"
        for why, names in self.targets.left_out.items():
            text += f"; {why} {leaves(names)}"
        return text

    def quantized(self, name: str) -> float:
        """The share of all weights that a quantization shrinks."""
        if name in self.refused or name not in ("int8", "nf4"):
            return 0.0
        return (self.packable + (self.packed_experts if name == "nf4" else 0)) / max(1, self.weights)

    def facts(self) -> dict[str, Any]:
        """For the ledger, the manifest and the card."""
        return {
            "class": self.class_name,
            "auto": self.auto,
            "language": self.language,
            "other_class": self.other.name if self.other else "",
            "other_language": self.other.language if self.other else "",
            "other_is_whole": bool(self.other and self.other.whole),
            "weights": self.weights,
            "towers": self.towers,
            "experts": self.experts,
            "covered": self.covered,
            "packable": self.packable,
            "packed_experts": list(self.expert_names) if self.packed_experts else [],
            "quantized": {name: round(self.quantized(name), 4) for name in ("int8", "nf4")},
            "layers": dict(Counter(leaves([name]) for name in self.targets.names)),
            "checkpoint": self.checkpoint,
            "adapters": self.sentence(),
        }


def built_table(config: Mapping[str, Any]) -> Table:
    """The tensors of the model that a config.json describes, where nothing else of it is here.

    Raises:
        ModelError: transformers does not build it.
    """
    from transformers import AutoConfig

    sizes = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    try:
        parsed = AutoConfig.for_model(str(config.get("model_type")), **sizes)
    except Exception as error:  # whatever a configuration's own checks raise
        raise ModelError(f"The config.json describes no model that works here: {short(error)}") from error
    model = empty(parsed, class_of(parsed, "the model"))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def examine(path: Path, *, targets: str = ALL_LINEAR, trust_remote_code: bool = False) -> Anatomy:
    """Look at a base model's modules without reading its weights; a few seconds.

    Raises:
        ModelError: it cannot be trained here at all.
        SettingsError: ``targets`` names no layer of it.
    """
    config = config_of(str(path), trust_remote_code=trust_remote_code)
    found = class_of(config, str(path), trust_remote_code=trust_remote_code)
    model = empty(config, found, trust_remote_code=trust_remote_code)
    parts = Parts(model)
    if not parts.blocks or model.get_output_embeddings() is None:
        raise ModelError(
            f"{path}: {type(model).__name__} has no list of blocks with linear layers between its embeddings "
            "and its output layer, so there is nothing to put adapters on. Use another base model."
        )
    other = other_of(config, model)
    setattr(model, KNOWN, Known(other=other))
    return _measured(model, parts, targets_of(model, targets), other, config)


def _measured(model: Any, parts: Parts, chosen: Targets, other: Other | None, config: Any) -> Anatomy:
    from transformers import AutoModelForCausalLM

    towers = sum(weights_of(model.get_submodule(name)) for name in parts.towers)
    matrices = {name: int(module.weight.numel()) for name, module in parts.linears.items()}
    own = {id(module.weight): name for name, module in parts.linears.items()}  # some models share blocks
    packed = _packed(model, parts)
    stacks = sum(weights_of(model.get_submodule(stack)) for stack in parts.blocks)
    checkpoint = checkpoint_of(config.to_dict())
    odd = {name: module for name, module in parts.linears.items() if name not in packed}
    return Anatomy(
        class_name=type(model).__name__,
        auto=class_of(config, "the model") is AutoModelForCausalLM,
        language=parts.language,
        other=other,
        weights=weights_of(model) - towers,
        towers=towers,
        linear=sum(matrices[name] for name in own.values()),
        experts=min(stacks, sum(weights_of(model.get_submodule(place)) for place in parts.routed)),
        covered=sum(matrices[name] for name in own.values() if name in set(chosen.names))
        + _on_experts(model, parts, chosen),
        packed_experts=0 if chosen.on_experts or checkpoint else _fused(parts),
        expert_names=parts.fused_endings,
        packable=sum({id(module.weight): int(module.weight.numel()) for module in packed.values()}.values()),
        targets=chosen,
        checkpoint=checkpoint,
        refused={**_unpackable(odd), **refused_by(checkpoint)},
    )


def _on_experts(model: Any, parts: Parts, chosen: Targets) -> int:
    """Weights of routed experts that wear adapters."""
    if not chosen.on_experts:
        return 0
    return _fused(parts) + sum(int(m.weight.numel()) for m in parts.expert_linears.values())


def _fused(parts: Parts) -> int:
    """Weights of fused experts."""
    return sum(prod(shape) for found in parts.fused.values() for shape in found.values())


def _packed(model: Any, parts: Parts) -> dict[str, Any]:
    """The layers that transformers hands to bitsandbytes: no subclass of a linear layer, no output layer, and
    none whose weight is shared."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = {*get_keys_to_not_convert(model)}
    # The last of the parameters stays as it is; while a model loads, its output layer is not tied yet.
    last, loading = ([*model.named_parameters(remove_duplicate=once)][-1][0] for once in (True, False))
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    if last not in {loading, *tied}:
        kept.discard(last.removesuffix(".weight"))
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name, list(kept))
        and not any(name.startswith(f"{tower}.") for tower in parts.towers)
    }


def _unpackable(odd: Mapping[str, Any]) -> dict[str, str]:
    """Why nf4 and int8 are not to be had where these layers would stay as they are."""
    if not odd:
        return {}
    kinds = sorted({type(module).__name__ for module in odd.values()} - {"Linear"})
    what = f"are of a class of their own ({', '.join(kinds)})" if kinds else "share their weights"
    why = f"transformers does not quantize its linear layers {leaves(odd)}, which {what}; bf16 and fp32 work"
    return dict.fromkeys(("int8", "nf4"), why)
