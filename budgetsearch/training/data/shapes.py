"""From the columns of a row to a conversation, whatever shape people keep their data in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import SettingsError, nearest
from budgetsearch.training.data.conversation import Conversation, Role, Sample, Skip, Text, Turn

Row = Mapping[str, Any]
Used = tuple[Sample, frozenset[str]]
"""A sample, and the columns that it is made from."""

LISTS = ("messages", "conversations", "conversation")
PAIRS = (
    # prompt column, what may be added to it, completion columns
    ("prompt", (), ("completion", "response")),
    ("instruction", ("input", "context"), ("output", "response")),
    ("question", (), ("answer", "response")),
    ("input", (), ("target", "output")),
)
SYSTEMS, TOOLS = ("system", "system_prompt"), ("tools", "functions")
MAPPED = ("messages", "prompt", "completion", "system", "history", "tools", "text")
"""What ``--columns`` gives a column to."""
WORKS = (
    "messages; conversations; prompt + completion; instruction (+ input) + output; question + answer; "
    "input + target"
)
ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("developer",), "developer"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "function_call"), "assistant"),
    **dict.fromkeys(
        ("tool", "observation", "function", "tool_response", "function_response", "ipython"), "tool"
    ),
}
CALL = "function_call"
REASONING = ("reasoning_content", "reasoning", "thinking")
UNWANTED = "label"
"""False in preference data that have one answer a row."""
SHOWN = 300
"""Characters of the names of columns."""
SWITCHES = ("weight", "train")
"""Keys of a message that take the loss from it."""


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
    for column in columns.values():
        if column not in row:
            raise Skip(f"there is no column {column!r} (--columns); found: {_names(row)}")
    if "text" in columns:
        return Sample(Text(_needed(row, columns["text"]))), frozenset(columns.values())
    named = {name: columns.get(name, name) for name in MAPPED}
    pair = "prompt" in columns or "completion" in columns
    for name in () if pair else (named["messages"], *LISTS):
        if _value(row, name) is not None:
            return _finish(row, named, _turns(_value(row, name), name), {name})
    for prompt, extras, completions in PAIRS:
        prompt = columns.get("prompt", prompt)
        answers = (columns["completion"],) if "completion" in columns else completions
        answer = next((name for name in answers if name in row), None)
        if answer and prompt in row:
            return _pair(row, named, prompt, answer, extras)
    if _is_chat(value := _value(row, alone := columns.get("completion", ""))):
        return _finish(row, named, _turns(value, alone), {alone})
    raise Skip(_unknown(row))


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
    asked, said = _value(row, prompt), _value(row, answer)
    used = {prompt, answer, UNWANTED}
    if row.get(UNWANTED) is False:
        raise Skip("'label' is false: preference data, and this is no answer to learn")
    if _is_chat(asked):
        before = [replace(t, trained=t.role != "assistant") for t in _turns(asked, prompt)]
    else:
        parts = [_needed(row, prompt), *(_text(_value(row, name), name) for name in extras)]
        used |= {name for name in extras if name in row}
        content = "\n\n".join(part for part in parts if part.strip())
        before = [*_history(row, named["history"]), Turn("user", content)]
        used.add(named["history"])
    after = _turns(said, answer) if _is_chat(said) else [Turn("assistant", _needed(row, answer))]
    if after[0].role != "assistant":  # preference data repeat the prompt in front of each answer
        begins = [(t.role, t.content) for t in after[: len(before)]]
        after = after[len(before) :] if begins == [(t.role, t.content) for t in before] else after
    return _finish(row, named, [*before, *after], used)


def _finish(row: Row, named: Mapping[str, str], turns: list[Turn], used: set[str]) -> Used:
    """With the system text and the functions that stand beside the turns."""
    turns = [turn for turn in turns if turn.role not in ("system", "developer") or turn.content.strip()]
    for name in (named["system"], *SYSTEMS):
        text = _text(_value(row, name), name)
        if text.strip() and not any(turn.role in ("system", "developer") for turn in turns):
            turns.insert(0, Turn("system", text))
            used.add(name)
    found: tuple[Mapping[str, Any], ...] = ()
    for name in (named["tools"], *TOOLS):
        if not found and (value := _value(row, name)) is not None:
            found = tuple(_tools(value, name))
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
    value = _value(row, column)
    if value is None:
        return []
    value = _parsed(value, column)
    if _is_chat(value):
        return _turns(value, column)
    turns: list[Turn] = []
    for pair in value if isinstance(value, list) else [value]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Skip(f"{column!r} is no list of pairs of a question and an answer")
        turns += [Turn("user", _text(pair[0], column)), Turn("assistant", _text(pair[1], column))]
    return turns


# ------------------------------------------------------------------------------- messages


def _is_chat(value: Any) -> bool:
    """Whether it is a list of messages, not of the parts of one."""
    keys = ({*item} if isinstance(item, Mapping) else set() for item in value) if _is_list(value) else ()
    return bool(value) and all({"role", "from"} & key for key in keys) and _is_list(value)


def _turns(value: Any, column: str) -> list[Turn]:
    value = _parsed(value, column)
    if not _is_list(value) or not value:
        raise Skip(f"{column!r} is no list of messages")
    return [_turn(message) for message in value]


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise Skip("a message is no object with a role and a content")
    message = {key: value for key, value in message.items() if value is not None}
    said = message.get("role", message.get("from"))
    key = str(said).strip().casefold().replace("-", "_").replace(" ", "_")
    if key not in ROLES:
        known = ", ".join(dict.fromkeys(ROLES.values()))
        raise Skip(f"a message has the role {str(said)[:40]!r}; {known} are known")
    role = ROLES[key]
    content, thought = _content(message.get("content", message.get("value")))
    if role != "assistant":
        about = {name: str(message[name]) for name in ("name", "tool_call_id") if name in message}
        return Turn(role, content, about=about)
    if key == CALL and (call := _call_of(content)):
        content, calls = "", call
    else:
        calls = _calls(message)
    thought = thought or next((_text(message[name], name) for name in REASONING if name in message), "")
    return Turn(role, content, thought if thought.strip() else "", calls, trained=_is_trained(message))


def _is_trained(message: Row) -> bool:
    for name in SWITCHES:
        value = message.get(name, 1)
        if str(value).strip().casefold() in ("0", "0.0", "false"):
            return False
        if str(value).strip().casefold() not in ("1", "1.0", "true"):
            raise Skip(f"{name!r} of a message is neither 0 nor 1")
    return True


def _content(value: Any) -> tuple[str, str]:
    """The text of a message, and the reasoning that stands in its parts."""
    if not _is_list(value):
        return _text(value, "content"), ""
    text, thought = "", ""
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
            text += _text(part["text"], "content")
        elif isinstance(part, Mapping) and kind == "thinking":
            thought += _text(part.get("thinking"), "content")
        elif isinstance(part, str):
            text += _text(part, "content")
        else:
            raise Skip(f"a message has a part of the kind {str(kind)[:40]!r}; only text can be trained")
    return text, thought


def _calls(message: Row) -> tuple[Mapping[str, Any], ...]:
    """The calls of an assistant's message; the old ``function_call`` is one."""
    value = _parsed(message.get("tool_calls") or [], "tool_calls")
    if not _is_list(value):
        raise Skip("'tool_calls' is no list")
    calls = [_call(item) for item in value]
    return tuple([*calls, _call(message[CALL])] if CALL in message else calls)


