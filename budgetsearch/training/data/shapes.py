"""From the columns of a row to a conversation, whatever shape people keep their data in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from budgetsearch.core.errors import SettingsError, nearest
from budgetsearch.training.data.conversation import Conversation, Sample, Skip, Text, Turn
from budgetsearch.training.data.messages import (
    chat_in,
    is_chat,
    needed,
    parsed,
    shown,
    text_of,
    tools_of,
    turns_of,
    value_of,
)

Row = Mapping[str, Any]
Used = tuple[Sample, frozenset[str]]
"""A sample, and the columns that it is made from."""
Pair = tuple[str, Sequence[str], Sequence[str]]
"""The column of the prompt, those that are added to it, and those that may hold the completion."""

LISTS = ("messages", "conversations", "conversation")
CHATS = ("chat", "dialog", "dialogue", "turns")
"""Columns that may hold a conversation, and may as well hold a text."""
PAIRS: Sequence[Pair] = (
    ("prompt", (), ("completion", "response")),
    ("instruction", ("input", "context"), ("output", "response")),
    ("question", (), ("answer", "response")),
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
SYSTEMS, TOOLS = ("system", "system_prompt"), ("tools", "functions")
MAPPED = ("messages", "prompt", "completion", "system", "history", "tools", "text")
"""What ``--columns`` gives a column to."""
WORKS = (
    "messages; conversations; prompt + completion; instruction (+ input) + output; question + answer; "
    "query + response; problem + solution; input + target; source + target; user + assistant; "
    "document + summary"
)
UNWANTED = "label"
"""False in preference data that have one answer a row."""
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
    try:
        sample, used = _sample(row, columns or {})
    except Skip as skip:
        raise Skip(skip.reason, place) from None
    except RecursionError:
        raise Skip("its brackets are nested too deeply", place) from None
    return replace(sample, place=place), used


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
    named = {name: columns.get(name, name) for name in MAPPED}
    pair = "prompt" in columns or "completion" in columns
    for name in () if pair else (named["messages"], *LISTS):
        if value_of(row, name) is not None:
            return _finish(row, named, turns_of(value_of(row, name), name), {name})
    if found := _pair_among(PAIRS, row, columns, named):
        return found
    for name in () if pair else CHATS:
        if is_chat(value := chat_in(value_of(row, name))):
            return _finish(row, named, turns_of(value, name), {name})
    if found := _pair_among(FURTHER, row, columns, named):
        return found
    if is_chat(value := chat_in(value_of(row, alone := columns.get("completion", "")))):
        return _finish(row, named, turns_of(value, alone), {alone})
    return None


def _pair_among(
    pairs: Sequence[Pair], row: Row, columns: Mapping[str, str], named: Mapping[str, str]
) -> Used | None:
    for prompt, extras, completions in pairs:
        prompt = columns.get("prompt", prompt)
        answers = (columns["completion"],) if "completion" in columns else completions
        answer = next((name for name in answers if name in row), None)
        if answer and prompt in row:
            return _pair(row, named, prompt, answer, extras)
    return None


def _unknown(row: Row) -> str:
    """Why no shape is found, and what to do."""
    if empty := next((name for name in LISTS if name in row), ""):
        return f"{empty!r} is empty"
    if "chosen" in row and "rejected" in row:
        return (
            "chosen and rejected are preference data, which this loss does not learn from; to train on the "
            "chosen answers alone give --columns completion=chosen"
        )
    advice = "--columns text=text trains on raw text; " if "text" in row else ""
    return (
        f"no usable columns; found: {_names(row)}; what works: {WORKS}; {advice}name other columns with "
        "--columns prompt=COLUMN,completion=COLUMN"
    )


def _pair(row: Row, named: Mapping[str, str], prompt: str, answer: str, extras: Sequence[str]) -> Used:
    asked, said = chat_in(value_of(row, prompt)), chat_in(value_of(row, answer))
    used = {prompt, answer, UNWANTED}
    if row.get(UNWANTED) is False:
        raise Skip("'label' is false: preference data, and this is no answer to learn")
    if is_chat(asked):
        before = [replace(t, trained=t.role != "assistant") for t in turns_of(asked, prompt)]
    else:
        parts = [needed(row, prompt), *(text_of(value_of(row, name), name) for name in extras)]
        used |= {name for name in extras if name in row}
        content = "\n\n".join(part for part in parts if part.strip())
        before = [*_history(row, named["history"]), Turn("user", content)]
        used.add(named["history"])
    after = turns_of(said, answer) if is_chat(said) else [Turn("assistant", needed(row, answer))]
    if after[0].role != "assistant":  # preference data repeat the prompt in front of each answer
        begins = [(t.role, t.content) for t in after[: len(before)]]
        after = after[len(before) :] if begins == [(t.role, t.content) for t in before] else after
    return _finish(row, named, [*before, *after], used)


def _finish(row: Row, named: Mapping[str, str], turns: list[Turn], used: set[str]) -> Used:
    """With the system text and the functions that stand beside the turns."""
    turns = [turn for turn in turns if turn.role not in ("system", "developer") or turn.content.strip()]
    for name in (named["system"], *SYSTEMS):
        text = text_of(value_of(row, name), name)
        if text.strip() and not any(turn.role in ("system", "developer") for turn in turns):
            turns.insert(0, Turn("system", text))
            used.add(name)
    found: tuple[Mapping[str, Any], ...] = ()
    for name in (named["tools"], *TOOLS):
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
    turns: list[Turn] = []
    for pair in value if isinstance(value, list) else [value]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Skip(f"{column!r} is no list of pairs of a question and an answer")
        turns += [Turn("user", text_of(pair[0], column)), Turn("assistant", text_of(pair[1], column))]
    return turns


def _names(row: Row) -> str:
    names = ", ".join(map(str, row)) or "none"
    return shown(names, SHOWN)
