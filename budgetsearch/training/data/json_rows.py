"""Rows in files of JSON: a line each, a list, an object that holds the list, or one behind the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import DataError
from budgetsearch.training.data.lines import MAX_VALUE, Broken, Read, Row, lines_of, whole

MESSAGE = frozenset(
    ("role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "weight", "train")
)
"""Keys of a message: rows that are messages of a tree have others too."""
BLOCK = 1 << 20
"""Characters that are read at once."""


def jsonl_rows(path: Path) -> Iterator[Read]:
    """The rows of a file with a row a line."""
    first = True
    for number, line in enumerate(lines_of(path), start=1):
        if not (line := line.strip(" \t\r\n\ufeff")):  # files put together have several byte order marks
            continue
        if first and (line in ("[", "{") or line.startswith("[{")) and not _is_talk(line):
            yield from json_rows(path)  # a name may promise lines and hold a list
            return
        first = False
        yield str(number), _parsed(line)


def _parsed(line: str) -> Row | Broken:
    if not whole(line):
        return Broken("it is not UTF-8")
    try:
        value = json.loads(line)
        return _mended(value) if "\\ud" in line.lower() else _object(value)
    except json.JSONDecodeError as error:
        return Broken(f"it is not valid JSON ({error.msg})")
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        return Broken("its JSON is nested too deeply or holds an endless number")


def _is_talk(line: str) -> bool:
    """Whether a line is a conversation, not a list of rows that may be messages of a tree."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return _is_messages(value)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and _is_chat(value) and all(MESSAGE >= {*item} for item in value)


def _object(value: Any) -> Row | Broken:
    if _is_messages(value):
        return {"messages": value}
    if not isinstance(value, dict):
        return Broken(f"it is a {type(value).__name__}, not an object with columns")
    return value


class _Invalid(Exception):
    """What is no JSON, with its line and what is wrong."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line, self.why = line, why


class _Values:
    """JSON values that follow each other in a file, of which little is in memory."""

    def __init__(self, path: Path) -> None:
        self._path, self._lines = path, lines_of(path)
        self._text, self._at, self._line = "", 0, 1
        self._decoder = json.JSONDecoder()

    @property
    def place(self) -> int:
        """The line of what comes next."""
        return self._line

    def peek(self) -> str:
        """The next character that is no space; nothing at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._step(self._at + 1)
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Over the next character."""
        self._step(self._at + 1)

    def skip_line(self) -> None:
        """To the next line."""
        end = self._text.find("\n", self._at)
        self._step(len(self._text) if end < 0 else end + 1)

    def take(self) -> Any:
        """The next value.

        Raises:
            _Invalid: it is none.
            DataError: it is too long, or nested too deeply.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._more():
                    line = self._line + self._text.count("\n", self._at, error.pos)
                    raise _Invalid(line, error.msg) from error
                continue
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self._path}:{self._line} cannot be read: {error}; mend it") from error
            if end < len(self._text) or isinstance(value, (dict, list, str)) or not self._more():
                self._step(end)
                return value

    def _step(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        """Read on, twice as much as there is, so that no value is looked at often."""
        wanted, found = max(BLOCK, len(self._text) - self._at), list[str]()
        while wanted > 0 and (line := next(self._lines, "")):
            found.append(line)
            wanted -= len(line)
        self._text, self._at = self._text[self._at :] + "".join(found), 0
        if len(self._text) > MAX_VALUE:
            raise DataError(
                f"{self._path}:{self._line} is a value of more than {MAX_VALUE >> 20} MiB, or broken; save "
                "the rows as JSONL"
            )
        return bool(found)


def json_rows(path: Path) -> Iterator[Read]:
    """The rows of a JSON file of any other form.

    Raises:
        DataError: it is none.
    """
    values = _Values(path)
    try:
        if values.peek() == "[":
            yield from _listed(values)
        elif values.peek() not in ("{", ""):
            raise DataError(
                f"{path} holds neither a list of rows nor an object with one; save its rows as JSONL"
            )
        else:
            yield from _following(path, values)
    except _Invalid as error:
        raise DataError(f"{path}:{error.line} is not valid JSON: {error.why}; mend it there") from error


def _listed(values: _Values) -> Iterator[Read]:
    """The items of a list, and of what may stand behind it."""
    number = 0
    while values.peek():
        if values.peek() != "[":
            yield _behind(values)
            continue
        values.skip()
        sign = "," if values.peek() != "]" else ""
        while sign == ",":
            number += 1
            yield f"row {number}", _mended(values.take())
            sign = values.peek()
            values.skip()
        if not sign:
            values.skip()
        elif sign != "]":
            raise _Invalid(values.place, "a comma or the end of the list is missing")


def _behind(values: _Values) -> Read:
    """What is no list and stands behind one."""
    place = str(values.place)
    try:
        return place, _mended(values.take())
    except _Invalid as error:
        values.skip_line()
        return place, Broken(f"it is not valid JSON ({error.why})")


def _following(path: Path, values: _Values) -> Iterator[Read]:
    """Objects one behind the other, or one that holds the list of rows."""
    first = True
    while values.peek():
        place = str(values.place)
        try:
            value = values.take()
        except _Invalid as error:
            if first:
                raise
            values.skip_line()
            yield place, Broken(f"it is not valid JSON ({error.why})")
            continue
        if first and not values.peek() and isinstance(value, dict):
            yield from _unwrapped(path, value)
            return
        yield place, _mended(value)
        first = False


def _unwrapped(path: Path, value: Row) -> Iterator[Read]:
    """The rows in an object that is all of a file; one without a list of objects or columns is a row."""
    lists = [item for item in value.values() if isinstance(item, list)]
    rows = [item for item in lists if item and all(isinstance(row, dict) for row in item)]
    if not any(map(_is_chat, lists)) and not rows and (found := _by_columns(value)):
        rows = [found]
    elif any(map(_is_chat, lists)) or (not rows and len(lists) < len(value)):
        yield "row 1", _mended(value)
        return
    if len(rows or lists) != 1:
        raise DataError(f"{path} holds an object with {len(lists)} lists; one list of rows is needed")
    for number, row in enumerate((rows or lists)[0], start=1):
        yield f"row {number}", _mended(row)


def _by_columns(value: Row) -> list[Any]:
    """The rows of an object that holds columns: lists of the same length, or what pandas makes of them."""
    columns = [
        item if isinstance(item, list) else list(item.values())
        for item in value.values()
        if isinstance(item, list) or (isinstance(item, dict) and all(key.isdecimal() for key in item))
    ]
    if len(columns) < len(value) or len({*map(len, columns)}) != 1:
        return []
    return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _is_chat(items: list[Any]) -> bool:
    return bool(items) and all(isinstance(item, dict) and {"role", "from"} & {*item} for item in items)


def _mended(value: Any) -> Row | Broken:
    """An object whose texts are whole."""
    if isinstance(value, dict) and not whole(json.dumps(value, ensure_ascii=False)):
        return Broken("it holds half a character, or is not UTF-8")
    return _object(value)
