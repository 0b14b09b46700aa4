"""One answer in the making: what was asked, how to draw, and what has come so far."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from budgetsearch.training.inference.text import Pieces, Writer

Finish = Literal["", "stop", "length", "cancelled", "error"]
MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and until when."""

    max_tokens: int
    """0: the prompt alone is looked at."""
    temperature: float = 1.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all of them."""
    stop: tuple[str, ...] = ()
    seed: int | None = None
    """None: another one each time."""
    candidates: int = 0
    """Likeliest tokens that are told of at each place."""
    echo: bool = False
    """Whether the tokens of the prompt are told of as well."""
    presence: float = 0.0
    """Taken from the logits of tokens that have come, once, ..."""
    frequency: float = 0.0
    """... and for each time."""


@dataclass(frozen=True)
class Token:
    """A token with what the model thought of it: natural logarithms of its own probabilities, as they are
    before temperature and cuts."""

    id: int
    logprob: float | None
    """None of the first token of a prompt, which nothing comes before."""
    candidates: tuple[tuple[int, float], ...] = ()
    """(token, logprob), the likeliest first."""
    start: int = 0
    """Characters of the answer before it."""


class Answer:
    """A sequence that the engine goes on with until it has a ``finish``; the engine's thread alone writes."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        pieces: Pieces,
        ends: Sequence[int],
        *,
        number: int = 0,
        tell: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        """``ends``: tokens that end an answer. ``number``: of several to one prompt, so that their seeds
        differ. ``tell`` hears of each token, in the engine's thread."""
        self.prompt, self.sampling, self.tell = list(prompt), sampling, tell
        self.ends = frozenset(ends)
        self.writer = Writer(pieces, self.prompt, sampling.stop)
        seed = secrets.randbelow(MOST_SEED) if sampling.seed is None else sampling.seed + number
        self.generator = torch.Generator().manual_seed(seed % MOST_SEED)
        self.tokens: list[Token] = []
        self.prompt_tokens: list[Token] | None = None
        self.finish: Finish = ""
        self.failure = ""
        self.cancelled = False
        """Set by whoever no longer wants it."""

    @property
    def ids(self) -> list[int]:
        """All that the model has seen of it."""
        return self.prompt + [token.id for token in self.tokens]

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.sampling.max_tokens - len(self.tokens)

    def take(self, token: int, logprob: float, candidates: tuple[tuple[int, float], ...]) -> None:
        """The next token."""
        if token in self.ends:
            return self.end("stop")
        self.tokens.append(Token(token, logprob, candidates, len(self.writer.text)))
        self.writer.add(token)
        if self.writer.stopped:
            return self.end("stop")
        if self.left <= 0:
            return self.end("length")
        self.tell(self)
        return None

    def end(self, finish: Finish, failure: str = "") -> None:
        """It is over; of a stop sequence neither text nor tokens stay."""
        self.writer.close()
        if self.writer.stopped:
            finish = "stop"
            length = len(self.writer.text)
            self.tokens = [token for token in self.tokens if token.start < length]
        self.failure = failure
        self.finish = finish
        self.tell(self)
