"""Documents of a task of lm-eval: loaded once, and graded one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import UsageError, nearest
from budgetsearch.core.metric import DEFINITIONS, TASK, is_task_file
from budgetsearch.machine.child import NEUTRAL
from budgetsearch.training.harness import SEED, first_metric, metric_name, silence, task_manager

DRY: Mapping[str, Any] = {"generate_until": "", "loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0}
"""By kind of request an answer that no model gave."""
UNSAFE = "it would run code on this machine that a model wrote"
FETCH = (
    "Where its data cannot be fetched, load it once while there is a network, or name a definition with "
    "local files (lm_eval:task.yaml)"
)


class TaskError(UsageError):
    """A task that cannot be asked; says why, without its name."""


@dataclass(frozen=True)
class Document:
    """One document, with what a model is asked about it."""

    task: Any
    requests: tuple[Any, ...]
    """Never answered themselves: see ``fresh``."""

    def fresh(self) -> list[Any]:
        """The requests, without answers."""
        return [replace(one, resps=[], filtered_resps={}) for one in self.requests]

    def grade(self, requests: Sequence[Any]) -> tuple[str, bool, Any]:
        """(metric, whether more of it is better, its value) of the answers that these requests got: under the
        task's first filter the first metric that has a value."""
        wanted = self.task._filters[0]
        wanted.apply(requests)
        answers = [one.filtered_resps[wanted.name] for one in requests]
        found = self.task.process_results(requests[0].doc, answers)
        name, higher = first_metric(_listed(self.task), {**found, "metrics": list(found)})
        return name, higher, found.get(name)

    def dry(self) -> tuple[str, bool]:
        """The metric, and whether more of it is better, without asking a model.

        Raises:
            TaskError: it has no number for each document.
        """
        requests = self.fresh()
        for one in requests:
            one.resps.extend([DRY[one.request_type]] * (one.repeats or 1))
        try:
            name, higher, value = self.grade(requests)
        except Exception:  # grading may insist on an answer that makes sense
            name, higher = first_metric(_listed(self.task), {metric_name(m): 0 for m in _listed(self.task)})
            return name, higher
        if not is_number(value):
            raise TaskError(
                f"its metric {name or '(none)'} has no number for each document, only one for all of them"
            )
        return name, higher


def is_number(value: object) -> bool:
    """Whether lm-eval gave one number."""
    return isinstance(value, (int, float))


def _listed(task: Any) -> list[dict[str, Any]]:
    """The metrics of a task in their order, each with whether more of it is better."""
    better = task.higher_is_better()
    listed = getattr(task.config, "metric_list", None) or [{"metric": name} for name in better]
    return [
        {**one, "higher_is_better": one.get("higher_is_better", better.get(metric_name(one), True))}
        for one in listed
    ]


def load_documents(metric: str, folder: str, most: int, *, every: bool = False) -> list[Document]:
    """The first documents of a task, ``most`` at most; of a group in turn one of each of its tasks.

    Args:
        metric: as the settings name it.
        folder: paths in a definition of the user's count from here.
        most: no more are prepared.
        every: so many of each of a group's tasks.

    Raises:
        ImportError: lm-eval is not installed.
        TaskError: there is no such task, or it or its data cannot be had.
    """
    name = metric.removeprefix(TASK)
    # In the user's folder a data set of a shipped task could be one that happens to lie there.
    with silence(), contextlib.chdir(folder if is_task_file(metric) else NEUTRAL):
        try:
            tasks = _local(name) if is_task_file(metric) else _named(name, None)
            each = [_documents(task, most if every else -(-most // len(tasks))) for task in tasks]
        except (ImportError, TaskError):
            raise
        except Exception as error:  # whatever a definition's code or a download raises
            raise TaskError(f"lm-eval cannot load it: {in_a_line(error)}. {FETCH}") from error
    found = [one for one in chain.from_iterable(zip_longest(*each)) if one is not None]
    return found if every else found[:most]


def in_a_line(error: BaseException) -> str:
    """What an exception says, without a full stop."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}"


def _local(name: str) -> list[Any]:
    """Of a definition in a file, or of a name that is defined in a folder."""
    path = Path(name).expanduser().absolute()
    if path.name.endswith(DEFINITIONS):
        if not path.is_file():
            raise TaskError(f"there is no file {path}")
        from lm_eval.tasks import TaskManager

        # It alone: what else lies in the folder is not read.
        return _tasks(TaskManager(include_defaults=False), str(path))
    if not path.parent.is_dir():
        raise TaskError(f"there is no folder {path.parent}; the last part of the path is the task's name")
    return _named(path.name, path.parent)


def _named(name: str, folder: Path | None) -> list[Any]:
    manager = task_manager(folder)
    if name not in manager.all_tasks:
        raise TaskError(
            f"lm-eval has no task {name!r}{nearest(name, manager.all_tasks)}; `lm-eval ls tasks` lists them"
        )
    if (manager.task_index[name].cfg or {}).get("unsafe_code"):  # loading it would fetch code already
        raise TaskError(UNSAFE)
    return _tasks(manager, name)


def _tasks(manager: Any, name: str) -> list[Any]:
    """The task, or those of a group, prepared as lm-eval does for ``compare --tasks``."""
    if not hasattr(manager, "load"):
        raise TaskError("this lm-eval is too old: it takes 0.4.12 or later")
    found = list(manager.load([name])["tasks"].values())
    for task in found:
        if getattr(task, "UNSAFE_CODE", False):
            raise TaskError(UNSAFE)
        if getattr(task, "MULTIMODAL", False):
            raise TaskError("it asks about images or sound")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    if not found:
        raise TaskError("it is a group without tasks")
    return found


def _documents(task: Any, most: int) -> list[Document]:
    """The first of one task. Few-shot examples are drawn in their order, so those of a document are the same
    however many there are."""
    task.set_fewshot_seed(seed=SEED)
    task.build_all_requests(limit=most)
    found: dict[int, list[Any]] = {}
    for one in task.instances:
        found.setdefault(one.doc_id, []).append(one)
    return [Document(task, tuple(sorted(some, key=lambda one: one.idx))) for some in found.values()]
