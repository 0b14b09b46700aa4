"""What a chat template takes and what it writes around an answer, found by rendering probes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PROBE, ASK, THOUGHT = "budgetsearch probe", "budgetsearch asks", "budgetsearch thinks"
BLOCK = re.compile(r"\s*(<think>\s*)?(</think>\s*)?")
"""A think block that holds nothing, or one of its ends."""
AT_END = re.compile(r"(<think>\s*)(</think>\s*)?\Z|(</think>\s*)\Z")
OPEN = re.compile(r"\s*<think>\s*")
Chat = list[dict[str, Any]]


@dataclass
class Known:
    """What is known about a template."""

    head: str = ""
    """What the generation prompt writes, without a think block."""
    tail: str = ""
    """The think block at the end of the generation prompt, or its beginning."""
    leads: list[str] = field(default_factory=list)
    """What may stand between the head and what an answer says; first of an answer without anything else."""
    call_lead: str | None = None
    """The same of a call and its name; None where calls are not written."""
    stop: str = ""
    """The token that ends an answer; none if it is no token of its own."""
    ends: set[str] = field(default_factory=set)
    """All that may end a turn of the assistant."""
    follows: str = ""
    """The token behind an answer that nothing ends: the beginning of the next turn."""
    system: bool = True
    """Whether it shows a system text."""
    reasoning: str = "inline"
    """``native``: it shows reasoning beside the content; ``inline``: inside of it; ``insert``: not at all."""
    parses: bool = False
    """Whether it takes a think block inside of the content for reasoning."""
    empty: str | None = ""
    """The content of a turn that has calls alone."""
    calls_need_ids: bool = False
    ids_are_short: bool = False
    """Whether these must be nine letters and digits."""
    calls_as_text: bool = False
    """Whether it wants the arguments of a call as JSON text."""

    @property
    def opens(self) -> bool:
        """Whether the generation prompt opens a think block."""
        return bool(OPEN.fullmatch(self.tail))


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content, **more}


def called(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    """A call."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def probe(
    attempt: Callable[[Chat], str], ask_with: Callable[[Chat], str], marks: re.Pattern[str], whole: str
) -> Known:
    """Find out what there is to know.

    ``attempt`` and ``ask_with`` render without and with a generation prompt, to nothing what the template
    does not take; ``marks`` finds tokens of the tokenizer's own in a text; ``whole``: ASK and PROBE rendered.
    """
    known, ask = Known(), said("user", ASK)
    plain = attempt([ask])
    _look_at_head(known, plain, ask_with([ask]), whole)
    _look_at_end(known, marks, plain, whole, attempt([ask, said("assistant", PROBE), said("user", THOUGHT)]))
    instructed = [said("system", THOUGHT), ask]
    # Some templates show it to who asks, and leave it out once the answer is there.
    answered = attempt([*instructed, said("assistant", PROBE)])
    known.system = THOUGHT in ask_with(instructed) and THOUGHT in answered
    _look_at_thoughts(known, attempt)
    _look_at_calls(known, attempt, marks, plain)
    return known


def _look_at_head(known: Known, plain: str, opened: str, whole: str) -> None:
    head = opened[same_start(plain, opened) :]
    cut = AT_END.search(head)
    known.head = head[: cut.start()] if cut else head
    known.tail = head[len(known.head) :]
    at = whole.index(PROBE)
    known.leads.append(_behind_head(known, whole, at) if known.head else whole[same_start(plain, whole) : at])


def _behind_head(known: Known, text: str, at: int) -> str:
    """What stands between the last head and ``at``."""
    before = text.rfind(known.head, 0, at)
    return text[before + len(known.head) : at] if before >= 0 else ""


def _look_at_end(known: Known, marks: re.Pattern[str], plain: str, whole: str, history: str) -> None:
    after = whole[whole.index(PROBE) + len(PROBE) :]
    first = marks.search(after)
    known.stop = first.group() if first else ""
    known.ends = {known.stop or after.strip()} - {""}
    if PROBE not in history or not (then := marks.search(history, history.index(PROBE))):
        return
    asks, answers = plain.partition(ASK)[0], plain.partition(ASK)[2]
    if then.group() == known.stop:
        return
    if answers.lstrip().startswith(then.group()) or then.group() not in asks:
        known.ends.add(then.group())
    else:  # the next turn begins
        known.follows = then.group()


def _look_at_thoughts(known: Known, attempt: Callable[[Chat], str]) -> None:
    ask, inside = said("user", ASK), f"<think>\n{THOUGHT}\n</think>\n\n{PROBE}"
    beside = attempt([ask, said("assistant", PROBE, reasoning_content=THOUGHT)])
    inline = attempt([ask, said("assistant", inside)])
    # Where the template opens the block itself, a second one must not stand inside of it.
    shows = THOUGHT in inline and not (known.opens and known.leads[0].startswith(known.tail))
    known.reasoning = "native" if THOUGHT in beside else "inline" if shows else "insert"
    known.parses = beside == inline
    if known.reasoning == "native" and PROBE in beside:
        lead = _behind_head(known, beside, beside.index(THOUGHT))
        known.leads.append(lead + beside[beside.index(THOUGHT) : beside.rindex(PROBE)])


def _look_at_calls(known: Known, attempt: Callable[[Chat], str], marks: re.Pattern[str], plain: str) -> None:
    """How a turn of calls alone is written best: some templates write an empty answer behind it."""
    found = []
    for as_text, empty, ids in itertools.product((False, True), ("", None), ({}, {"id": "probe0000"})):
        call = called(PROBE, '{"a": "b"}' if as_text else {"a": "b"}, **ids)
        text = attempt([said("user", ASK), said("assistant", empty, tool_calls=[call])])
        if PROBE in text:
            heads = text.count(known.head) if known.head else 0
            found.append((heads, bool(ids), as_text, empty is None, text))
    if not found:
        return
    _, known.calls_need_ids, known.calls_as_text, without, text = min(found)
    if known.calls_need_ids:
        call = called(PROBE, '{"a": "b"}' if known.calls_as_text else {"a": "b"}, id="call_probe_00000000")
        again = attempt([said("user", ASK), said("assistant", None if without else "", tool_calls=[call])])
        known.ids_are_short = PROBE not in again
    known.empty = None if without else ""
    at = text.index(PROBE)
    if known.head:
        known.call_lead = _behind_head(known, text, at)
    else:
        known.call_lead = text[same_start(plain, text) : at].removeprefix(known.leads[0].lstrip())
    there = [mark.group() for mark in marks.finditer(text, text.index(PROBE))]
    if known.stop and there and not known.ends & {*there}:
        known.ends.add(there[-1])


def same_start(one: str, other: str) -> int:
    """So many characters are the same at the beginning of both."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
