"""Records to plain JSON values and back.

A union of records (a job, a decision, an event) carries the class name under the key ``"is"``, so no
pickling is needed anywhere: not on the worker's pipes and not in the ledger.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Union


def encode(value: Any) -> Any:
    """Records to plain JSON values; each record carries its class name under ``"is"``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        body = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"is": type(value).__name__, **body}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Any) -> Any:
    """The inverse of ``encode``: ``decode(Job, encode(job)) == job``.

    Raises:
        ValueError: the value does not have the shape of ``kind``.
    """
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return _decode_union(typing.get_args(kind), value)
    if origin is tuple:
        return tuple(decode(typing.get_args(kind)[0], item) for item in value)
    if origin is Mapping:
        return {key: decode(typing.get_args(kind)[1], item) for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_record(kind, value)
    return value


def _decode_union(options: tuple[Any, ...], value: Any) -> Any:
    if not (isinstance(value, dict) and "is" in value):
        return value
    for option in options:
        if getattr(option, "__name__", "") == value["is"]:
            return decode(option, value)
    raise ValueError(f"no record named {value['is']!r} is expected here")


def _decode_record(kind: Any, value: Any) -> Any:
    if not isinstance(value, dict) or value.get("is") != kind.__name__:
        raise ValueError(f"expected a {kind.__name__} record, found {str(value)[:80]!r}")
    hints = _hints(kind)
    known = {name: decode(hints[name], item) for name, item in value.items() if name in hints}
    try:
        return kind(**known)
    except TypeError as error:
        raise ValueError(f"a {kind.__name__} record is incomplete: {error}") from error


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)
