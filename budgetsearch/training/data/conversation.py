"""What a row of data says, whatever its shape: a conversation, or plain text."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
"""A think block at the beginning of an answer."""
UNOPENED = re.compile(r"((?:(?!<think>).)*?)\n</think>[^\S\n]*(?:\n\s*|\Z)", re.DOTALL)
"""The same as a model writes it whose template opens the block: its end stands alone on a line."""
Role = Literal["system", "developer", "user", "assistant", "tool"]


class Skip(Exception):
    """A row that cannot be used."""

    def __init__(self, reason: str, place: str = "") -> None:
        """``reason`` is the same for all rows of its kind, so that they can be counted."""
        super().__init__(f"{place}: {reason}" if place else reason)
        self.reason, self.place = reason, place


@dataclass(frozen=True)
class Turn:
    """One message."""

    role: Role
    content: str = ""
    reasoning: str = ""
    """What the assistant thinks before it answers."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Each ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``."""
    about: Mapping[str, str] = field(default_factory=dict)
    """What else a template may look at: ``name`` and ``tool_call_id``."""
    trained: bool = True
    """Of an assistant's turn: whether it is learned, or context alone."""


@dataclass(frozen=True)
class Conversation:
    """Turns, and the functions that the assistant may call."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def trained(self) -> list[int]:
        """The turns to learn."""
        return [i for i, turn in enumerate(self.turns) if turn.role == "assistant" and turn.trained]

    def last_alone(self) -> Conversation:
        """The same with nothing but the last of these to learn."""
        last = self.trained()[-1]
        turns = [replace(turn, trained=turn.trained and i == last) for i, turn in enumerate(self.turns)]
        return replace(self, turns=tuple(turns))


@dataclass(frozen=True)
class Text:
    """A text without turns; all of it is learned."""

    text: str


@dataclass(frozen=True)
class Sample:
    """A row."""

    body: Conversation | Text
    check: Mapping[str, Any] | None = None
    """How to grade an answer; None compares it with the row's own."""
    place: str = ""
    """Where the row stands, for messages: ``train.jsonl:17``."""

    @property
    def asked(self) -> tuple[Turn, ...]:
        """What comes before the last turn to learn; of a text nothing."""
        return () if isinstance(self.body, Text) else self.body.turns[: self.body.trained()[-1]]

    @property
    def answer(self) -> str:
        """What the last turn to learn says, its reasoning and calls aside; of a text nothing."""
        if isinstance(self.body, Text):
            return ""
        return split_thought(self.body.turns[self.body.trained()[-1]])[1]

    def until_answer(self) -> Sample:
        """The same without what comes after the last turn to learn."""
        if isinstance(self.body, Text):
            return self
        return replace(self, body=replace(self.body, turns=self.body.turns[: self.body.trained()[-1] + 1]))


def to_json(sample: Sample) -> dict[str, Any]:
    """The sample as JSON values."""
    return dataclasses.asdict(sample)


def from_json(value: Mapping[str, Any]) -> Sample:
    """What ``to_json`` made."""
    body = value["body"]
    if "text" in body:
        return Sample(Text(body["text"]), value["check"], value["place"])
    turns = tuple(Turn(**{**turn, "tool_calls": tuple(turn["tool_calls"])}) for turn in body["turns"])
    return Sample(Conversation(turns, tuple(body["tools"])), value["check"], value["place"])


def split_thought(turn: Turn) -> tuple[str, str]:
    """The reasoning of a turn, wherever it stands, and the content without it."""
    block = None
    if turn.role == "assistant" and "</think>" in turn.content:
        block = THINK.match(turn.content) or UNOPENED.match(turn.content)
    bare = turn.content[block.end() :] if block else turn.content
    return turn.reasoning or (block.group(1).strip("\n") if block else ""), bare


def target_bytes(sample: Sample, *, last: bool = False, thoughts: bool = True) -> int:
    """Bytes of what is learned of a sample, whoever makes tokens of it and whatever is put around.

    ``last``: only its last answer is learned; ``thoughts``: reasoning is as well.
    """
    if isinstance(sample.body, Text):
        return len(sample.body.text.encode())
    talk = sample.body.last_alone() if last else sample.body
    turns = [talk.turns[place] for place in talk.trained()]
    calls = sum(len(json.dumps(call).encode()) for turn in turns for call in turn.tool_calls)
    said = (f"{turn.reasoning}{turn.content}" if thoughts else split_thought(turn)[1] for turn in turns)
    return calls + sum(len(text.encode()) for text in said)
