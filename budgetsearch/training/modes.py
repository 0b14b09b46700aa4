"""Ways to run the base while it trains: in 16 bits, with activations computed again, compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def training_mode(base: Any, *, recompute: bool, torch_compile: bool) -> Iterator[None]:
    """Inside, the base's layers recompute their activations (gradient checkpointing) or are compiled."""
    with _recomputing(base, recompute, asleep=not torch_compile), _compiled(base, torch_compile):
        yield


_KEPT = "_budgetsearch_compiled"


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The 16-bit types by their name."""


def mixed(device: str, half: str = "bf16") -> Any:
    """16-bit autocast on a card; on the CPU everything computes as it is stored."""
    return torch.autocast("cuda" if device != "cpu" else "cpu", dtype=HALVES[half], enabled=device != "cpu")


@contextmanager
def _recomputing(base: Any, wanted: bool, *, asleep: bool) -> Iterator[None]:
    """Inside, the base's layers compute their activations again in the backward pass, if wanted.

    The base's own dropout stays off, for its one stream of random numbers would tie the members of a gang
    together: the layers believe to be in training only until they begin to compute. ``asleep``: so it is; for
    torch.compile, which cannot follow that, their dropout is zero instead.
    """
    if not wanted:
        yield
        return
    # The older name is what earlier releases of transformers 5 have, and 6 will not know it.
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    enable, disable = (getattr(base, f"{name}_checkpointing_{what}") for what in ("enable", "disable"))
    enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    layers = blocks(base)
    zeroed = [] if asleep else _without_dropout(layers)
    for layer in layers:
        layer.training = True
        if asleep:
            layer._gradient_checkpointing_func = _asleep(layer, layer._gradient_checkpointing_func)
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        for layer, name, share in zeroed:
            setattr(layer, name, share)
        disable()


def _asleep(layer: Any, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """The checkpoint function of a layer that computes, each time, as if it were not trained."""

    def call(function: Callable[..., Any], *args: Any) -> Any:
        def run(*inner: Any) -> Any:
            layer.training = False
            try:
                return function(*inner)
            finally:
                layer.training = True

        return checkpoint(run, *args)

    return call


def _without_dropout(layers: list[Any]) -> list[tuple[Any, str, float]]:
    """Set the shares that the layers themselves drop to zero; returns what they were."""
    found = [
        (layer, name, share)
        for layer in layers
        for name, share in vars(layer).items()
        if "dropout" in name and isinstance(share, float) and share
    ]
    for layer, name, _ in found:
        setattr(layer, name, 0.0)
    return found


@contextmanager
def kept_activations(base: Any, wanted: bool) -> Iterator[None]:
    """Inside, a base that computes its activations again does not, if so wanted."""
    layers = blocks(base) if wanted else []
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


@contextmanager
def _compiled(base: Any, wanted: bool) -> Iterator[None]:
    """Inside, torch.compile runs what lies between the target layers of each block, if wanted.

    What was compiled stays with the base, whatever adapters it wears later: it is paid for once. Outside,
    for evaluations and answers, nothing is compiled.
    """
    layers = blocks(base) if wanted else []
    for layer in layers:
        if not hasattr(layer, _KEPT):
            layer.compile(dynamic=True)
            setattr(layer, _KEPT, layer._compiled_call_impl)
        layer._compiled_call_impl = getattr(layer, _KEPT)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def blocks(base: Any) -> list[Any]:
    """The repeated layers of a transformer."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
