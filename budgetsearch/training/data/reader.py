"""What a model answers, as text: no template is rendered for it, one look at it said all that counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Reader:
    """Makes text of answers."""

    tokenizer: Any
    stops: list[int]
    """The tokens that end an answer, the trained end of turn first."""
    lead: str = ""
    """What the template writes between the head of a turn and its answer, where the model may do so too."""

    @classmethod
    def of(cls, tokenizer: Any, facts: Mapping[str, Any]) -> Reader:
        """From what a preparation or another process found out."""
        return cls(tokenizer, list(facts["stops"]), str(facts["lead"]))

    @cached_property
    def marks(self) -> re.Pattern[str]:
        """The template's words."""
        return marks_of(self.tokenizer)

    def answer(self, ids: Sequence[int]) -> str:
        """What the model says: up to its end of turn, without reasoning and without the template's words."""
        ends = {*self.stops}
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        text = decoded(self.tokenizer, ids[:stop])
        if self.lead:
            text = text.rpartition(self.lead)[2]
        text = text.rpartition("</think>")[2]
        return self.marks.sub("", text).strip()


def marks_of(tokenizer: Any) -> re.Pattern[str]:
    """Matches every token of the tokenizer's own that is no piece of a text."""
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    tokens += tokenizer.all_special_tokens
    longest_first = sorted({*tokens} - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"\b\B")


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids as they are."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
