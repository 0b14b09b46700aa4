"""Whether members of a gang leave each other alone in a base model: found out by trying, not by a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from budgetsearch.training.attention import unmasked
from budgetsearch.training.batches import collate, width_step
from budgetsearch.training.gang import Gang, Pass
from budgetsearch.training.losses import target_losses
from budgetsearch.training.members import Member, Shop
from budgetsearch.training.modes import mixed

ROUNDED = 1e-3
"""Relative difference of a member's gradients, alone and beside another: in 32 bits sums in another order
come to less."""
ROUNDED_HALF = 0.2
"""The same in 16 bits, where a router may choose another expert; members that mix differ by about 1."""
STIRRED = 0.02
"""B begins at zero, which would hide what a neighbour's A does."""


def gangs_are_exact(base: Any, members: Sequence[Member], shop: Shop) -> bool:
    """Whether the first of two members has the same gradients alone and beside the other, which has another
    row of another length."""
    first, second = members
    generator = torch.Generator(shop.device)
    for number, member in enumerate(members):
        generator.manual_seed(number)
        for weight in member.adapter.b.values():
            noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
            weight.data.add_(noise, alpha=STIRRED)
    rows = _unlike_rows(shop)
    alone = _gradients(base, [first], [[rows[0]]], shop)
    beside = _gradients(base, [first, second], [[rows[0]], [rows[1]]], shop)
    size = float(alone.norm())
    half = shop.device != "cpu" or next(base.parameters()).dtype in (torch.bfloat16, torch.float16)
    return float((alone - beside).norm()) <= (ROUNDED_HALF if half else ROUNDED) * max(size, 1e-12)


def _unlike_rows(shop: Shop) -> tuple[int, int]:
    """The shortest row, and one that is about twice as long, or the last."""
    lengths = shop.data.train.lengths
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    longer = (row for row in order if lengths[row] >= 2 * lengths[order[0]])
    return order[0], next(longer, order[-1])


def _gradients(base: Any, group: Sequence[Member], rows: list[list[int]], shop: Shop) -> torch.Tensor:
    """All gradients of the first of the group, one after the other."""
    batch = collate([shop.data.train] * len(rows), rows, shop.pad, width_step(shop.device))
    gang = Gang(base, [member.adapter for member in group])
    now = Pass(batch.rows, batch.lengths, ["exact"] * len(group), training=True)
    with gang.worn(), gang.passing(now), unmasked(base, batch.ids.shape[1]):
        with mixed(shop.device, shop.half):
            losses = target_losses(base, batch.to(shop.device))
        torch.stack([part.mean() for part in losses.split(list(batch.targets))]).sum().backward()
        found = [w.grad.detach().flatten().float() for w in group[0].adapter.weights().values()]
        gradients = torch.cat(found)
    for member in group:
        member.clear()
    return gradients
