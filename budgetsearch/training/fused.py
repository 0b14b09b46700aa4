"""Liger's kernels on a card: norms, rotations and gated activations in one kernel each, where they compile.

Triton needs a compiler and a card that it knows, so nothing is believed: on a few numbers each kernel is
compiled and compared with plain torch, once a process; and a base that wears them must say what it said
before.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

PACKAGE = "liger-kernel"
TOLERANCE = 0.02
"""Largest difference of results and gradients, of the largest number: in 16 bits they differ by less."""


def version() -> str:
    """Of the installed kernels; empty: none are."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def refused(device: str) -> str:
    """Why the kernels are of no use on a card, in a few words; empty: each was compiled and is right."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError as error:
        return f"{PACKAGE} cannot be imported ({error})" if version() else f"{PACKAGE} is not installed"
    try:
        x, y = (torch.linspace(-2, 2, 256, device=device).view(1, 2, 2, 64) for _ in range(2))
        weight, angle = x[0, 0, 0], x[0, :, 0, :32].repeat(1, 2)  # both halves turn alike
        turn = angle.cos(), angle.sin()
        _compare(_norm, lambda a, b: LigerRMSNormFunction.apply(a, weight, 1e-6) + 0 * b, x, y, weight)
        _compare(_swiglu, LigerSiLUMulFunction.apply, x, y)
        _compare(_rotated, lambda a, b: torch.cat(LigerRopeFunction.apply(a, b, *_rows(turn))), x, y, *turn)
    except Exception as error:  # a compiler that is missing, a card too new: whatever Triton makes of it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        return f"they do not work here ({type(error).__name__}: {lines[0][:200]})"
    return ""


def _rows(turn: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    return [part.unsqueeze(0) for part in turn]


def _norm(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() + 0 * y


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def _rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    return torch.cat([turned(q), turned(k)])


def _compare(plain: Any, fused: Any, x: torch.Tensor, y: torch.Tensor, *rest: torch.Tensor) -> None:
    """Raises ArithmeticError if results or gradients differ."""
    found = []
    for way in (lambda a, b: plain(a, b, *rest), fused):
        given = [part.clone().requires_grad_(True) for part in (x, y)]
        out = way(*(part * 1 for part in given))  # the kernels work in place on what they are given
        kept = out.detach().clone()
        out.square().sum().backward()
        found.append([kept, *(part.grad for part in given)])
    for one, other in zip(*found, strict=True):
        if not (one - other).abs().max() <= TOLERANCE * one.abs().max():
            raise ArithmeticError(f"{plain.__name__.lstrip('_')} is off by {(one - other).abs().max():.3g}")


def fuse(model: Any, device: str) -> str:
    """Put the kernels into a base; if they change what it says, or cannot, it stays as it was.

    The loss is left as it is: it is fused here already, and over completion tokens only.

    Returns:
        Why the base wears none, in a few words; empty: it wears what Liger has for its kind.
    """
    if why := refused(device):
        return why
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    code = sys.modules[type(model).__module__]
    before = [(part, dict(vars(part))) for part in (code, *model.modules())]
    usual = _logits(model)
    try:
        _apply_liger_kernel_to_instance(
            model=model, rope=True, cross_entropy=False, fused_linear_cross_entropy=False
        )
        off = float((_logits(model) - usual).abs().max() / usual.abs().max())
        why = "" if off <= TOLERANCE else f"they change this model's logits by {off:.2g} of the largest"
    except Exception as error:  # the library knows the kind and not this release of it
        why = f"they do not fit this model ({type(error).__name__}: {str(error)[:200]})"
    if why:
        _restore(before)
    return why


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.arange(1, 9, device=model.get_output_embeddings().weight.device).unsqueeze(0)
        return model(input_ids=ids, use_cache=False).logits.float()


def _restore(before: Sequence[tuple[Any, Mapping[str, Any]]]) -> None:
    """The library replaces functions of transformers' module, and methods of a model's parts."""
    for part, values in before:
        for name in vars(part).keys() - values.keys():
            delattr(part, name)
        vars(part).update(values)