def _call_of(content: str) -> tuple[Mapping[str, Any], ...]:
    """The calls that a ShareGPT turn writes as JSON; none if it writes them in another way."""
    try:
        value = read_json(content)
    except ValueError:
        return ()
    items = value if isinstance(value, list) else [value]
    named = all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in items)
    return tuple(_call(item) for item in items) if items and named else ()


def _call(item: Any) -> Mapping[str, Any]:
    function = item.get("function", item) if isinstance(item, Mapping) else {}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Skip("a tool call has no name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = read_json(arguments) if arguments.strip() else {}
        except ValueError:
            raise Skip("the arguments of a tool call are no JSON") from None
    else:
        arguments = _without_nulls(arguments or {})
    if not isinstance(arguments, Mapping):
        raise Skip("the arguments of a tool call are no object")
    found = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": str(item["id"]), **found} if item.get("id") else found


def _tools(value: Any, column: str) -> Iterator[Mapping[str, Any]]:
    value = _parsed(value, column)
    for item in value if _is_list(value) else [value]:
        item = _parsed(item, column)
        if not isinstance(item, Mapping):
            raise Skip(f"{column!r} is no list of functions")
        item = _without_nulls(item)
        yield item if "function" in item else {"type": "function", "function": item}


# --------------------------------------------------------------------------------- values


def _value(row: Row, column: str) -> Any:
    """What stands in a column; None where nothing does."""
    value = row.get(column)
    if isinstance(value, float) and math.isnan(value):
        return None
    return None if isinstance(value, (str, list, dict)) and not value else value


def _needed(row: Row, column: str) -> str:
    text = _text(_value(row, column), column)
    if not text.strip():
        raise Skip(f"{column!r} is empty")
    return text


def _text(value: Any, column: str) -> str:
    """As it stands; a number or a boolean as JSON writes it, parts of text one after the other."""
    if value is None:
        return ""
    if _is_list(value):
        return _content(value)[0]
    if isinstance(value, (Mapping, bytes)):
        raise Skip(f"{column!r} is no text; make it text")
    return check_characters(json.dumps(value) if isinstance(value, (bool, int, float)) else str(value))


def check_characters(text: str) -> str:
    """The text, if there are no halves of surrogate pairs in it, such as an escape \\ud800 in JSON leaves.

    Raises:
        Skip: there is one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Skip(f"it holds {text[error.start]!r}, half a character") from None
    return text


def _parsed(value: Any, column: str) -> Any:
    """A list or an object that may be written as JSON text, as in a CSV."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value)
    except ValueError:
        raise Skip(f"{column!r} is text, but no JSON") from None


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object all the keys of its column, most of them null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _names(row: Row) -> str:
    names = ", ".join(map(str, row)) or "none"
    return shown(names, SHOWN)


def shown(text: str, most: int) -> str:
    """So much of a stranger's text on one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])
