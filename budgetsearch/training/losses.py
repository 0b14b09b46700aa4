"""Cross-entropy over completion tokens; logits of the prompt are never computed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from budgetsearch.training.batches import IGNORED, Batch


def token_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy at each position from ``batch.first`` on, (rows, length - first), float32.

    Zero where there is no label.
    """
    keep = batch.ids.shape[1] - batch.first
    options = {"logits_to_keep": keep} if _keeps_logits(model) else {}
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **options).logits
    logits = logits[:, -keep:].float()
    labels = batch.labels[:, batch.first :]
    flat = cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels.shape)


def _keeps_logits(model: Any) -> bool:
    """Whether the model's forward can leave out the logits of a prefix."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
