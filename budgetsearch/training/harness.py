"""What is to be known of lm-eval: where its tasks are, how they are seeded, which of their numbers counts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any

INSTALL = "pip install 'budgetsearch[eval]'"
SEED = 1234
"""Of few-shot examples: the same ones for everybody."""
LOGARITHMS = ("perplexity",)
"""Metrics, or ways to sum them up, whose numbers by example are log-likelihoods: what is made of all of them
is better the lower it is, and each of them the higher it is."""


@lru_cache(maxsize=2)
def task_manager(folder: Path | None) -> Any:
    """All tasks that lm-eval ships, and those whose definitions lie in a folder.

    Raises:
        ImportError: lm-eval is not installed.
    """
    with silence():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=str(folder) if folder else None)


def language_model(model: Any, tokenizer: Any, batch: int) -> Any:
    """A model as lm-eval asks one; the weights are those that are there."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def first_metric(listed: Sequence[Mapping[str, Any]], example: Mapping[str, Any]) -> tuple[str, bool]:
    """(name, whether more is better) of the first metric that an ``example`` has a number of.

    ``listed``: as a task's definition has them; a metric that is a function has a name as well.
    """
    known = [(metric_name(one), one) for one in listed]
    for name, one in known:
        if name in example and not {name, one.get("aggregation")} & set(LOGARITHMS):
            return name, bool(one.get("higher_is_better", True))
    logged = example.get("metrics") or [""]
    return str(logged[0]), True


def metric_name(one: Mapping[str, Any]) -> str:
    """What a metric of a definition is called."""
    return str(getattr(one["metric"], "__name__", one["metric"]))


@contextmanager
def silence() -> Iterator[None]:
    """lm-eval and datasets print bars and warnings that would bury what matters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            Path(os.devnull).open("w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            yield
    finally:
        logging.disable(level)
