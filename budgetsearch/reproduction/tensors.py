"""An adapter's tensors: their hash, their norm, and how far two of them lie apart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTER_FILE = "adapter_model.safetensors"
Tensors = Mapping[str, Any]


@dataclass(frozen=True)
class Apart:
    """How far two adapters lie apart."""

    largest: float
    """Largest difference of two weights."""
    relative: float
    """Norm of the difference, as a share of the first one's norm."""


def load(path: Path) -> dict[str, Any]:
    """The tensors of a file.

    Raises:
        ValueError: it is not one of tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Any] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return found


def tensors_sha256(tensors: Tensors) -> str:
    """Hash of names, types, shapes and bytes, whatever the file's layout."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def norm(tensors: Tensors) -> float:
    """Euclidean norm of all weights together."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for _, tensor in sorted(tensors.items())))


def apart(one: Tensors, other: Tensors) -> Apart | None:
    """How far they lie apart; None where names or shapes differ."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (one, other)]
    if shapes[0] != shapes[1]:
        return None
    differences = {name: one[name].double() - other[name].double() for name in one}
    largest = max((float(d.abs().max()) for d in differences.values() if d.numel()), default=0.0)
    whole = norm(one)
    return Apart(largest, norm(differences) / whole if whole else float(largest > 0))
