"""Dense validation loss and task accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from budgetsearch.training.batches import IGNORED, collate
from budgetsearch.training.losses import token_losses

if TYPE_CHECKING:
    from budgetsearch.training.tokens import TokenSet

EVAL_BATCH = 8
"""Sequences per evaluation pass, or the micro-batch where less fits."""


def example_losses(
    model: Any, data: TokenSet, count: int, *, pad: int, device: str, batch: int = EVAL_BATCH
) -> tuple[list[float], list[int]]:
    """Mean cross-entropy of each of the first ``count`` examples, and their target tokens.

    The model must be in eval mode.
    """
    order = sorted(range(min(count, len(data))), key=lambda row: (data.lengths[row], row))
    losses, targets = [0.0] * len(order), [0] * len(order)
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            moved = collate(data, rows, pad).to(device)
            sums = token_losses(model, moved).sum(dim=1).tolist()
            counts = (moved.labels != IGNORED).sum(dim=1).tolist()
            for row, total, number in zip(rows, sums, counts, strict=True):
                losses[row], targets[row] = total / number, number
    return losses, targets


def mean_loss(losses: Sequence[float], targets: Sequence[int]) -> float:
    """Mean cross-entropy per completion token over all examples."""
    return sum(loss * number for loss, number in zip(losses, targets, strict=True)) / sum(targets)


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    device: str,
    max_new_tokens: int,
    max_prompt_tokens: int,
    give_up: Callable[[], bool] = lambda: False,
) -> list[str] | None:
    """Greedy answers to rendered prompts, in one batch, decoded without special tokens.

    None if ``give_up`` said so at some token: half an answer cannot be graded.
    """
    tokenizer.padding_side = tokenizer.truncation_side = "left"  # a prompt keeps its end, as in training
    batch = tokenizer(
        list(prompts),
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=max_prompt_tokens,
        add_special_tokens=False,
    ).to(device)
    cut = [False]

    def look(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        cut[0] = cut[0] or give_up()
        return torch.full((ids.shape[0],), cut[0], dtype=torch.bool, device=ids.device)

    with torch.inference_mode():
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=[look],
        )
    if cut[0]:
        return None
    answers = output[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def accuracy(grades: Sequence[float]) -> float | None:
    """Mean grade, or None where nothing was graded."""
    return sum(grades) / len(grades) if grades else None
