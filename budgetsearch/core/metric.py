"""The user's metric: what finalists and a full run's checkpoints are chosen by, where it is not the loss.

A metric gives one number to each answer. Its values stand in the results of the segments that measured them,
one for each example and None where the metric failed, so a choice is the same whoever folds the ledger.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from budgetsearch.core.errors import SettingsError, nearest

Values = tuple[float | None, ...]
"""One for each example, in the order of the validation rows; None: it was not measured."""

LOSS = "loss"
BUILT_IN = ("accuracy", "exact_match", "f1", "rouge_l")
"""All of them are better the higher they are, from 0 to 1."""
REGEX = "regex:"
TASK = "lm_eval:"
"""Before the name of a task of lm-eval, or where its definition lies."""
DEFINITIONS = (".yaml", ".yml")
"""How the name of a task's definition ends."""
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
MIN_PAIRS = 8
"""With fewer examples that both have, nothing is said of two sets of values: the loss decides."""
TAKES = f"loss, {', '.join(BUILT_IN)}, regex:PATTERN, lm_eval:TASK or module:function"


@dataclass(frozen=True)
class Metric:
    """A metric and the direction in which it is better."""

    name: str
    """One of ``BUILT_IN``, ``regex:PATTERN``, ``lm_eval:TASK`` without the folder of its definition, or
    ``module:function``."""
    direction: Literal["max", "min"] = "max"

    @property
    def is_function(self) -> bool:
        """Whether it is code of the user's."""
        return is_function(self.name)

    def merits(self, values: Values) -> Values:
        """The values, the higher the better."""
        return values if self.direction == "max" else tuple(None if v is None else -v for v in values)


def is_function(name: object) -> bool:
    """Whether a metric of this name is a Python function of somebody's."""
    plain = isinstance(name, str) and not name.startswith((REGEX, TASK))
    return plain and FUNCTION.fullmatch(str(name)) is not None


def is_task(name: object) -> bool:
    """Whether a metric of this name is a task of lm-eval."""
    return isinstance(name, str) and name.startswith(TASK)


def is_task_file(name: object) -> bool:
    """Whether it is a task whose definition is a file of somebody's, and not one that lm-eval ships."""
    return is_task(name) and ("/" in str(name) or str(name).endswith(DEFINITIONS))


def is_code(name: object) -> bool:
    """Whether a metric of this name runs code of somebody's: a function, or a task's definition, in which
    templates, metrics and functions do."""
    return is_function(name) or is_task_file(name)


def read_metric(name: str, direction: str | None) -> Metric | None:
    """The metric that two settings name; None for the loss. In which direction a task is better only lm-eval
    knows, so it must have been asked before (``run.metric``).

    Raises:
        SettingsError: there is no such metric, or its direction is missing or wrong.
    """
    if name == LOSS:
        if direction == "max":
            raise SettingsError("--direction max: a loss is better the lower it is. Leave --direction out.")
        return None
    if name.startswith(REGEX):
        _check_pattern(name.removeprefix(REGEX))
    elif is_task(name):
        return Metric(_shown_task(name), "min" if direction == "min" else "max")
    elif name not in BUILT_IN and not is_function(name):
        hint = nearest(name, (LOSS, *BUILT_IN))
        raise SettingsError(f"--metric {name!r}: there is no such metric{hint}. It takes {TAKES}.")
    if is_function(name):
        if direction is None:
            raise SettingsError(
                f"--metric {name}: nobody knows whether more of it is better. Add --direction max or "
                "--direction min."
            )
        return Metric(name, "min" if direction == "min" else "max")
    if direction == "min":
        raise SettingsError(f"--direction min: {name} is better the higher it is. Leave --direction out.")
    return Metric(name)


def _shown_task(name: str) -> str:
    """What a task is called wherever it is shown: nothing of the folder in which its definition lies."""
    task = name.removeprefix(TASK)
    if not task or "," in task:
        raise SettingsError(
            f"--metric {name}: name one task, or one group of tasks, as lm_eval:gsm8k or lm_eval:task.yaml."
        )
    last = task.rstrip("/").rpartition("/")[2]
    return TASK + next((last.removesuffix(end) for end in DEFINITIONS if last.endswith(end)), last)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise SettingsError(
            f"--metric regex:{pattern}: the pattern cannot be read: {error}. Mend it; its last match in an "
            "answer, or the first group of that, must equal the reference's."
        ) from error
    if not pattern:
        raise SettingsError("--metric regex: has no pattern. Write for example 'regex:#### (-?\\d+)'.")


# ------------------------------------------------------------------------------- choosing


class Measured(Protocol):
    """What a metric may have measured, beside its loss."""

    @property
    def merits(self) -> Values:
        """Values of the metric, the higher the better; none where it was not measured."""
        ...

    @property
    def is_final(self) -> bool:
        """It was to be measured: the metric decides among these."""
        ...


One = TypeVar("One", bound=Measured)


def difference(one: Values, other: Values) -> tuple[float, float] | None:
    """How much higher the second is on the examples that both have, and the standard error of that; None
    with fewer than ``MIN_PAIRS`` of these."""
    apart = [b - a for a, b in zip(one, other, strict=False) if a is not None and b is not None]
    if len(apart) < MIN_PAIRS:
        return None
    mean = math.fsum(apart) / len(apart)
    variance = math.fsum((d - mean) ** 2 for d in apart) / (len(apart) - 1)
    return mean, math.sqrt(variance / len(apart))


def surpasses(one: Values, other: Values) -> bool:
    """Whether the second is better on the same examples by more than the standard error of that."""
    found = difference(one, other)
    return found is not None and found[0] > found[1]


def chosen(ones: Sequence[One], loss: Callable[[One], tuple[float, int]]) -> One | None:
    """The one with the lowest loss, unless the metric says otherwise beyond its noise: ties are the loss's.

    Where any was to be measured, those compete alone. One for which that failed is judged by its loss.
    """
    final = [one for one in ones if one.is_final]
    if not final:
        return min(ones, key=loss, default=None)
    best: One | None = None
    for one in sorted(final, key=loss):
        if best is None or surpasses(best.merits, one.merits):
            best = one
    return best


def mean_of(values: Values) -> float | None:
    """The mean of what was measured; None of nothing."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
