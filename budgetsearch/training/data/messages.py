"""Messages and other values of a row, in the spellings in which people keep them."""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.training.data.conversation import Role, Skip, Turn

Row = Mapping[str, Any]

ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("developer",), "developer"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("bard", "bing", "chatbot", "claude"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "assistant"),
    **dict.fromkeys(
        ("tool", "observation", "function", "tool_response", "function_response", "ipython"), "tool"
    ),
}
CALL = "function_call"
CALLS = (CALL, "tool_call", "tool_calls")
"""Roles of turns whose content is a call."""
SAID = ("content", "value", "text", "parts")
"""Keys of what a message says."""
TEXTS = ("text", "input_text", "output_text")
"""Kinds of its parts that are text."""
REASONING = ("reasoning_content", "reasoning", "thinking")
SWITCHES = ("weight", "train", "training", "trainable", "loss", "loss_weight")
"""Keys of a message that take the loss from it."""
DETAILS = ("train_detail", "training_detail")
"""... from parts of it."""
PAIRS = (
    ("input", "output"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("user", "assistant"),
    ("human", "assistant"),
)
"""Keys of a question and its answer that are one item of a list."""
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
TRANSCRIPT = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")
"""What stands in front of a turn in a conversation that is one text, as preference data may have it."""

MOST_LITERAL = 1 << 20
"""Characters of a value as Python writes it: it is parsed with a hundred times as much memory."""


def is_chat(value: Any) -> bool:
    """Whether it is a list of messages, not of the parts of one."""
    keys = ({*item} if isinstance(item, Mapping) else set() for item in value) if _is_list(value) else ()
    return bool(value) and all({"role", "from"} & key for key in keys) and _is_list(value)


def chat_in(value: Any) -> Any:
    """The messages in a text that is a list of them, as in a CSV, or one that is alone; else the value."""
    if is_chat([value]):
        return [value]
    if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]"):
        try:
            found = parsed(value, "")
        except Skip:
            return value
        return found if is_chat(found) else value
    return value


def turns_of(value: Any, column: str) -> list[Turn]:
    """The turns of a list of messages.

    Raises:
        Skip: it is none.
    """
    value = _by_message(parsed(value, column))
    if not _is_list(value) or not value:
        raise Skip(f"{column!r} is no list of messages")
    if all(isinstance(item, str) for item in value):
        if is_chat(messages := [_object_in(item) for item in value]):
            return [_turn(message) for message in messages]
        sides = itertools.cycle(("user", "assistant"))
        return [_turn({"role": side, "content": text}) for side, text in zip(sides, value, strict=False)]
    return [turn for item in value for turn in pair_in(item) or [_turn(item)]]


