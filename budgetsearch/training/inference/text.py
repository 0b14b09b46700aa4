"""From tokens to text as they come: whole characters, and nothing of a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

CONTEXT = 4
"""Tokens of the prompt that the first token is decoded behind: alone it may lose the space in front of it."""
HALF = "\ufffd"
"""What a part of a character decodes to."""
MOST_HALVES = 3
"""So many of them at the end may still become one character: it has four bytes at most."""


class Pieces:
    """What single tokens say, spaces in front included."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
        self.piece = lru_cache(maxsize=100_000)(self._piece)

    def text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """What tokens say together; ``special``: also those that mark the parts of a conversation."""
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )
        )

    def _piece(self, token: int) -> str:
        before = self.text(self._anchor, special=True)
        return self.text([*self._anchor, token], special=True)[len(before) :]


class Writer:
    """The text of one answer, token by token."""

    def __init__(self, pieces: Pieces, prompt: Sequence[int], stops: Sequence[str]) -> None:
        """``stops``: texts at the first of which the answer ends; it does not hold them."""
        self._pieces, self._stops = pieces, [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._ids = list(prompt[-CONTEXT:])
        self._before, self._read, self._taken = 0, len(self._ids), 0
        self.text = ""
        self.stopped = False
        self.closed = False

    def add(self, token: int) -> None:
        """Take a token; half a character waits for its other half."""
        self._ids.append(token)
        new = self._new()
        halves = len(new) - len(new.rstrip(HALF))
        sure = max(self._taken, len(new) - min(halves, MOST_HALVES))
        self._take(new[self._taken : sure])
        self._taken = sure
        if not halves:
            self._before, self._read, self._taken = self._read, len(self._ids), 0

    def close(self) -> None:
        """Nothing more comes: what waited is text as it is."""
        if not self.stopped:
            self._take(self._new()[self._taken :])
        self.closed = True

    @property
    def shown(self) -> int:
        """Characters that are sure to stay: behind them a stop sequence may have begun."""
        if self.stopped or self.closed:
            return len(self.text)
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stops):
                return len(self.text) - length
        return len(self.text)

    def _new(self) -> str:
        before = self._pieces.text(self._ids[self._before : self._read])
        return self._pieces.text(self._ids[self._before :])[len(before) :]

    def _take(self, new: str) -> None:
        start = max(0, len(self.text) - self._longest + 1)
        self.text += new
        found = [at for stop in self._stops if (at := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
