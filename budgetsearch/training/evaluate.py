"""Dense validation loss and task accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from budgetsearch.training.attention import unmasked
from budgetsearch.training.batches import collate, width_step
from budgetsearch.training.gang import Gang, Pass
from budgetsearch.training.losses import target_losses
from budgetsearch.training.modes import mixed

if TYPE_CHECKING:
    from budgetsearch.training.data.reader import Reader
    from budgetsearch.training.data.store import TokenSet

EVAL_BATCH = 8
"""Sequences per evaluation pass, or the micro-batch where less fits."""
PARTS = 8
"""An evaluation that may run out of time is made in so many parts: each is of the next examples."""


def parts(count: int, batch: int, number: int = PARTS) -> list[range]:
    """The first ``count`` examples in about so many parts, none below a batch."""
    size = max(1, batch, -(-count // number))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def example_losses(
    model: Any,
    data: TokenSet,
    part: range,
    *,
    pad: int,
    device: str,
    half: str = "bf16",
    batch: int = EVAL_BATCH,
    gang: Gang | None = None,
) -> list[list[float]]:
    """Mean cross-entropy of each example of a part, in its order.

    One list for each member of the gang that the model wears, or one for the model as it is, which must
    be in eval mode. On a card products are taken in ``half``, as in training.
    """
    members = len(gang.members) if gang else 1
    order = sorted(part, key=lambda row: (data.lengths[row], row))
    losses = [[0.0] * len(order) for _ in range(members)]
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            packed = collate([data] * members, [rows] * members, pad, width_step(device))
            worn = gang.passing(Pass(packed.rows, packed.lengths)) if gang else nullcontext()
            with worn, unmasked(model, packed.ids.shape[1]), mixed(device, half):
                found = target_losses(model, packed.to(device)).view(members, -1)
            targets = [data.targets(row) for row in rows]
            means = torch.stack([part.mean(dim=1) for part in found.split(targets, dim=1)], dim=1)
            for member, some in zip(losses, means.tolist(), strict=True):
                for row, loss in zip(rows, some, strict=True):
                    member[row - part.start] = loss
    return losses


def mean_loss(losses: Sequence[float], weights: Sequence[int]) -> float:
    """Mean cross-entropy over all examples, each of which weighs so many trained tokens, or bytes."""
    return sum(loss * number for loss, number in zip(losses, weights, strict=True)) / sum(weights)


def generate_answers(
    model: Any,
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    *,
    device: str,
    max_new_tokens: int,
    max_prompt_tokens: int,
    give_up: Callable[[], bool] = lambda: False,
) -> list[str] | None:
    """Greedy answers to prompts, in one batch, up to their end of turn.

    None if ``give_up`` said so at some token: half an answer cannot be graded.
    """
    kept = [list(prompt)[-max_prompt_tokens:] for prompt in prompts]  # a prompt keeps its end, as in training
    width, pad = max(map(len, kept)), reader.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in kept], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in kept], device=device)
    cut = [False]

    def look(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        cut[0] = cut[0] or give_up()
        return torch.full((ids.shape[0],), cut[0], dtype=torch.bool, device=ids.device)

    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=reader.stops or None,
            stopping_criteria=[look],
        )
    if cut[0]:
        return None
    return [reader.answer(answer) for answer in output[:, width:].tolist()]


def accuracy(grades: Sequence[float]) -> float | None:
    """Mean grade, or None where nothing was graded."""
    return sum(grades) / len(grades) if grades else None
