"""Tasks that the package reasoning-gym generates and grades: ``reasoning-gym:NAME?size=N&seed=S``."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import DataError, nearest
from budgetsearch.training.data.lines import Read

GYM = "reasoning-gym:"


def dataset_of(source: str) -> tuple[str, dict[str, Any], Any]:
    """Name, configuration and generator.

    Raises:
        DataError: there is no such task, or it does not take these parameters.
    """
    name, _, query = source.removeprefix(GYM).partition("?")
    known = _gym().DATASETS
    if name not in known:
        raise DataError(
            f"reasoning-gym has no task {name!r}{nearest(name, known)}; it has {len(known)} tasks"
        )
    fields = {field.name for field in dataclasses.fields(known[name][1])}
    config: dict[str, Any] = {"size": 2000, "seed": 0}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in fields:
            raise DataError(f"{source}: {name} has no parameter {key!r}{nearest(key, fields)}")
        config[key] = _literal(value)
    if not isinstance(config["size"], int) or config["size"] < 2 or not isinstance(config["seed"], int):
        raise DataError(f"{source}: size must be a whole number from 2 on, and seed a whole number")
    try:
        return name, config, _gym().create_dataset(name, **config)
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(f"{source}: reasoning-gym does not take these parameters: {error}") from error


def rows(source: str) -> Iterator[Read]:
    """Its rows: ``prompt``, ``completion``, and ``check``, with which an answer is graded.

    Raises:
        DataError: the task has no reference answers.
    """
    name, config, dataset = dataset_of(source)
    for index in range(config["size"]):
        entry = dataset[index]
        if not isinstance(entry["answer"], str) or not entry["answer"].strip():
            raise DataError(f"{source}: {name} gives no reference answer to learn from; choose another task")
        check = {"task": name, "config": config, "entry": _pack(entry)}
        yield f"{name}:{index}", {"prompt": entry["question"], "completion": entry["answer"], "check": check}


def grade(check: Mapping[str, Any], answer: str) -> float:
    """The task's own grade of an answer, 0 to 1."""
    config = json.dumps(check["config"], sort_keys=True)
    try:
        found = _grader(check["task"], config)(answer.strip(), _unpack(check["entry"]))
    except Exception:  # graders parse free text: whatever they choke on is no right answer
        return 0.0
    return min(1.0, max(0.0, float(found)))


def _gym() -> Any:
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise DataError(f"{GYM}NAME needs the package reasoning-gym: pip install reasoning-gym") from error
    return factory


def _literal(text: str) -> Any:
    try:
        return read_json(text)
    except ValueError:
        return text


def _pack(value: Any) -> Any:
    """To JSON values that keep tuples and keys of any type: some tasks grade with them."""
    if isinstance(value, dict):
        return {"dict": [[_pack(key), _pack(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item) for item in value]}
    if isinstance(value, list):
        return [_pack(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if isinstance(value, Mapping):
        if "tuple" in value:
            return tuple(_unpack(item) for item in value["tuple"])
        return {_unpack(key): _unpack(item) for key, item in value["dict"]}
    return value


@functools.lru_cache(maxsize=8)
def _grader(task: str, config: str) -> Any:
    return _gym().create_dataset(task, **read_json(config)).score_answer
