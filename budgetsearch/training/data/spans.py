"""A conversation as one text, and where in it stands what the assistant writes.

A template's own ``{% generation %}`` blocks say it. Else the conversation is rendered again with another
answer in the place of each: what differs is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from budgetsearch.training.data.conversation import Conversation, Skip, split_thought
from budgetsearch.training.data.templates import BLOCK, OPEN, Template, X, same_start

LOST = "the chat template leaves out the reasoning of earlier answers"
UNSHOWN = "the chat template does not show the functions (tools)"
HIDDEN = "where an answer begins and ends in what the chat template writes cannot be found"


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters of each turn to learn, its end of turn with it."""
    asked: int
    """So many characters come before the last turn to learn when it is asked for: an empty think block may
    be among them."""


def rendered(template: Template, talk: Conversation) -> Rendered:
    """The whole conversation, and what of it is learned.

    Raises:
        Skip: the template does not take it, or what it writes is not what the row says.
    """
    chat = template.chat(talk)
    shift = len(talk.turns) - len(chat)  # a system text may have been folded in, or put in front
    trained = talk.trained()
    text, marked = template.render_marked(chat, talk.tools, marked=template.has_markers())
    turns = [i for i, turn in enumerate(talk.turns) if turn.role == "assistant"]
    if len(marked) == len(turns):
        own = dict(zip(turns, marked, strict=True))
        spans = [_tidied(template, text, own[i]) for i in trained]
    else:
        spans = [_differing(template, chat, talk.tools, text, i - shift) for i in trained]
    if spans != sorted(spans) or any(a[1] > b[0] for a, b in pairwise(spans)):
        raise Skip(HIDDEN)
    _check(template, chat, talk, text)
    for i, (start, end) in zip(trained, spans, strict=True):
        _check_turn(template, talk, i, text[start:end])
    return _with_thought(template, chat, talk, text, spans)


def _tidied(template: Template, text: str, span: tuple[int, int]) -> tuple[int, int]:
    """A marked block without the head and without what follows the end of turn."""
    start, end = span
    if template.head and text.startswith(template.head, start):
        start += len(template.head)
    if template.ends and not text[start:end].rstrip().endswith(tuple(template.ends)):
        return start, _end(template, text, end)
    return start, start + len(text[start:end].rstrip())


# ----------------------------------------------------------------------------- differences


def _differing(
    template: Template, chat: Sequence[dict[str, Any]], tools: Sequence[Any], text: str, index: int
) -> tuple[int, int]:
    """Where the turn stands, by rendering others in its place."""
    for other in _others(chat[index]):
        try:
            again = template.render([*chat[:index], other, *chat[index + 1 :]], tools)
        except Skip:
            continue
        if X in again:
            start = same_start(text, again)
            room = min(len(text), len(again)) - start
            same = same_start(text[::-1][:room], again[::-1][:room])
            return _start(template, text, start), _end(template, text, len(text) - same)
    raise Skip(HIDDEN)


