"""The process in which a metric of the user's runs: ``python -m budgetsearch.training.metric_process``.

A function that hangs or ends its process costs an example, and never the worker. JSON lines: first what the
metric is, then an example each; answered by ``{"ready": true}``, ``{"value": 0.5}`` or ``{"error": "..."}``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.metric import REGEX
from budgetsearch.machine.child import die_with_parent

Function = Callable[[str, str, str], Any]
"""Of prompt, reference and answer."""


def main() -> None:
    """Load the metric, then grade one answer after the other until the input ends."""
    die_with_parent()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the metric prints goes to the log

    def say(found: dict[str, Any]) -> None:
        out.write(json.dumps(found) + "\n")
        out.flush()

    wanted = read_json(sys.stdin.readline())
    try:
        function = load(wanted["metric"], wanted["folder"])
    except Exception as error:
        return say({"error": _said(error)})
    say({"ready": True})
    for line in sys.stdin:
        say(_graded(function, read_json(line)))
    return None


def load(metric: str, folder: str) -> Function:
    """The function that a metric names; its module is looked for in ``folder``, then wherever Python looks.

    Raises:
        ImportError: there is no such module, or nothing of that name in it.
        TypeError: it is no function.
    """
    if metric.startswith(REGEX):
        from budgetsearch.training.data.grading import by_pattern

        same = by_pattern(metric.removeprefix(REGEX))
        return lambda prompt, reference, answer: same(reference, answer)
    name, _, path = metric.partition(":")
    _find(name.partition(".")[0], folder)
    found: Any = importlib.import_module(name)
    for part in path.split("."):
        if not hasattr(found, part):
            raise ImportError(f"{name} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{metric} is a {type(found).__name__}, and no function")
    return found  # type: ignore[no-any-return]


def _find(top: str, folder: str) -> None:
    """Take a module from the folder; whatever it imports in turn comes from there last of all, so that
    nothing that is installed is replaced by what lies beside it."""
    spec = PathFinder.find_spec(top, [folder])
    if spec is not None and spec.loader is not None and top not in sys.modules:
        sys.path.append(folder)
        sys.modules[top] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def _graded(function: Function, example: dict[str, str]) -> dict[str, Any]:
    try:
        value = float(function(example["prompt"], example["reference"], example["answer"]))
    except Exception as error:
        return {"error": _said(error)}
    return {"value": value} if math.isfinite(value) else {"error": f"it gave {value}"}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


if __name__ == "__main__":
    main()
