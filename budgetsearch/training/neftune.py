"""Noise on the embeddings in training, each member's own (NEFTune: Jain et al. 2023, arXiv 2310.05914)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from budgetsearch.training.gang import Pass, number_of


@contextmanager
def noisy(base: Any, now: Pass, alphas: Sequence[float]) -> Iterator[None]:
    """Inside, alpha / sqrt(length x width) times uniform noise of -1 to 1 lies on the embeddings of each
    member's rows. It depends on the member's seed and rows alone, whatever its neighbours are."""
    if not any(alphas):
        yield
        return

    def add(module: Any, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        noise = torch.zeros_like(out)
        for k, part in enumerate(noise.split(list(now.rows))):
            if alphas[k]:
                _fill(part[:, : now.lengths[k]], alphas[k], f"{now.seeds[k]}/embeddings")
        return out + noise

    handle = base.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _fill(part: torch.Tensor, alpha: float, seed: str) -> None:
    generator = torch.Generator(part.device)
    generator.manual_seed(number_of(seed))
    most = alpha / math.sqrt(part.shape[1] * part.shape[2])
    drawn = torch.empty(part.shape, dtype=torch.float32, device=part.device)
    part.copy_(drawn.uniform_(-most, most, generator=generator))