def _others(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """What may stand in the place of a turn: some templates ask for a call in front of its result."""
    call = {"type": "function", "function": {"name": X, "arguments": {}}}
    calls = [{**item, **call} for item in turn.get("tool_calls", ())]
    plain = {"role": "assistant", "content": X}
    return [plain, {**plain, "content": "", "tool_calls": calls}] if calls else [plain]


def _start(template: Template, text: str, at: int) -> int:
    """Behind the head that is in front of ``at``, if nothing but what belongs to an answer is between."""
    for mark in template.marks.finditer(text, max(0, at - 64)):
        if mark.start() < at < mark.end():
            at = mark.start()
    if not template.head:
        lead = template.leads[0] if template.leads else ""
        return at - len(lead) if not lead.strip() and text.endswith(lead, 0, at) else at
    head = text.rfind(template.head, 0, at)
    gap = text[head + len(template.head) : at]
    if head >= 0 and (BLOCK.fullmatch(gap) or any(lead.startswith(gap) for lead in template.leads)):
        return head + len(template.head)
    return at


def _end(template: Template, text: str, at: int) -> int:
    """Behind the end of turn that follows ``at``."""
    for mark in template.marks.finditer(text, max(0, at - 64)):
        if mark.start() < at < mark.end():
            at = mark.start()
    if not template.ends:
        return at
    found = re.compile("|".join(map(re.escape, template.ends))).search(text, at)
    if not found or (template.head and template.head in text[at : found.start()]):
        raise Skip(HIDDEN)
    return found.end()


# ---------------------------------------------------------------------------------- checks


def _check(template: Template, chat: Sequence[dict[str, Any]], talk: Conversation, text: str) -> None:
    """Nothing that is asked may be missing."""
    for index, turn in enumerate(chat):
        content = str(turn["content"]).strip()
        if turn["role"] == "assistant" or not content or content in text:
            continue
        altered = [*chat[:index], {**turn, "content": f"{content} {X}"}, *chat[index + 1 :]]
        if template.render(altered, talk.tools) == text:
            raise Skip(f"the chat template leaves out a turn of the role {turn['role']!r}")
    if talk.tools and template.render(chat, ()) == text:
        template.notes[UNSHOWN] += 1


def _check_turn(template: Template, talk: Conversation, index: int, written: str) -> None:
    """What is learned must be what the turn says."""
    turn = talk.turns[index]
    thought, bare = split_thought(turn)
    if bare.strip() not in written:
        raise Skip("the chat template changes what an answer says")
    for call in turn.tool_calls:
        if call["function"]["name"] not in written:
            raise Skip("the chat template does not write tool calls")
    lost = thought.strip() not in written and template.options.thinking != "off"
    if lost and (template.reasoning == "native" or index != _last(talk)):
        template.notes[LOST] += 1


def _last(talk: Conversation) -> int:
    """The last turn of the assistant."""
    return max(i for i, turn in enumerate(talk.turns) if turn.role == "assistant")


# ------------------------------------------------------------------------------- reasoning


def _with_thought(
    template: Template,
    chat: Sequence[dict[str, Any]],
    talk: Conversation,
    text: str,
    spans: list[tuple[int, int]],
) -> Rendered:
    """With the think block that the last answer is asked to fill, once."""
    index = talk.trained()[-1]
    start, end = spans[-1]
    place = index - (len(talk.turns) - len(chat))
    opening = ""
    if index == _last(talk) and (template.opens or template.reasoning == "insert"):
        asked = _prompt(template, chat[:place], talk)
        if asked is not None and asked.startswith(text[:start]):
            opening = asked[start:] if OPEN.fullmatch(asked[start:]) else ""
        if opening and text.startswith(opening, start):
            return Rendered(text, (*spans[:-1], (start + len(opening), end)), start + len(opening))
        thought = split_thought(talk.turns[index])[0] if template.options.thinking != "off" else ""
        lost = template.reasoning == "insert" and thought
        if opening or lost:
            block = f"{thought}\n</think>\n\n"
            block = block if opening else f"<think>\n{block}"
            text = text[:start] + opening + block + text[start:]
            begin = start + len(opening)
            return Rendered(text, (*spans[:-1], (begin, end + len(opening + block))), begin)
    return Rendered(text, tuple(spans), _reach(template, chat[:place], talk, text, start))


def _prompt(
    template: Template, chat: Sequence[dict[str, Any]], talk: Conversation, thinking: bool | None = None
) -> str | None:
    """What the template asks with; None if it does not take the beginning of a conversation."""
    try:
        return template.render(chat, talk.tools, prompt=True, thinking=thinking)
    except Skip:
        return None


def _reach(
    template: Template, chat: Sequence[dict[str, Any]], talk: Conversation, text: str, start: int
) -> int:
    """How far the longest prompt for this answer goes: it may close a think block already."""
    block = BLOCK.match(text, start)
    if not block or not block.group().strip():
        return start
    found = [start]
    for thinking in (None, False):
        asked = _prompt(template, chat, talk, thinking)
        if asked and text.startswith(asked) and BLOCK.fullmatch(text[start : len(asked)]):
            found.append(len(asked))
    return max(found)
