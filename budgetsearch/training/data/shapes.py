"""From the columns of a row to a conversation, whatever shape people keep their data in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from budgetsearch.core.errors import SettingsError, nearest
from budgetsearch.training.data import inside
from budgetsearch.training.data.beside import check_choices, check_label, check_media, preferences
from budgetsearch.training.data.conversation import Conversation, Sample, Skip, Text, Turn
from budgetsearch.training.data.messages import (
    REASONING,
    calls_in,
    chat_in,
    is_chat,
    needed,
    pair_in,
    parsed,
    said_in,
    shown,
    text_of,
    tools_of,
    transcribed,
    turns_of,
    value_of,
)

Row = Mapping[str, Any]
Used = tuple[Sample, frozenset[str]]
"""A sample, and the columns that it is made from."""
Pair = tuple[str, Sequence[str], Sequence[str]]
"""The column of the prompt, those that are added to it, and those that may hold the completion."""

Match = tuple[str, str, Sequence[str]]
"""The columns of a row that hold a question, its answer, and what is added to the question."""

LISTS = ("messages", "conversations", "conversation")
CHATS = ("chat", "dialog", "dialogue", "turns", "contents")
"""Columns that may hold a conversation, and may as well hold a text."""
PAIRS: Sequence[Pair] = (
    ("prompt", (), ("completion", "response")),
    ("instruction", ("input", "context"), ("output", "response")),
    ("question", ("context", "passage"), ("answer", "response")),
    ("query", (), ("response", "answer")),
    ("problem", (), ("solution", "answer")),
    ("input", (), ("target", "output")),
)
FURTHER: Sequence[Pair] = (
    # Looked for last: `prompt` beside `instruction` and `output` is often the whole text, answer included.
    ("instruction", ("input", "context"), ("answer", "completion")),
    ("prompt", (), ("answer", "output")),
    ("inputs", (), ("targets", "outputs")),
    ("source", (), ("target",)),
    ("user", (), ("assistant", "bot")),
    ("human", (), ("assistant", "bot")),
    *((text, (), ("summary", "highlights")) for text in ("document", "article", "dialogue")),
)
SYSTEMS = ("system", "system_prompt", "systemInstruction", "system_instruction")
TOOLS = ("tools", "functions")
ASKED, CALLED = "query", "answers"
"""A question, and the calls that answer it."""
MAPPED = ("messages", "prompt", "input", "completion", "reasoning", "system", "history", "tools", "text")
"""What ``--columns`` gives a column to."""
WORKS = (
    "messages; conversations; prompt + completion; instruction (+ input) + output; question + answer; "
    "query + response; problem + solution; input + target; source + target; user + assistant; "
    "document + summary"
)
SHOWN = 300
"""Characters of the names of columns."""


def parse_columns(text: str) -> dict[str, str]:
    """What a column is, by what it is for: ``prompt=question,completion=reply``.

    Raises:
        SettingsError: it does not read so.
    """
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, column = (piece.strip() for piece in part.partition("="))
        if not sign or not column or name not in MAPPED:
            hint = nearest(name, MAPPED)
            raise SettingsError(
                f"--columns {text!r}: {part!r} is not NAME=COLUMN with one of {', '.join(MAPPED)}{hint}; "
                "write for example --columns prompt=question,completion=reply"
            )
        found[name] = column
    if "text" in found and len(found) > 1:
        raise SettingsError(f"--columns {text!r}: raw text has no other columns; give text=COLUMN alone")
    return found


def sample_of(row: Row, place: str = "", columns: Mapping[str, str] | None = None) -> Used:
    """The row as a sample, and the columns that it is made from.

    ``columns``: what ``parse_columns`` gives, from a name such as ``prompt`` to the row's own column.

    Raises:
        Skip: the row cannot be used.
    """
    columns = columns or {}
    opened = inside.opened(row, columns.values())
    try:
        sample, used = _sample({**row, **opened} if opened else row, columns)
        if isinstance(sample.body, Conversation):
            used |= check_label(row, columns.values())
            check_media(row, sample.body, columns.values())
    except Skip as skip:
        raise Skip(skip.reason, place) from None
    except RecursionError:
        raise Skip("its brackets are nested too deeply", place) from None
    return replace(sample, place=place), frozenset(inside.outer(name, row) for name in used)


def _sample(row: Row, columns: Mapping[str, str]) -> Used:
    found = _of_a_shape(row, columns)
    if found is None and (names := _spelled_otherwise(row)):
        found = _of_a_shape({**row, **{name: row[column] for name, column in names.items()}}, columns)
        if found is not None:
            return found[0], frozenset(names.get(name, name) for name in found[1])
    if found is None:
        raise Skip(_unknown(row))
    return found


def _spelled_otherwise(row: Row) -> dict[str, str]:
    """Columns by the names that shapes know, where only capitals, blanks and hyphens are others: people
    write ``Question`` and ``System Prompt`` at the head of a table."""
    found: dict[str, str] = {}
    for column in filter(lambda key: isinstance(key, str), row):
        name = re.sub(r"[\s\-]+", "_", column.strip().lower())
        if name not in row:
            found.setdefault(name, column)
    return found


def _of_a_shape(row: Row, columns: Mapping[str, str]) -> Used | None:
    for column in columns.values():
        if column not in row:
            raise Skip(f"there is no column {column!r} (--columns); found: {_names(row)}")
    if "text" in columns:
        return Sample(Text(needed(row, columns["text"]))), frozenset(columns.values())
    pair = "prompt" in columns or "completion" in columns
    for name in () if pair else (columns.get("messages", "messages"), *LISTS):
        if value_of(row, name) is not None:
            turns = turns_of(value_of(row, name), name)
            if turns[-1].role == "user" and (why := preferences(row, name)):
                raise Skip(why)
            return _finish(row, columns, turns, {name})
    first = [*_matching(PAIRS, row, columns)]
    if found := next(filter(partial(_is_filled, row), first), None):
        return _pair(row, columns, *found)
    for name in () if pair else CHATS:
        if is_chat(value := chat_in(value_of(row, name))):
            return _finish(row, columns, turns_of(value, name), {name})
    if not pair and (turns := _called(row)):
        return _finish(row, columns, turns, {ASKED, CALLED})
    both = [*first, *_matching(FURTHER, row, columns)]
    if found := next(filter(partial(_is_filled, row), both), next(iter(both), None)):
        return _pair(row, columns, *found)
    return _alone(row, columns, columns["completion"]) if "completion" in columns else None


def _called(row: Row) -> list[Turn]:
    """A question that functions answer; nothing where no function is named, or no calls are the answer."""
    if value_of(row, ASKED) is None or not any(value_of(row, name) is not None for name in TOOLS):
        return []
    calls = calls_in(value_of(row, CALLED))
    return [Turn("user", needed(row, ASKED)), Turn("assistant", tool_calls=calls)] if calls else []


def _matching(pairs: Sequence[Pair], row: Row, columns: Mapping[str, str]) -> Iterator[Match]:
    for prompt, extras, completions in pairs:
        prompt = columns.get("prompt", prompt)
        answers = (columns["completion"],) if "completion" in columns else completions
        there = [name for name in answers if name in row]
        answer = next((name for name in there if value_of(row, name) is not None), *there[:1] or (None,))
        if answer and prompt in row:
            yield prompt, answer, (columns["input"],) if "input" in columns else extras


def _is_filled(row: Row, found: Match) -> bool:
    """Whether anything stands there: a table of rows of several shapes has the columns of all of them, and
    a null is none."""
    return row[found[0]] is not None and any(value_of(row, name) is not None for name in found[:2])


def _alone(row: Row, columns: Mapping[str, str], column: str) -> Used:
    """A whole conversation in the column of the answers, as preference data may have it."""
    value = value_of(row, column)
    if value is None:
        raise Skip(f"{column!r} is empty")
    if is_chat(chat := chat_in(value)):
        return _finish(row, columns, turns_of(chat, column), {column})
    if turns := transcribed(value):
        return _finish(row, columns, turns, {column})
    raise Skip(
        f"no column of a question is known beside {column!r}, and no conversation is in it; found: "
        f"{_names(row)}; name one with --columns prompt=COLUMN,completion={column}"
    )


def _unknown(row: Row) -> str:
    """Why no shape is found, and what to do."""
    if empty := next((name for name in LISTS if name in row), ""):
        return f"{empty!r} is empty"
    if why := preferences(row):
        return why
    advice = "--columns text=text trains on raw text; " if "text" in row else ""
    return (
        f"no usable columns; found: {_names(row)}; what works: {WORKS}; {advice}name other columns with "
        "--columns prompt=COLUMN,completion=COLUMN"
    )


def _pair(row: Row, columns: Mapping[str, str], prompt: str, answer: str, extras: Sequence[str]) -> Used:
    asked, said = chat_in(value_of(row, prompt)), chat_in(value_of(row, answer))
    used = {prompt, answer}
    if "prompt" not in columns:
        check_choices(row, prompt)
    if is_chat(asked):
        before = [replace(t, trained=t.role != "assistant") for t in turns_of(asked, prompt)]
    else:
        parts = [needed(row, prompt), *(text for name in extras for text in _texts(row, name))]
        used |= {name for name in extras if name in row}
        content = "\n\n".join(part for part in parts if part.strip())
        history = columns.get("history", "history")
        before = [*_history(row, history), Turn("user", content)]
        used.add(history)
    if is_chat(said):
        after = turns_of(said, answer)
    else:
        content = needed(row, answer)
        name, thought = ("", "") if "</think>" in content else _thought(row, columns)
        after = [Turn("assistant", content, thought)]
        used.add(name)
    if after[0].role != "assistant":  # preference data repeat the prompt in front of each answer
        begins = [(t.role, t.content) for t in after[: len(before)]]
        after = after[len(before) :] if begins == [(t.role, t.content) for t in before] else after
    return _finish(row, columns, [*before, *after], used)


def _texts(row: Row, column: str) -> list[str]:
    """What is added to a question: one text, or several passages."""
    value = value_of(row, column)
    several = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    if isinstance(value, (list, tuple, Mapping)) and not several:
        raise Skip(
            f"{column!r} belongs to the question and is no text; make it text, or name the columns with "
            "--columns to leave it out"
        )
    return [text_of(item, column) for item in (value if several else [value])]


def _thought(row: Row, columns: Mapping[str, str]) -> tuple[str, str]:
    """The column of the reasoning in front of an answer, and what stands there.

    A word alone, such as ``on``, says how to reason.
    """
    for name in (columns["reasoning"],) if "reasoning" in columns else REASONING:
        value = value_of(row, name)
        if isinstance(value, str) and len(value.split()) >= (1 if "reasoning" in columns else 2):
            return name, text_of(value, name)
    return columns.get("reasoning", ""), ""


def _finish(row: Row, columns: Mapping[str, str], turns: list[Turn], used: set[str]) -> Used:
    """With the system text and the functions that stand beside the turns."""
    turns = [turn for turn in turns if turn.role not in ("system", "developer") or turn.content.strip()]
    for name in (columns.get("system", "system"), *SYSTEMS):
        text = said_in(value_of(row, name), name)
        if text.strip() and not any(turn.role in ("system", "developer") for turn in turns):
            turns.insert(0, Turn("system", text))
            used.add(name)
    found: tuple[Mapping[str, Any], ...] = ()
    for name in (columns.get("tools", "tools"), *TOOLS):
        if not found and (value := value_of(row, name)) is not None:
            found = tuple(tools_of(value, name))
            used.add(name)
    talk = Conversation(tuple(turns), found)
    _check(talk)
    return Sample(talk), frozenset(used & set(row))


def _check(talk: Conversation) -> None:
    for turn in talk.turns:
        if turn.role == "user" and not turn.content.strip():
            raise Skip("a user turn is empty")
        empty = not turn.content.strip() and not turn.tool_calls
        if turn.role == "assistant" and turn.trained and empty:
            raise Skip("an answer is empty")
    if not any(turn.role == "assistant" for turn in talk.turns):
        raise Skip("no turn of the assistant")
    if not talk.trained():
        raise Skip("no turn is to be trained (weight 0, train false)")


def _history(row: Row, column: str) -> list[Turn]:
    """Earlier turns: pairs of a question and an answer, or messages."""
    value = value_of(row, column)
    if value is None:
        return []
    value = parsed(value, column)
    if is_chat(value):
        return turns_of(value, column)
    turns = [pair_in(pair) for pair in (value if isinstance(value, list) else [value])]
    if not all(turns):
        raise Skip(f"{column!r} is no list of pairs of a question and an answer")
    return [turn for pair in turns for turn in pair]


def _names(row: Row) -> str:
    return shown(inside.names(row), SHOWN)