def _object_in(text: str) -> Any:
    """The object that a text holds as JSON; else the text."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return read_json(text)
    except ValueError:
        return text


def _by_message(value: Any) -> Any:
    """An object that holds the roles of all messages, and what they say, as lists of the same length."""
    if not isinstance(value, Mapping) or not {"role", "from"} & value.keys():
        return value
    lists = [item for item in value.values() if _is_list(item)]
    if len(lists) < len(value) or len({*map(len, lists)}) != 1:
        return value
    return [dict(zip(value, cells, strict=True)) for cells in zip(*lists, strict=True)]


def pair_in(item: Any) -> list[Turn]:
    """A question and its answer that are one item of a list; nothing if it is none."""
    if isinstance(item, Mapping):
        keys = {key for key, value in item.items() if value is not None}
        asked, said = next((pair for pair in PAIRS if keys >= {*pair}), ("", ""))
        if not asked or keys & {"role", "from"}:
            return []
        item = [item[asked], item[said]]
    if not _is_list(item) or len(item) != 2 or any(isinstance(part, Mapping) for part in item):
        return []
    sides = zip(("user", "assistant"), item, strict=True)
    return [_turn({"role": side, "content": text}) for side, text in sides]


def transcribed(value: Any) -> list[Turn]:
    """The turns of a text that names the speaker in front of each; none of another."""
    if not isinstance(value, str) or not TRANSCRIPT.match(value):
        return []
    _, *parts = TRANSCRIPT.split(value)
    sides = zip(parts[::2], parts[1::2], strict=True)
    return [_turn({"role": SPEAKERS[side], "content": text}) for side, text in sides]


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise Skip("a message is no object with a role and a content")
    message = {key: value for key, value in message.items() if not _is_void(value)}
    said = message.get("role", message.get("from"))
    if said is None:
        raise Skip(f"a message has no role, only {shown(', '.join(map(str, message)) or 'nothing', 80)}")
    key = str(said).strip().casefold().replace("-", "_").replace(" ", "_")
    if key not in ROLES:
        known = ", ".join(dict.fromkeys(ROLES.values()))
        raise Skip(f"a message has the role {str(said)[:40]!r}; {known} are known")
    role = ROLES[key]
    value = next((message[name] for name in SAID if name in message), None)
    if (role == "tool" or key in CALLS) and _is_data(value):
        value = json.dumps(_without_nulls(value), ensure_ascii=False)
    content, thought = _content(value)
    if role != "assistant":
        about = {name: str(message[name]) for name in ("name", "tool_call_id") if name in message}
        return Turn(role, content, about=about)
    if key in CALLS and (call := _call_of(content)):
        content, calls = "", call
    else:
        calls = _calls(message)
    thought = thought or next((text_of(message[name], name) for name in REASONING if name in message), "")
    return Turn(role, content, thought if thought.strip() else "", calls, trained=_is_trained(message))


def _is_void(value: Any) -> bool:
    """Whether nothing but nulls is in it, as Parquet fills objects that a row does not have."""
    return value is None or (isinstance(value, Mapping) and all(map(_is_void, value.values())))


def _is_data(value: Any) -> bool:
    """Whether it is an object or a list of objects, as functions give them, not the parts of a text."""
    if _is_list(value):
        return bool(value) and all(
            isinstance(item, Mapping) and not {"type", "text"} & item.keys() for item in value
        )
    return isinstance(value, Mapping)


def _is_trained(message: Row) -> bool:
    if any(message.get(name) for name in DETAILS):
        raise Skip("a message says which parts of it are trained; only whole messages can be")
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
        return text_of(value, "content"), ""
    text, thought = "", ""
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if isinstance(part, Mapping) and kind in TEXTS and isinstance(part.get("text"), str):
            text += text_of(part["text"], "content")
        elif isinstance(part, Mapping) and kind == "thinking":
            thought += text_of(part.get("thinking"), "content")
        elif isinstance(part, str):
            text += text_of(part, "content")
        else:
            raise Skip(f"a message has a part of the kind {str(kind)[:40]!r}; only text can be trained")
    return text, thought


def _calls(message: Row) -> tuple[Mapping[str, Any], ...]:
    """The calls of an assistant's message; the old ``function_call`` is one."""
    value = parsed(message.get("tool_calls") or [], "tool_calls")
    if not _is_list(value):
        raise Skip("'tool_calls' is no list")
    calls = [_call(item) for item in value if not _is_void(item)]
    return tuple([*calls, _call(message[CALL])] if CALL in message else calls)


def calls_in(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The calls that a column holds, as a list or as JSON; none of another."""
    return _call_of(value if isinstance(value, str) else json.dumps(value, default=str))


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


def tools_of(value: Any, column: str) -> Iterator[Mapping[str, Any]]:
    """The functions of a list of them, each as the templates want it.

    Raises:
        Skip: it is none.
    """
    value = parsed(value, column)
    for item in value if _is_list(value) else [] if value is None else [value]:
        item = parsed(item, column)
        if not isinstance(item, Mapping):
            raise Skip(f"{column!r} is no list of functions")
        item = _without_nulls(item)
        bare = {key: part for key, part in item.items() if key != "type"}
        yield item if "function" in item else {"type": "function", "function": bare}


# --------------------------------------------------------------------------------- values


def value_of(row: Row, column: str) -> Any:
    """What stands in a column; None where nothing does."""
    value = row.get(column)
    if isinstance(value, float) and math.isnan(value):
        return None
    return None if isinstance(value, (str, list, dict)) and not value else value


def needed(row: Row, column: str) -> str:
    """The text of a column.

    Raises:
        Skip: there is none.
    """
    value = value_of(row, column)
    if _is_list(value) and len(value) > 1 and all(isinstance(item, str) for item in value):
        raise Skip(f"{column!r} holds several texts; choose one with --columns, such as {column}.0")
    text = text_of(value, column)
    if not text.strip():
        raise Skip(f"{column!r} is empty")
    return text


def said_in(value: Any, column: str) -> str:
    """The text of a column that may hold a whole message, or text as ``text_of``."""
    if isinstance(value, Mapping):
        value = next((value[name] for name in SAID if name in value), value)
    return text_of(value, column)


def text_of(value: Any, column: str) -> str:
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


def parsed(value: Any, column: str) -> Any:
    """A list or an object that may be written as text, as in a CSV: as JSON, or as Python writes it."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value)
    except ValueError:
        pass
    try:
        found = ast.literal_eval(value.strip()) if len(value) < MOST_LITERAL else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, (list, tuple, dict)):
        raise Skip(f"{column!r} is text, but no JSON")
    return found


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object all the keys of its column, most of them null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def shown(text: str, most: int) -> str:
    """So much of a stranger's text on one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])
