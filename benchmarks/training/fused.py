"""Liger's kernels as far as a trace needs them: what they read, write and keep, one kernel each way.

Triton compiles for no CPU, so on the fake card stand-ins take their place: a norm, a rotation of queries and
keys, and an activation times up, which work on what they are given in place as Liger's do (release 0.8.5, by
reading). The numbers that they would compute are not there, as nothing is on fake tensors.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch

LIBRARY = "budgetsearch_fused"
OPS = {
    "norm": "(Tensor x, Tensor weight) -> (Tensor, Tensor)",
    "norm_backward": "(Tensor(a!) grad, Tensor x, Tensor weight, Tensor size) -> Tensor(a!)",
    "rotate": "(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> (Tensor(a!), Tensor(b!))",
    "swiglu": "(Tensor gate, Tensor up) -> Tensor",
    "swiglu_backward": "(Tensor(a!) gate, Tensor(b!) up, Tensor grad) -> (Tensor(a!), Tensor(b!))",
}
FAKES: dict[str, Any] = {
    "norm": lambda x, weight: (torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)),
    "norm_backward": lambda grad, x, weight, size: grad,
    "rotate": lambda q, k, cos, sin: (q, k),
    "swiglu": lambda gate, up: torch.empty_like(gate),
    "swiglu_backward": lambda gate, up, grad: (gate, up),
}


def _define() -> None:
    if hasattr(getattr(torch.ops, LIBRARY), "norm"):
        return
    for name, schema in OPS.items():
        torch.library.define(f"{LIBRARY}::{name}", schema)
        torch.library.register_fake(f"{LIBRARY}::{name}", FAKES[name])


class _Norm(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        found, size = torch.ops.budgetsearch_fused.norm(x, weight)
        ctx.save_for_backward(x, weight, size)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.ops.budgetsearch_fused.norm_backward(grads[0], *ctx.saved_tensors), None


class _Rotate(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        made = torch.ops.budgetsearch_fused.rotate(
            *(part.transpose(1, 2).contiguous() for part in (q, k)), cos, sin
        )
        return tuple(part.transpose(1, 2) for part in made)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        given = (part.transpose(1, 2).contiguous() for part in grads)
        made = torch.ops.budgetsearch_fused.rotate(*given, *ctx.saved_tensors)
        return *(part.transpose(1, 2) for part in made), None, None


class _Swiglu(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.ops.budgetsearch_fused.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return torch.ops.budgetsearch_fused.swiglu_backward(*ctx.saved_tensors, grads[0])


def _gated(self: Any, x: torch.Tensor) -> Any:
    return self.down_proj(_Swiglu.apply(self.gate_proj(x), self.up_proj(x)))


def fuse(model: Any) -> None:
    """Put the stand-ins where Liger puts its kernels in a model of Mistral's or Llama's kind."""
    _define()
    code = sys.modules[type(model).__module__]
    code.apply_rotary_pos_emb = (  # type: ignore[attr-defined]
        lambda q, k, cos, sin, *rest, **more: _Rotate.apply(q, k, cos, sin)
    )
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(lambda self, x: _Norm.apply(x, self.weight), module)
        elif hasattr(module, "gate_proj"):
            module.forward = MethodType(_gated, module)
