"""A conversation as one text, and where in it stands what the assistant writes.

A template's own ``{% generation %}`` blocks say it, else its heads and ends, or what differs when answers are
replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from budgetsearch.training.data.answers import HIDDEN, answer_places, end_of_turn
from budgetsearch.training.data.conversation import Conversation, Skip, Turn, split_thought
from budgetsearch.training.data.probes import BLOCK, OPEN
from budgetsearch.training.data.templates import Template, X

LOST = "the chat template leaves out the reasoning of earlier answers"
UNSHOWN = "the chat template does not show the functions (tools)"
BORDERS = "what is asked holds tokens that begin or end turns, and the model sees them as such"
ENDLESS = "the chat template ends answers with no token: nothing teaches the model to stop"


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it."""

    text: str
    spans: list[tuple[int, int]]
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
        places = [_tidied(template, text, own[i]) for i in trained]
    else:
        places = answer_places(template, chat, talk.tools, text, [i - shift for i in trained])
    tail = template.known.tail  # part of the prompt, where the template writes it in the whole as well
    spans = [(a + len(tail) if tail and text.startswith(tail, a) else a, b) for a, b in places]
    if any(a > b for a, b in spans) or any(a[1] > b[0] for a, b in pairwise(spans)):
        raise Skip(HIDDEN)
    _check(template, chat, talk, text)
    for i, (start, end) in zip(trained, spans, strict=True):
        _check_turn(template, talk, i, text[start:end])
    if not template.known.stop:
        template.notes[ENDLESS] += 1
    if any(
        mark in str(turn["content"])
        for turn in chat
        if turn["role"] != "assistant"
        for mark in template.borders
    ):
        template.notes[BORDERS] += 1
    return _with_thought(template, chat[: trained[-1] - shift], talk, Rendered(text, spans, places[-1][0]))


def _tidied(template: Template, text: str, span: tuple[int, int]) -> tuple[int, int]:
    """A marked block without the head and without what follows the end of turn."""
    (start, end), known = span, template.known
    if known.head and text.startswith(known.head, start):
        start += len(known.head)
    if known.ends and not text[start:end].rstrip().endswith(tuple(known.ends)):
        return start, end_of_turn(template, text, end)
    return start, start + len(text[start:end].rstrip())


# ---------------------------------------------------------------------------------- checks


def _check(template: Template, chat: Sequence[dict[str, Any]], talk: Conversation, text: str) -> None:
    """Nothing that is asked may be missing."""
    for index, turn in enumerate(chat):
        content = str(turn["content"] or "").strip()
        if turn["role"] == "assistant" or not content or content in text:
            continue
        altered = [*chat[:index], {**turn, "content": f"{content} {X}"}, *chat[index + 1 :]]
        if template.render(altered, talk.tools) == text:
            raise Skip(f"the chat template leaves out a turn of the role {turn['role']!r}")
    for said in talk.turns:
        if said.role == "assistant" and not said.trained:
            _check_said(said, text)
    if talk.tools and not _named(talk, text) and template.render(chat, ()) == text:
        template.notes[UNSHOWN] += 1


def _named(talk: Conversation, text: str) -> bool:
    """Whether every function is named in front of the turns, as only a template that shows them does."""
    names = [str(tool.get("function", tool).get("name")) for tool in talk.tools]
    said = [str(turn.content) for turn in talk.turns] + [str(turn.tool_calls) for turn in talk.turns]
    return all(name in text and not any(name in words for words in said) for name in names)


def _check_turn(template: Template, talk: Conversation, index: int, written: str) -> None:
    """What is learned must be what the turn says."""
    turn = talk.turns[index]
    _check_said(turn, written)
    thought = split_thought(turn)[0]
    lost = thought.strip() not in written and template.options.thinking != "off"
    if lost and (template.known.reasoning == "native" or index != _last(talk)):
        template.notes[LOST] += 1


def _check_said(turn: Turn, written: str) -> None:
    """An answer, learned or not, must be there with its calls."""
    bare = split_thought(turn)[1]
    # A template may write blanks in its own way, but not take a part of an answer for reasoning.
    spaced = "</think>" not in bare and " ".join(bare.split()) in " ".join(written.split())
    if bare.strip() not in written and not spaced:
        raise Skip("the chat template changes what an answer says")
    for call in turn.tool_calls:
        if call["function"]["name"] not in written:
            raise Skip("the chat template does not write tool calls")


def _last(talk: Conversation) -> int:
    """The last turn of the assistant."""
    return max(i for i, turn in enumerate(talk.turns) if turn.role == "assistant")


# ------------------------------------------------------------------------------- reasoning


def _with_thought(
    template: Template, before: Sequence[dict[str, Any]], talk: Conversation, found: Rendered
) -> Rendered:
    """With the think block that the last answer is asked to fill, once; ``before``: what comes before it."""
    index, known = talk.trained()[-1], template.known
    if index != _last(talk) or not (known.opens or known.reasoning == "insert"):
        return replace(found, asked=_reach(template, before, talk, found))
    text, (start, end), head = found.text, found.spans[-1], found.asked
    thought = split_thought(talk.turns[index])[0] if template.options.thinking != "off" else ""
    opening = text[head:start] if known.opens else ""
    if opening and "</think>" in text[start:end]:  # the template fills the block itself
        return replace(found, asked=_reach(template, before, talk, found))
    for thinking in () if opening else (None, True) if thought else (None,):
        asked = _prompt(template, before, talk, thinking)
        if asked.startswith(text[:head]) and OPEN.fullmatch(asked[head:]):
            opening = asked[head:]
            break
    if not opening and not thought:
        return replace(found, asked=start)
    wide = "\n" in opening or not opening
    block = f"{thought}\n</think>\n\n" if wide else f"{thought}</think>"
    block = (opening or "<think>\n") + block
    begin, moved = head + len(opening), len(block) + head - start
    text = text[:head] + block + text[start:]
    return Rendered(text, [*found.spans[:-1], (begin, end + moved)], begin)


def _prompt(
    template: Template, chat: Sequence[dict[str, Any]], talk: Conversation, thinking: bool | None = None
) -> str:
    """What the template asks with; nothing if it does not take the beginning of a conversation."""
    try:
        return template.render(chat, talk.tools, prompt=True, thinking=thinking)
    except Skip:
        return ""


def _reach(template: Template, before: Sequence[dict[str, Any]], talk: Conversation, found: Rendered) -> int:
    """How far the longest prompt for this answer goes: it may close a think block already."""
    text, start = found.text, found.spans[-1][0]
    block = BLOCK.match(text, start)
    reach = [start]
    for thinking in (None, False) if block and block.group().strip() else ():
        asked = _prompt(template, before, talk, thinking)
        if text.startswith(asked) and BLOCK.fullmatch(text[start : len(asked)]):
            reach.append(len(asked))
    return max(reach)
