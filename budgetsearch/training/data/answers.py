"""Where in a rendered conversation its answers stand.

Where heads and ends of turns leave no doubt they are read off. Else the conversation is rendered again with
other answers: with all of them replaced at once, and where that does not tell, one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from budgetsearch.training.data.conversation import Skip
from budgetsearch.training.data.probes import BLOCK, called, said, same_start
from budgetsearch.training.data.templates import Template, X

LONGEST_MARK = 64
"""Characters of a token of the tokenizer's own."""
HIDDEN = "where an answer begins and ends in what the chat template writes cannot be found"
Chat = Sequence[dict[str, Any]]
Place = tuple[int, int]


def answer_places(
    template: Template, chat: Chat, tools: Sequence[Any], text: str, wanted: Sequence[int]
) -> list[Place]:
    """Characters of the wanted turns, in order, each with its end of turn.

    Raises:
        Skip: one cannot be found.
    """
    if found := _read_off(template, chat, text, wanted):
        return found
    known = dict(_replaced(template, chat, tools, text))
    return [
        _around(template, text, known[i], "") if i in known else _differing(template, chat, tools, text, i)
        for i in wanted
    ]


def _is_plain(turn: Mapping[str, Any]) -> bool:
    """Whether an answer is its content and nothing else."""
    content = turn["content"]
    return bool(content) and not turn.get("tool_calls") and not turn.get("reasoning_content")


def _read_off(template: Template, chat: Chat, text: str, wanted: Sequence[int]) -> list[Place]:
    """Of plain answers behind heads that nobody but the template writes; nothing where there is a doubt."""
    known = template.known
    answers = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
    if not known.head or any(known.head in str(turn["content"]) for turn in chat):
        return []
    heads = [found.end() for found in re.finditer(re.escape(known.head), text)]
    if len(heads) != len(answers) or not all(_is_plain(chat[i]) for i in answers):
        return []
    begins = dict(zip(answers, heads, strict=True))
    found = [_ended(template, text, begins[i], chat[i]["content"]) for i in wanted]
    return [place for place in found if place] if all(found) else []


def _ended(template: Template, text: str, begin: int, content: str) -> Place | None:
    """From ``begin`` to behind the end of turn, if nothing but a lead and the content are between."""
    for lead in (template.known.leads[0], ""):
        for written in (content, content.strip()):
            whole = lead + written
            if not BLOCK.fullmatch(lead) or not text.startswith(whole, begin):
                continue
            behind = begin + len(whole)
            if ends := [end for end in template.known.ends if text.startswith(end, behind)]:
                return begin, behind + max(map(len, ends))
    return None


def _replaced(template: Template, chat: Chat, tools: Sequence[Any], text: str) -> Iterator[tuple[int, Place]]:
    """Where the content of each plain answer stands, by one rendering with others in their places.

    What stands between these has to stand between the contents too, so that all of the text is explained.
    """
    plain = [i for i, turn in enumerate(chat) if turn["role"] == "assistant" and _is_plain(turn)]
    others = [said("assistant", X) if i in plain else turn for i, turn in enumerate(chat)]
    try:
        between = template.render(others, tools).split(X)
    except Skip:
        return
    if len(between) != len(plain) + 1 or not text.startswith(between[0]):
        return
    at, found = len(between[0]), []
    for i, follows in zip(plain, between[1:], strict=True):
        content = chat[i]["content"]
        written = (one for one in (content, content.strip()) if text.startswith(one + follows, at))
        if (here := next(written, None)) is None:
            return
        found.append((i, (at, at + len(here))))
        at += len(here) + len(follows)
    if at == len(text):
        yield from found


def _around(template: Template, text: str, place: Place, inside: str) -> Place:
    """From behind the head in front of a place to behind the end of turn that follows it."""
    return _start(template, text, place[0], inside), end_of_turn(template, text, place[1])


def _differing(template: Template, chat: Chat, tools: Sequence[Any], text: str, index: int) -> Place:
    """Where the turn stands, by rendering others in its place."""
    for inside, other in _others(template, chat[index]):
        try:
            again = template.render([*chat[:index], other, *chat[index + 1 :]], tools)
        except Skip:
            continue
        if X in again:
            start = same_start(text, again)
            room = min(len(text), len(again)) - start
            same = same_start(text[::-1][:room], again[::-1][:room])
            return _around(template, text, (start, len(text) - same), inside)
    raise Skip(HIDDEN)


def _others(template: Template, turn: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What may stand in the place of a turn, and what of the answer comes before what differs then: some
    templates ask for a call in front of its result."""
    plain, lead = ("", said("assistant", X)), template.known.call_lead
    calls = [{**item, **called(X, item["function"]["arguments"])} for item in turn.get("tool_calls", ())]
    if not calls or lead is None:
        return [plain]
    return [plain, (lead, said("assistant", template.known.empty, tool_calls=calls))]


def _outside(template: Template, text: str, at: int) -> int:
    """``at``, or the beginning of the token that it is inside of."""
    for mark in template.marks.finditer(text, max(0, at - LONGEST_MARK)):
        if mark.start() < at < mark.end():
            return mark.start()
    return at


def _start(template: Template, text: str, at: int, inside: str) -> int:
    """Behind the head that is in front of ``at``, if nothing but what belongs to an answer is between.

    ``inside``: what certainly belongs to it.
    """
    at, known = _outside(template, text, at), template.known
    if inside and not text.endswith(inside, 0, at):
        raise Skip(HIDDEN)
    at -= len(inside)
    if not known.head:
        lead = known.leads[0]
        return at - len(lead) if not lead.strip() and text.endswith(lead, 0, at) else at
    head = text.rfind(known.head, 0, at)
    gap = text[head + len(known.head) : at]
    leads = [*known.leads, known.call_lead or ""]
    if head >= 0 and (BLOCK.fullmatch(gap) or any(lead.startswith(gap) for lead in leads)):
        return head + len(known.head)
    return at


def end_of_turn(template: Template, text: str, at: int) -> int:
    """Behind the end of turn that follows ``at``; there, if nothing ends it."""
    at, known = _outside(template, text, at), template.known
    found = re.compile("|".join(map(re.escape, known.ends))).search(text, at) if known.ends else None
    if found and not (known.head and known.head in text[at : found.start()]):
        return found.end()
    if known.stop and not known.follows:
        raise Skip(HIDDEN)
    return at
