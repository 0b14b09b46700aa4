"""The metric of a run, looked at before anything is spent."""

from __future__ import annotations

import os
from pathlib import Path

from budgetsearch.core.errors import SettingsError
from budgetsearch.core.metric import TASK, is_task, is_task_file, read_metric
from budgetsearch.core.space.space import Space
from budgetsearch.run.settings import Settings
from budgetsearch.training.metric import check_metric
from budgetsearch.training.task_facts import facts_of


def anchored_metric(metric: str) -> str:
    """The same with the definition of a task by its absolute path."""
    if not is_task_file(metric):
        return metric
    return TASK + str(Path(metric.removeprefix(TASK)).expanduser().absolute())


def said_of_metric(settings: Settings, space: Space | None = None) -> str:
    """Which it is, on one line; nothing of the loss.

    Raises:
        SettingsError: there is none of that name, it cannot be had here, or its direction is wrong.
    """
    metric = read_metric(settings.metric, settings.direction)
    if metric is None:
        return ""
    if is_task(settings.metric):
        return f"{metric.name}, {with_direction(settings).direction}"
    check_metric(metric, os.getcwd())
    return f"{metric.name}, {metric.direction}"


def with_direction(settings: Settings) -> Settings:
    """The settings with the direction in which their task is better; of any other metric the same.

    Raises:
        SettingsError: the task cannot be had here, or it is better in the other direction.
    """
    if not is_task(settings.metric):
        return settings
    found = facts_of(settings.metric, os.getcwd())
    if settings.direction not in (None, found.direction):
        better = "higher" if found.direction == "max" else "lower"
        raise SettingsError(
            f"--direction {settings.direction}: {settings.metric} ({found.metric}) is better the {better} it "
            "is. Leave --direction out."
        )
    return settings.model_copy(update={"direction": found.direction})
