"""Standard tasks through lm-eval, example by example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import BudgetsearchError, UsageError, nearest
from budgetsearch.tools.compare.pairing import TaskResult
from budgetsearch.tools.compare.tasks import Task, key_of, result_of
from budgetsearch.training.harness import (
    INSTALL,
    SEED,
    first_metric,
    language_model,
    silence,
    task_manager,
)

EXTRA = (
    f"{{tasks}}: standard tasks need the package lm-eval: {INSTALL}. Without it data files and "
    "reasoning-gym:NAME can be tasks."
)


def check_harness(names: Sequence[str], folder: Path | None) -> None:
    """Check that lm-eval is there and knows these tasks; loads no data.

    Raises:
        UsageError: it is not installed, a task is unknown, or the folder holds no definition.
    """
    if folder is not None and not any(folder.rglob("*.yaml")):
        raise UsageError(f"--task-data {folder} holds no .yaml file: it is for task definitions of lm-eval.")
    try:
        manager = task_manager(folder)
    except ImportError as error:
        raise UsageError(EXTRA.format(tasks=", ".join(names))) from error
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(
                f"lm-eval has no task {name!r}{nearest(name, manager.all_tasks)}; `lm-eval ls tasks` lists "
                "them, --task-data FOLDER adds definitions of your own."
            )


def ask_harness(
    model: Any, tokenizer: Any, task: Task, *, limit: int | None, folder: Path | None, chat: bool, batch: int
) -> TaskResult:
    """One task with its own prompts, examples and metric, by the model as it is.

    Raises:
        BudgetsearchError: the task cannot be run: its data are not here, or it has no metric by example.
    """
    with silence():
        from lm_eval import simple_evaluate

        try:
            found = simple_evaluate(
                model=language_model(model, tokenizer, batch),
                tasks=task.foreign,
                limit=limit,
                task_manager=task_manager(folder),
                apply_chat_template=chat,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
        except Exception as error:  # whatever a task's code or its download raises
            raise BudgetsearchError(
                f"lm-eval cannot run the task {task.source}: {type(error).__name__}: {str(error)[:300]}. "
                "Where its data cannot be fetched, --task-data FOLDER takes a definition with local files."
            ) from error
    return read_samples(task, found["samples"], found["configs"])


def read_samples(
    task: Task, samples: Mapping[str, Sequence[Mapping[str, Any]]], configs: Mapping[str, Mapping[str, Any]]
) -> TaskResult:
    """Grades by example from what lm-eval logged; the subtasks of a group one after the other.

    The first metric of a task counts, under its first filter.

    Raises:
        BudgetsearchError: that metric has no number for each example.
    """
    keys: list[str] = []
    grades: list[float] = []
    names: list[str] = []
    higher = True
    for name, logged in samples.items():
        listed = configs.get(name, {}).get("metric_list") or []
        metric, wanted_higher = first_metric(listed, logged[0])
        first_filter = logged[0].get("filter", "none")
        for sample in logged:
            if sample.get("filter", "none") != first_filter:
                continue
            value = sample.get(metric)
            if not isinstance(value, (int, float)):
                raise BudgetsearchError(
                    f"The task {task.source} cannot be compared: its metric {metric or '(none)'} has no "
                    "number for each example, only one for all of them."
                )
            keys.append(f"{name} {sample.get('doc_hash') or key_of(sample.get('doc'))}")
            grades.append(float(value))
        names.append(metric if first_filter == "none" else f"{metric}, {first_filter}")
        higher = higher and wanted_higher
    return result_of(task, "; ".join(dict.fromkeys(names)), higher, keys, grades)
