"""What is to be known of a task before a run asks it: found in a process of its own, for lm-eval and the data
are heavy, and a definition may run code: ``python -m budgetsearch.training.task_facts``."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import SettingsError
from budgetsearch.core.metric import TASK, is_task_file
from budgetsearch.machine import child
from budgetsearch.training.documents import TaskError, in_a_line, load_documents
from budgetsearch.training.harness import INSTALL

MODULE = "budgetsearch.training.task_facts"
LOAD_SECONDS = 600.0
"""Fetching its data and loading it may take so long."""


@dataclass(frozen=True)
class TaskFacts:
    """A task that can be asked here."""

    metric: str
    """Which of its numbers counts."""
    direction: Literal["max", "min"]


def facts_of(metric: str, folder: str) -> TaskFacts:
    """Load a task and its data, and grade an empty answer. ``folder``: as for ``load_documents``.

    Raises:
        SettingsError: it cannot be had; in one line, with what to do.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise _not_installed(metric)
    path = Path(metric.removeprefix(TASK)).expanduser()
    changed = path.stat().st_mtime_ns if is_task_file(metric) and path.is_file() else 0
    return _facts(metric, folder, changed)


@lru_cache(maxsize=8)
def _facts(metric: str, folder: str, changed: int) -> TaskFacts:
    wanted = json.dumps({"metric": metric, "folder": folder})
    try:
        ended = subprocess.run(
            child.python(MODULE), input=wanted, env=child.environment(), cwd=child.NEUTRAL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            timeout=LOAD_SECONDS, check=False,
        )  # fmt: skip
        found = read_json(ended.stdout)
    except subprocess.TimeoutExpired as error:
        raise _unusable(
            metric, f"it was not loaded after {LOAD_SECONDS:.0f} s; fetch its data first"
        ) from error
    except ValueError as error:
        raise _unusable(metric, f"the process that loads it ended with {ended.returncode}") from error
    if "missing" in found:
        raise _not_installed(metric)
    if "error" in found:
        raise _unusable(metric, str(found["error"]))
    return TaskFacts(found["metric"], "max" if found["higher"] else "min")


def _not_installed(metric: str) -> SettingsError:
    return SettingsError(f"--metric {metric}: tasks need the package lm-eval: {INSTALL}.")


def _unusable(metric: str, why: str) -> SettingsError:
    return SettingsError(f"--metric {metric} cannot be used: {why}.")


def main() -> None:
    """Read which task, and say what it is, in a line of JSON each."""
    child.die_with_parent()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever lm-eval or a definition prints
    wanted = read_json(sys.stdin.read())
    out.write(json.dumps(_found(wanted["metric"], wanted["folder"])) + "\n")
    out.flush()


def _found(metric: str, folder: str) -> dict[str, object]:
    try:
        tried = [document.dry() for document in load_documents(metric, folder, 1, every=True)]
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0] == "lm_eval"
        return {"missing": True} if missing else {"error": in_a_line(error)}
    except TaskError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": in_a_line(error)}
    if len({higher for _, higher in tried}) > 1:
        return {"error": "of some of its tasks more is better, and of others less"}
    return {"metric": "; ".join(dict.fromkeys(name for name, _ in tried)), "higher": tried[0][1]}


if __name__ == "__main__":
    main()
