"""Causal attention without a mask, for rows that are padded on the right: nothing is built and nobody waits.

transformers would look on the device whether rows are packed, in every pass; under a name of our own it
builds no mask. Which kernel SDPA takes is decided here too: the grouped heads of a card before Ampere would
fall to the one that keeps all scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

NAME = "budgetsearch-causal"
GROUPED_FROM = (8, 0)
"""The first compute capability whose fused kernels take fewer heads of keys than of queries."""
WIDEST_HEAD = 256
"""Of a fused kernel with grouped heads."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""What a configuration calls the farthest position that attention reaches."""
TOLERANCE = 0.02
"""Largest difference between the logits of both ways, of the largest logit: in 16 bits kernels differ by
less, and without causality the logits are others."""
_AGREES = "_budgetsearch_causal"


@contextmanager
def unmasked(model: Any, width: int) -> Iterator[None]:
    """Inside, forward and backward of ``model`` on right-padded rows of ``width`` build no mask.

    A model for which that is not the same goes on as it is: with a window that is narrower, or with an
    attention of its own.
    """
    config = model.config.get_text_config()
    if not _is_plain(config, width) or not agrees(model):
        yield
        return
    with _named(config):
        yield


def agrees(model: Any) -> bool:
    """Whether both ways lead to the same logits; found out once, on a few tokens of the bare model."""
    known: bool | None = getattr(model, _AGREES, None)
    if known is None:
        known = _compare(model)
        setattr(model, _AGREES, known)
    return known


def _compare(model: Any) -> bool:
    config = model.config.get_text_config()
    if not _is_plain(config, 1):
        return False
    ids = torch.arange(8, device=model.get_output_embeddings().weight.device).unsqueeze(0)
    with torch.no_grad():
        usual = model(input_ids=ids, use_cache=False).logits
        try:
            with _named(config):
                ours = model(input_ids=ids, use_cache=False).logits
        except Exception:  # whatever a model's own code makes of a name that it does not know
            return False
    return bool((usual - ours).abs().max() <= TOLERANCE * usual.abs().max())


def _is_plain(config: Any, width: int) -> bool:
    if config._attn_implementation != "sdpa" or getattr(config, "use_bidirectional_attention", False):
        return False
    return all(width <= (getattr(config, name, None) or width) for name in WINDOWS)


@contextmanager
def _named(config: Any) -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """(rows, heads, length, width) to (rows, length, heads, width), as transformers wants it."""
    if attention_mask is not None or any(
        options.get(name) is not None for name in ("softcap", "position_bias")
    ):
        raise ValueError("this attention is causal and nothing else")
    groups = query.shape[1] // key.shape[1]
    grouped = groups > 1 and _takes_groups(key, value)
    if groups > 1 and not grouped:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    found = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
        is_causal=True,
        enable_gqa=grouped,
    )
    return found.transpose(1, 2).contiguous(), None


def _takes_groups(key: torch.Tensor, value: torch.Tensor) -> bool:
    fits = key.shape[-1] == value.shape[-1] <= WIDEST_HEAD
    return fits and (key.device.type != "cuda" or _capability(key.device.index or 0) >= GROUPED_FROM)


@cache
def _capability(index: int) -> tuple[int, int]:
    major, minor = torch.cuda.get_device_capability(index)
    return major, minor
