"""What a setting says of itself: for the options, the errors and the documentation alike."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BeforeValidator, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo


def setting(
    default: Any,
    about: str,
    *,
    shown: str = "",
    source: str = "",
    takes: str = "",
    note: str = "",
    **rest: Any,
) -> Any:
    """Describe a field of ``Settings``.

    Args:
        default: its default; ``...`` where the card's profile has one.
        about: what it decides, in a sentence or two.
        shown: the default in words, where the value does not say it.
        source: where the default comes from.
        takes: what it takes, where type and bounds do not say it.
        note: what an error adds to that: a unit, an example.
        rest: bounds, as pydantic's ``Field`` takes them.
    """
    words: JsonDict = {"shown": shown, "source": source, "takes": takes, "note": note}
    return Field(default, description=about, json_schema_extra=words, **rest)


HOURS_IN = {"d": 24.0, "h": 1.0, "m": 1 / 60, "s": 1 / 3600}
TIME = re.compile("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in HOURS_IN))


def read_hours(value: Any) -> Any:
    """Hours from texts such as ``90s``, ``1h30m`` and ``1d``; anything else as it is."""
    text = re.sub(r"\s", "", value).lower() if isinstance(value, str) else ""
    if not text or (found := TIME.fullmatch(text)) is None:
        return value
    parts = zip(found.groups(default="0"), HOURS_IN.values(), strict=True)
    return sum(float(count) * unit for count, unit in parts) or value


def read_fraction(value: Any) -> Any:
    """A number from a text such as ``1/9``; anything else as it is."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except ZeroDivisionError as problem:
            raise ValueError("divided by zero") from problem
    return value


def one_a_line(value: Any) -> Any:
    """Several texts as one, each on a line of its own; anything else as it is."""
    if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return "\n".join(value) or None
    return value


def flag_of(name: str) -> str:
    """The flag of the setting with this name."""
    return "--" + name.replace("_", "-")


def type_of(field: FieldInfo) -> type:
    """The type that an option converts to before the setting checks it: bool, int, float, Path or str."""
    reads_text = any(isinstance(part, BeforeValidator) for part in field.metadata)
    return str if reads_text else _kind(field)


def is_repeated(field: FieldInfo) -> bool:
    """Whether its option may be given more than once."""
    return any(getattr(part, "func", None) is one_a_line for part in field.metadata)


def _kind(field: FieldInfo) -> type:
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType] or [field.annotation]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float, Path) else str


def takes_of(field: FieldInfo) -> str:
    """What the setting takes, as the end of "it must be ..."."""
    return ", ".join(filter(None, (_said(field, "takes") or _allowed(field), _said(field, "note"))))


def default_of(field: FieldInfo) -> str:
    """The default in words; empty where there is none."""
    if shown := _said(field, "shown"):
        return shown
    if isinstance(field.default, bool):
        return "yes" if field.default else "no"
    return "" if field.default is None or field.is_required() else f"{field.default}".removesuffix(".0")


def source_of(field: FieldInfo) -> str:
    """Where the default comes from; empty where that needs no words."""
    return _said(field, "source")


def _said(field: FieldInfo, word: str) -> str:
    words = field.json_schema_extra
    return str(words[word]) if isinstance(words, dict) else ""


def _allowed(field: FieldInfo) -> str:
    """What type and bounds allow."""
    if get_origin(field.annotation) is Literal:
        return " or ".join(get_args(field.annotation))
    kind = _kind(field)
    if kind is int:
        return f"a whole number {_bounds(field)}"
    names = {bool: "true or false", float: _bounds(field), Path: "the path of a folder"}
    return names.get(kind, "text")


def _bounds(field: FieldInfo) -> str:
    above, low, most = (_bound(field, word) for word in ("gt", "ge", "le"))
    if above is not None:
        return f"more than {above}" + ("" if most is None else f" and at most {most}")
    return f"of at least {low}" if most is None else f"from {low} to {most}"


def _bound(field: FieldInfo, word: str) -> float | None:
    return next((getattr(bound, word) for bound in field.metadata if hasattr(bound, word)), None)
