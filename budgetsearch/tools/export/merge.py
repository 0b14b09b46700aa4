"""Adapter and base as one model of 16 bits: each weight as training saw it, plus what the adapter adds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from budgetsearch.core.errors import ModelError
from budgetsearch.training.targets import leaves


def merge(trained: Any, whole: Any) -> int:
    """Write the base's weights as training saw them, with the adapter, into ``whole``.

    Sums are made in float32 and rounded once. A weight that two layers share and that the adapter changes
    in one of them is shared no longer: after a reload the other one would change too.

    Args:
        trained: base and adapter, as PEFT has them.
        whole: the same base in 16 bits, with all its parts.

    Returns: how many layers the adapter changed.

    Raises:
        ModelError: the two do not have the same layers.
    """
    changed = 0
    with torch.no_grad():
        for name, layer, is_adapted in _as_trained(trained.base_model.model):
            target = _layer(whole, name)
            if is_adapted:
                _own_weight(whole, target)
                changed += 1
            weight = _weight(layer, is_adapted)
            if weight.shape != target.weight.shape:
                raise ModelError(
                    f"{name} is {tuple(target.weight.shape)}, its adapter {tuple(weight.shape)}."
                )
            target.weight.copy_(weight.to(target.weight.device))
    return changed


def _as_trained(model: Any) -> Iterator[tuple[str, Any, bool]]:
    """(name in the base, layer, whether it wears an adapter) of all that is not as in the base's files."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.tuners.lora.layer import LoraLayer

    inside: set[int] = set()
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            inside.update(map(id, layer.modules()))
            yield name, layer, True
        elif isinstance(layer, (Linear4bit, Linear8bitLt)) and id(layer) not in inside:
            yield name, layer, False


def _weight(layer: Any, is_adapted: bool) -> torch.Tensor:
    """(outputs, inputs), float32."""
    from peft.utils.integrations import dequantize_module_weight

    base = layer.get_base_layer() if is_adapted else layer
    weight = dequantize_module_weight(base).float()
    if not is_adapted:
        return weight
    (adapter,) = layer.active_adapters
    return weight + layer.get_delta_weight(adapter).float().to(weight.device)


def _layer(whole: Any, name: str) -> Any:
    try:
        return whole.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"The model in 16 bits has no layer {leaves([name])} at {name}, so the adapter cannot be merged."
        ) from None


def _own_weight(whole: Any, target: Any) -> None:
    """Give the layer a weight of its own where it shares one with the embeddings."""
    ends = whole.get_input_embeddings(), whole.get_output_embeddings()
    if ends[0] is None or ends[1] is None or target not in ends or ends[0].weight is not ends[1].weight:
        return
    target.weight = torch.nn.Parameter(target.weight.detach().clone(), requires_grad=False)
    for config in {id(one): one for one in (whole.config, whole.config.get_text_config())}.values():
        config.tie_word_embeddings = False
