"""From logits to the next token of each sequence, each with random numbers of its own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from budgetsearch.training.inference.sequence import Answer


def draw(logits: torch.Tensor, answers: Sequence[Answer]) -> None:
    """Give each answer that is not over its next token; logits are (answers, vocabulary), before any change.

    A sequence's tokens depend on its own prompt, sampling and seed, not on who shares its batch, as far as
    sums of the model round alike.
    """
    own = logits.float()
    logprobs = torch.log_softmax(own, dim=-1)
    for row, answer in enumerate(answers):
        if answer.finish:
            continue
        if answer.cancelled:
            answer.end("cancelled")
            continue
        token = chosen(own[row], answer)
        answer.take(token, float(logprobs[row, token]), likeliest(logprobs[row], answer.sampling.candidates))


def chosen(logits: torch.Tensor, answer: Answer) -> int:
    """The next token: the likeliest at temperature 0, else drawn.

    Raises:
        ArithmeticError: the model's logits are no numbers.
    """
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    how = answer.sampling
    scores = _penalized(logits, answer)
    if not torch.isfinite(scores.max()):
        raise ArithmeticError("the model's logits are not finite")
    if how.temperature == 0:
        return int(scores.argmax())
    scores = ((scores - scores.max()) / how.temperature).unsqueeze(0)
    ids = torch.empty((1, 0), dtype=torch.long, device=scores.device)
    if 0 < how.top_k < scores.shape[-1]:
        scores = TopKLogitsWarper(how.top_k)(ids, scores)
    if how.top_p < 1:
        scores = TopPLogitsWarper(how.top_p)(ids, scores)
    # On the CPU, so that a seed draws the same on every card.
    chances = torch.softmax(scores[0], dim=-1).cpu()
    return int(torch.multinomial(chances, 1, generator=answer.generator))


def _penalized(logits: torch.Tensor, answer: Answer) -> torch.Tensor:
    how = answer.sampling
    if not (how.presence or how.frequency):
        return logits
    counts = Counter(token.id for token in answer.tokens)
    scores = logits.clone()
    for token, count in counts.items():
        scores[token] -= how.presence + how.frequency * count
    return scores


def likeliest(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The ``count`` likeliest tokens with their logprobs."""
    if not count:
        return ()
    found = logprobs.topk(min(count, logprobs.shape[-1]))
    pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return tuple(pair for pair in pairs if math.isfinite(pair[1]))  # JSON has no infinity
