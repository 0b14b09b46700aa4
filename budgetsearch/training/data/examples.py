"""Rows: where they come from, how they are split, and when an answer to one is right.

A source is a file (JSONL, JSON, CSV, TSV, Parquet), a folder of them, ``reasoning-gym:NAME?size=N&seed=S`` or
``hub:OWNER/NAME/FILE[@REVISION]``. Whatever its shape, a row becomes an ``Example``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import DataError, nearest
from budgetsearch.core.ports import Say
from budgetsearch.training.data.rows import EXTENSIONS, Row, files_of, read_rows

Message = Mapping[str, str]

GYM, HUB = "reasoning-gym:", "hub:"
PAIRS = (
    # prompt column, what may be added to it, completion columns
    ("prompt", (), ("completion",)),
    ("instruction", ("input", "context"), ("output", "response")),
    ("question", (), ("answer",)),
    ("input", (), ("target",)),
)
COLUMN_SETS = (
    "messages; prompt + completion; instruction (+ input) + output; question + answer; input + target"
)
ROLES = ("system", "user", "assistant", "tool")
FIRST_ROWS = 100
"""So many are looked at before anything else is done."""


@dataclass(frozen=True)
class Example:
    """One prompt and the completion to learn."""

    prompt: tuple[Message, ...]
    """The chat before the completion: ``role`` and ``content``."""
    completion: str
    check: Mapping[str, Any] | None = None
    """How to grade an answer; None compares it with the completion."""
    place: str = ""
    """Where the row stands, for messages: ``train.jsonl:17``."""


def load_examples(source: str, say: Say = lambda _: None) -> list[Example]:
    """All rows of a source, in its order; ``say`` hears how they are read where that is not plain.

    Raises:
        DataError: the source or one of its rows cannot be used; the message names the row.
    """
    examples = list(_examples(source, say))
    if not examples:
        raise DataError(f"{source} holds no rows; give a file with rows")
    return examples


def check_data(source: str) -> None:
    """Check what is cheap: spelling, existence, and the first rows. Never uses the network.

    Raises:
        DataError: the source cannot be used.
    """
    if source.startswith(GYM):
        _gym_dataset(source)
    elif source.startswith(HUB):
        _hub_parts(source)
    elif not list(itertools.islice(_examples(source), FIRST_ROWS)):
        raise DataError(f"{source} holds no rows; give a file with rows")


def source_file(source: str) -> Path | None:
    """The file or folder that a source is read from; None for one that is generated.

    Raises:
        DataError: it is not there.
    """
    if source.startswith(GYM):
        return None
    return _hub_file(source) if source.startswith(HUB) else _local(source)


def split(
    examples: Sequence[Example], seed: int, valid_share: float = 0.1, max_valid: int = 500
) -> tuple[list[Example], list[Example]]:
    """Training and validation rows, a pure function of the arguments; rows with equal prompts stay together.

    Raises:
        DataError: there are not two different prompts.
    """
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(prompt_key(example), []).append(index)
    if len(groups) < 2:
        raise DataError(
            "a split needs rows with two different prompts at least; add rows, or name a validation file"
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    room = max(1, min(max_valid, round(len(examples) * valid_share)))
    chosen: set[int] = set()
    for group in order[1:]:  # the first group always trains
        if len(chosen) + len(group) <= room:
            chosen.update(group)
    if not chosen:
        smallest = min(order, key=len)
        chosen.update(smallest)
    train = [example for index, example in enumerate(examples) if index not in chosen]
    shuffled = [index for group in order for index in group if index in chosen]
    return train, [examples[index] for index in shuffled]


def prompt_key(example: Example) -> tuple[tuple[str, str], ...]:
    """What makes two prompts the same."""
    return tuple((message["role"], message["content"].strip()) for message in example.prompt)


def _examples(source: str, say: Say = lambda _: None) -> Iterator[Example]:
    if source.startswith(GYM):
        yield from _gym_examples(source)
        return
    path = _hub_file(source) if source.startswith(HUB) else _local(source)
    for file in files_of(path):
        for place, row in read_rows(_filled_file(file), say):
            yield _from_row(row, f"{file.name}:{place}")


def _local(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        raise DataError(
            f"there is no data file at {source!r}{nearest(path.name, siblings)}; give a file, a folder, "
            f"{GYM}NAME or {HUB}OWNER/NAME/FILE.jsonl"
        )
    return path


def _filled_file(path: Path) -> Path:
    if path.suffix.lower() not in EXTENSIONS:
        raise DataError(f"{path} is none of {', '.join(EXTENSIONS)}; convert it to JSONL")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; give a file with rows")
    return path


def _from_row(row: Row, place: str) -> Example:
    if row.get("messages") is not None:
        return _from_messages(row["messages"], place)
    for prompt, extras, completions in PAIRS:
        answer = next((name for name in completions if name in row), None)
        if prompt in row and answer:
            if isinstance(row[prompt], list) and isinstance(row[answer], list):
                return _from_messages([*row[prompt], *row[answer]], place)
            parts = [_filled(row, prompt, place), *(_optional(row, name, place) for name in extras)]
            content = "\n\n".join(part for part in parts if part)
            return Example(({"role": "user", "content": content},), _filled(row, answer, place), None, place)
    found = ", ".join(map(str, row)) or "none"
    raise DataError(f"{place} has no usable columns; found: {found}; what works: {COLUMN_SETS}")


def _filled(row: Row, column: str, place: str) -> str:
    text = _optional(row, column, place)
    if not text.strip():
        found = ", ".join(map(str, row))
        raise DataError(f"{place}: {column!r} is empty; found columns: {found}; fill it or remove the row")
    return text


def _optional(row: Row, column: str, place: str) -> str:
    value = row.get(column)
    if isinstance(value, (dict, list)):
        raise DataError(f"{place}: {column!r} is a {type(value).__name__}, not text; make it text")
    return "" if value is None else _sound(str(value), place)


def _sound(text: str, place: str) -> str:
    """Half a surrogate pair (an escape such as \\ud800 in JSON) is no character of any text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds {text[error.start]!r}, half a character; mend or remove it"
        ) from error
    return text


