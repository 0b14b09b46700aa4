"""Answers are kept in the run's folder: a second comparison asks only what is new."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from budgetsearch.storage.files import replace_text, sha256_of
from budgetsearch.tools.compare.pairing import TaskResult
from budgetsearch.tools.compare.tasks import key_of
from budgetsearch.training.sums import ADAPTER_FILES

FOLDER = "answers"
FORMAT = 1
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
"""Any of them may change an answer."""


def versions(grader: str) -> dict[str, str | None]:
    """Of the packages that an answer and its grade depend on; None: not installed."""
    found: dict[str, str | None] = dict.fromkeys((*PACKAGES, grader))
    for name in found:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def adapter_hash(folder: Path) -> str | None:
    """Hash of an exported adapter; None where there is none."""
    try:
        return key_of([sha256_of(folder / name) for name in ADAPTER_FILES])
    except OSError:
        return None


def load(runs: Iterable[Path], about: Mapping[str, Any]) -> TaskResult | None:
    """What was kept in one of these run folders of exactly this question; a damaged file counts as none."""
    for run in runs:
        try:
            value = json.loads(_path(run, about).read_text(encoding="utf-8"))
            if value["about"] == json.loads(json.dumps(dict(about))):
                return _result(value["result"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def save(run: Path, about: Mapping[str, Any], result: TaskResult) -> None:
    """Keep a result, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    path = _path(run, about)
    path.parent.mkdir(exist_ok=True)
    body = {"format": FORMAT, "about": dict(about), "result": dataclasses.asdict(result)}
    replace_text(path, json.dumps(body, indent=1, allow_nan=False) + "\n")


def _path(run: Path, about: Mapping[str, Any]) -> Path:
    return run / FOLDER / f"{key_of(dict(about))}.json"


def _result(value: Mapping[str, Any]) -> TaskResult:
    result = TypeAdapter(TaskResult).validate_python(value)
    if not result.grades or len(result.examples) != len(result.grades):
        raise ValueError("examples and grades do not match")
    return result
