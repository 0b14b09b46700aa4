"""Records to plain JSON values and back.

A union of records (a job, a decision, an event) carries the class name under the key ``"is"``, so no
pickling is needed anywhere: not on the worker's pipes and not in the ledger.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Union


def read_json(text: str | bytes) -> Any:
    """What a JSON text holds, whoever wrote it.

    Raises:
        ValueError: it is none, or its brackets are nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


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
    return _decoder(kind)(value)


Decoder = Callable[[Any], Any]


@cache
def _decoder(kind: Any) -> Decoder:
    """A ledger has tens of thousands of records of a few kinds: each kind is looked at once."""
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return _union_decoder(typing.get_args(kind))
    inner = typing.get_args(kind)
    if origin is tuple and inner[-1] is not Ellipsis:
        return _row_decoder(tuple(map(_decoder, inner)))
    if origin in (tuple, list, set, frozenset):
        item = _decoder(inner[0])
        return origin if item is _as_it_is else lambda value: origin(map(item, value))
    if origin is Counter:
        return lambda value: Counter({inner[0](key): one for key, one in value.items()})
    if origin in (Mapping, dict):
        key: Decoder = int if inner[0] is int else _as_it_is
        item = _decoder(inner[1])
        return lambda value: {key(name): item(one) for name, one in value.items()}
    return _record_decoder(kind) if dataclasses.is_dataclass(kind) else _as_it_is


def _row_decoder(places: tuple[Decoder, ...]) -> Decoder:
    if all(place is _as_it_is for place in places):
        return tuple
    return lambda value: tuple(place(one) for place, one in zip(places, value, strict=True))


def _as_it_is(value: Any) -> Any:
    return value


def _union_decoder(options: tuple[Any, ...]) -> Decoder:
    kinds = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    records = {kind.__name__: _decoder(kind) for kind in kinds}

    def union(value: Any) -> Any:
        if not (isinstance(value, dict) and "is" in value):
            return value
        if value["is"] not in records:
            raise ValueError(f"no record named {value['is']!r} is expected here")
        return records[value["is"]](value)

    return union


def _record_decoder(kind: Any) -> Decoder:
    name, fields = kind.__name__, typing.get_type_hints(kind)
    decoders = {field: _decoder(hint) for field, hint in fields.items()}
    inner = tuple((field, decoder) for field, decoder in decoders.items() if decoder is not _as_it_is)
    every, checked = frozenset((*fields, "is")), hasattr(kind, "__post_init__")

    def record(value: Any) -> Any:
        if not isinstance(value, dict) or value.get("is") != name:
            raise ValueError(f"expected a {name} record, found {str(value)[:80]!r}")
        known = {**value} if value.keys() <= every else {key: value[key] for key in value if key in every}
        del known["is"]
        for field, decoder in inner:
            if field in known:
                known[field] = decoder(known[field])
        if checked or len(known) < len(fields):  # the rest has its defaults
            try:
                return kind(**known)
            except TypeError as error:
                raise ValueError(f"a {name} record is incomplete: {error}") from error
        made = object.__new__(kind)  # a frozen record's own way to set its fields takes several times as long
        made.__dict__.update(known)
        return made

    return record
