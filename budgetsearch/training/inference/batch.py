"""Sequences through the model together: prompts that are looked at, and answers that are written.

``generate`` of transformers runs the model with the cache that its family needs; which token comes next, and
who is done, is decided here, by a logits processor and a stopping criterion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from budgetsearch.machine.memory import LOOKED_LOGITS
from budgetsearch.training.inference.draw import draw, likeliest
from budgetsearch.training.inference.sequence import Answer, Token


class Batch:
    """A model that is asked; one thread at a time."""

    def __init__(self, model: Any, device: str, pad: int) -> None:
        from transformers import GenerationConfig

        self._model, self._device, self._pad = model, device, pad
        # What the base's own configuration would add (penalties, forced tokens, its ends) is not asked for.
        for one in (model, model.get_base_model() if hasattr(model, "get_base_model") else model):
            one.generation_config = GenerationConfig()
        self._vocabulary = int(model.config.get_text_config().vocab_size)

    def look(self, answers: Sequence[Answer]) -> None:
        """Tell of the tokens of prompts, and take each answer's first token: the same pass knows it."""
        group: list[Answer] = []
        for answer in sorted(answers, key=lambda one: len(one.prompt)):
            if group and (len(group) + 1) * len(answer.prompt) * self._vocabulary > LOOKED_LOGITS:
                self._look(group)
                group = []
            group.append(answer)
        if group:
            self._look(group)

    def _look(self, answers: Sequence[Answer]) -> None:
        """Rows are padded on the right: attention is causal, so none sees its padding."""
        width = max(len(one.prompt) for one in answers)
        rows = [one.prompt + [self._pad] * (width - len(one.prompt)) for one in answers]
        masks = [[1] * len(one.prompt) + [0] * (width - len(one.prompt)) for one in answers]
        with torch.inference_mode():
            logits = self._model(
                input_ids=torch.tensor(rows, device=self._device),
                attention_mask=torch.tensor(masks, device=self._device),
                use_cache=False,
            ).logits
            for row, answer in enumerate(answers):
                own = logits[row, : len(answer.prompt)].float()
                answer.prompt_tokens = _told(own, answer)
                if answer.left > 0:
                    draw(own[-1:], [answer])
                else:
                    answer.end("length")

    def write(self, answers: Sequence[Answer], pause: Callable[[], bool]) -> None:
        """Go on with answers until each is over, or until ``pause`` says so, which is asked at each token;
        it can be called again with others beside them."""
        from transformers import GenerationConfig

        known = [one.ids for one in answers]
        width = max(map(len, known))
        rows = [[self._pad] * (width - len(row)) + row for row in known]
        masks = [[0] * (width - len(row)) + [1] * len(row) for row in known]
        most = max(one.left for one in answers)
        with torch.inference_mode():
            self._model.generate(
                input_ids=torch.tensor(rows, device=self._device),
                attention_mask=torch.tensor(masks, device=self._device),
                generation_config=GenerationConfig(
                    max_new_tokens=most, do_sample=False, use_cache=True, pad_token_id=self._pad
                ),
                logits_processor=[self._drawing(answers)],
                stopping_criteria=[_ending(answers, pause)],
            )

    def _drawing(self, answers: Sequence[Answer]) -> Callable[[Any, Any], Any]:
        """Scores that leave only the token that was drawn."""

        def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            before = [len(one.tokens) for one in answers]
            draw(scores, answers)
            taken = [
                one.tokens[-1].id if len(one.tokens) > count else self._pad
                for one, count in zip(answers, before, strict=True)
            ]
            only = torch.full_like(scores, -torch.inf)
            only[range(len(taken)), taken] = 0.0
            return only

        return process


def _ending(answers: Sequence[Answer], pause: Callable[[], bool]) -> Callable[..., torch.Tensor]:
    def look(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        over = [bool(one.finish) for one in answers]
        if all(over) or pause():
            over = [True] * len(answers)
        return torch.tensor(over, device=ids.device)

    return look


def _told(logits: torch.Tensor, answer: Answer) -> list[Token]:
    """The tokens of a prompt; logits are (tokens, vocabulary)."""
    logprobs = torch.log_softmax(logits, dim=-1)
    told = [Token(answer.prompt[0], None)]
    for place, token in enumerate(answer.prompt[1:]):
        some = likeliest(logprobs[place], answer.sampling.candidates)
        told.append(Token(token, float(logprobs[place, token]), some))
    return told
