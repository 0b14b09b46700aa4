"""Cross-entropy over completion tokens; logits of other positions are never computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear

from budgetsearch.core.errors import ModelError
from budgetsearch.training.batches import Batch

CHUNK_LOGITS = 2**23
"""Logits that exist at a time: 32 MiB in float32."""
CARD_ROWS = 256
"""On a card so many positions at least: with fewer the product waits for the output layer's weight."""
_PLAIN = "_budgetsearch_plain_head"


def target_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy of every label of the batch, (targets,), in the order of ``batch.labels``.

    float32, or float64 on a float64 model. The rows are padded on the right and attention is causal, so
    no row sees its padding and no mask is needed.

    Raises:
        ModelError: the model does not end in a layer that turns hidden states into logits.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError("the base model has no output layer for its logits; use a causal language model")
    if has_plain_head(model):
        with _instead(head, lambda hidden: hidden):
            hidden = _logits(model, head, batch)
        losses: torch.Tensor = FrozenHeadLoss.apply(hidden, head.weight, head.bias, batch.labels)
        return losses
    logits = _logits(model, head, batch)
    return cross_entropy(_wide(logits), batch.labels, reduction="none")


def _logits(model: Any, head: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """(targets, vocabulary): what the model makes of the hidden states before each label."""

    def select(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[batch.places].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        logits = model(input_ids=batch.ids, use_cache=False).logits
    finally:
        handle.remove()
    if logits.shape[:2] != (1, len(batch.labels)):
        raise ModelError("the base model's output layer does not take the hidden states of all positions")
    return logits[0]


def has_plain_head(model: Any) -> bool:
    """Whether logits are the output layer's product and nothing else: no soft cap, no scale.

    Found out once, by comparing both on two tokens.
    """
    known: bool | None = getattr(model, _PLAIN, None)
    if known is None:
        known = _compare_head(model)
        setattr(model, _PLAIN, known)
    return known


def _compare_head(model: Any) -> bool:
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.weight.requires_grad:
        return False
    seen: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with torch.no_grad():
            ids = torch.zeros((1, 2), dtype=torch.long, device=head.weight.device)
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return len(seen) == 1 and torch.equal(seen[0], logits)


@contextmanager
def _instead(module: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, the module computes something else."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class FrozenHeadLoss(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """Cross-entropy behind a frozen output layer, without ever holding all the logits.

    The weight needs no gradient, so that of the hidden states can be made in the forward pass, a chunk of
    positions at a time (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        """hidden (targets, width), weight (vocabulary, width), labels (targets,) to losses (targets,)."""
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        losses = []
        step = max(1 if hidden.device.type == "cpu" else CARD_ROWS, CHUNK_LOGITS // len(weight))
        for start in range(0, len(labels), step):
            part = slice(start, start + step)
            logits = _wide(linear(hidden[part], weight, bias))
            normal = torch.logsumexp(logits, dim=1, keepdim=True)
            chosen = labels[part].unsqueeze(1)
            losses.append((normal - logits.gather(1, chosen)).squeeze(1))
            if gradient is not None:
                grades = logits.sub_(normal).exp_()
                grades.scatter_add_(1, chosen, -torch.ones_like(normal))
                gradient[part] = grades.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Each position's gradient times what its loss counts."""
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].unsqueeze(1).to(gradient.dtype), None, None, None