def _from_messages(value: Any, place: str) -> Example:
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(
            f"{place}: 'messages' must be a list of a user message and an assistant message at least"
        )
    messages = []
    for number, message in enumerate(value, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(content, str):
            wanted = f"'role' ({', '.join(ROLES)}) and 'content' (text)"
            raise DataError(f"{place}: message {number} needs {wanted}")
        messages.append({"role": str(role), "content": _sound(content, place)})
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{place}: 'messages' must end with an assistant message, not {messages[-1]['role']!r}"
        )
    if not messages[-1]["content"].strip():
        raise DataError(f"{place}: the last assistant message is empty; fill it or remove the row")
    return Example(tuple(messages[:-1]), messages[-1]["content"], None, place)


def _gym() -> Any:
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise DataError(f"{GYM}NAME needs the package reasoning-gym: pip install reasoning-gym") from error
    return factory


def _gym_dataset(source: str) -> tuple[str, dict[str, Any], Any]:
    """Name, configuration and generator of a ``reasoning-gym:`` source."""
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


def _literal(text: str) -> Any:
    try:
        return read_json(text)
    except ValueError:
        return text


def _gym_examples(source: str) -> Iterator[Example]:
    name, config, dataset = _gym_dataset(source)
    for index in range(config["size"]):
        entry = dataset[index]
        if not isinstance(entry["answer"], str) or not entry["answer"].strip():
            raise DataError(f"{source}: {name} gives no reference answer to learn from; choose another task")
        check = {"task": name, "config": config, "entry": _pack(entry)}
        prompt = ({"role": "user", "content": entry["question"]},)
        yield Example(prompt, entry["answer"], check, f"{name}:{index}")


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


def _hub_parts(source: str) -> tuple[str, str, str | None]:
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)/([^@]+?)(?:@([^@]+))?", source.removeprefix(HUB))
    if not match or not match.group(2).lower().endswith(EXTENSIONS):
        wanted = f"{HUB}OWNER/NAME/FILE[@REVISION] with a file of {', '.join(EXTENSIONS)}"
        raise DataError(f"{source!r} is not {wanted}")
    return match.group(1), match.group(2), match.group(3)


def _hub_file(source: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    name, file, revision = _hub_parts(source)
    try:
        # Unlike hf_hub_download, this does not retry for 23 s where there is no network.
        folder = huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=[file]
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise DataError(f"the Hub has no dataset {name!r} at revision {revision or 'main'}") from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"the Hugging Face Hub cannot be reached for {source!r} ({str(error).splitlines()[0]}), and the "
            "file is not in its local cache; fetch it on another machine and give the local file"
        ) from error
    path = Path(folder) / file
    if not path.is_file():
        raise DataError(f"the dataset {name!r} has no file {file!r} at revision {revision or 'main'}")
    return path


def grading_of(example: Example) -> str:
    """How answers are graded: by the ``task``, or against the ``final`` or all ``text`` of the completion."""
    if example.check is not None:
        return "task"
    return "final" if "####" in example.completion else "text"


def answer_is_right(example: Example, answer: str) -> float:
    """Grade of an answer, 0 to 1: the task's own check, the number after ``####``, or equal text."""
    if example.check is not None:
        config = json.dumps(example.check["config"], sort_keys=True)
        try:
            grade = _grader(example.check["task"], config)(answer.strip(), _unpack(example.check["entry"]))
        except Exception:  # graders parse free text: whatever they choke on is no right answer
            return 0.0
        return min(1.0, max(0.0, float(grade)))
    if grading_of(example) == "final":
        return float("####" in answer and _final(example.completion) == _final(answer))
    return float(_normal(example.completion) == _normal(answer))


def _final(text: str) -> str:
    """The line after the last ``####``: a model that goes on writing has still answered."""
    line = text.rsplit("####", 1)[1].strip().partition("\n")[0]
    return re.sub(r"[,$\s]", "", line).rstrip(".").casefold()


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".,;:!? ")
