"""A task of lm-eval as the metric: it asks the resident base, with or without an adapter on it.

What goes wrong costs the documents that were being asked, and never the run.
"""

from __future__ import annotations

import math
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from budgetsearch.core.metric import read_metric
from budgetsearch.core.policy.jobs import MAX_ANSWERS
from budgetsearch.training.documents import Document, in_a_line, is_number, load_documents
from budgetsearch.training.harness import SEED, language_model, silence
from budgetsearch.training.memory import free, is_memory_error

MAX_FAILURES = 3
"""After so many groups of documents in a row that could not be asked at all the rest is not."""
MAX_NEW_TOKENS = 256
"""What lm-eval lets a model say where the task does not tell."""


class TimeOver(Exception):
    """There is no time for what is being asked."""


@dataclass
class TaskMetric:
    """A task in a worker."""

    metric: str
    """As it is shown."""
    documents: Sequence[Document]
    """The same ones, in the same order, for whoever is asked."""
    trouble: str = ""
    """Why there are none."""
    failed: Counter[str] = field(default_factory=Counter)
    """Why documents have no value, since the last ``told``."""

    @classmethod
    def load(cls, metric: str, folder: str) -> TaskMetric:
        """Load it as ``load_documents`` does; a task that cannot be had any more has no documents."""
        found = read_metric(metric, None)
        name = found.name if found else metric
        try:
            return cls(name, load_documents(metric, folder, MAX_ANSWERS))
        except Exception as error:  # the run goes on by the loss
            traceback.print_exc()
            return cls(name, (), in_a_line(error))

    def told(self) -> str:
        """What went wrong since the last call, in a sentence; nothing if nothing did."""
        failed, self.failed = self.failed, Counter()
        if self.trouble:
            return f"{self.metric} cannot be asked here ({self.trouble})"
        if not failed:
            return ""
        why, _ = failed.most_common(1)[0]
        return f"{self.metric} gave no number for {failed.total()} documents ({why})"


@dataclass
class Sitting:
    """A model that is asked documents of a task, in batches."""

    task: TaskMetric
    model: Any
    tokenizer: Any
    device: str
    batch: int
    late: Callable[[], bool]
    """Whether there is no more time; looked at before every pass, so for each token that is generated."""
    passes: int = 0
    """Of the model, so far."""
    _asker: Any = None
    _failures: int = 0

    def values(self, places: range) -> list[float | None] | None:
        """Of these documents; None for one that failed, and for all of them if the time was over."""
        documents = [self.task.documents[place] for place in places]
        if self._failures >= MAX_FAILURES:
            return [None] * len(documents)
        try:
            with self._watched(), silence(), seeded(self.device):
                asked = self._asked(documents)
        except TimeOver:
            return None
        except Exception as error:
            return self._again(error, places)
        self._failures = 0
        return [self._value(document, some) for document, some in zip(documents, asked, strict=True)]

    def _again(self, error: Exception, places: range) -> list[float | None] | None:
        """What is left of documents that could not be asked: with less at a time, if it was memory."""
        if is_memory_error(error) and self.batch > 1:
            self.batch, self._asker = self.batch // 2, None
            error.__traceback__ = None  # its frames hold what memory is needed for
            free(self.device)
            return self.values(places)
        traceback.print_exception(error)
        free(self.device)
        self._failures += 1
        self.task.failed[in_a_line(error)] += len(places)
        return [None] * len(places)

    def _asked(self, documents: Sequence[Document]) -> list[list[Any]]:
        """Requests with the model's answers."""
        if self._asker is None:
            self._asker = language_model(self.model, self.tokenizer, self.batch)
        found = [document.fresh() for document in documents]
        every = [one for some in found for one in some]
        for kind in dict.fromkeys(one.request_type for one in every):
            some = [one for one in every if one.request_type == kind for _ in range(one.repeats or 1)]
            answers = getattr(self._asker, kind)(some, disable_tqdm=True)
            for one, answer in zip(some, answers, strict=True):
                one.resps.append(answer)
        return found

    def _value(self, document: Document, requests: Sequence[Any]) -> float | None:
        try:
            with silence():
                name, _, value = document.grade(requests)
        except Exception as error:  # whatever a task's own code raises
            self.task.failed[in_a_line(error)] += 1
            return None
        if is_number(value) and math.isfinite(value):
            return float(value)
        self.task.failed[f"{name} is {str(value)[:80]}"] += 1
        return None

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Inside, a pass begins only while there is time."""
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

        def look(module: Any, given: Any) -> None:
            if self.late():
                raise TimeOver
            self.passes += 1

        hook = inner.register_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()

    def passes_of(self, places: range) -> int:
        """Passes that these documents take if every answer is as long as it may be."""
        total = 0
        requests = [one for place in places for one in self.task.documents[place].requests]
        for kind in {one.request_type for one in requests}:
            some = [one for one in requests if one.request_type == kind]
            batches = -(-sum(one.repeats or 1 for one in some) // self.batch)
            total += batches * (_longest(some) if kind == "generate_until" else 1)
        return total


def _longest(requests: Sequence[Any]) -> int:
    """Tokens that an answer to one of these may have."""
    wanted = [one.args[1].get("max_gen_toks") or MAX_NEW_TOKENS for one in requests]
    return max(int(tokens) for tokens in wanted)


def fill(sitting: Sitting, found: list[float | None]) -> None:
    """The values of the first documents, as many as ``found`` has places for, as long as there is time."""
    size = sitting.batch  # it may become smaller on the way
    for start in range(0, len(found), size):
        part = range(start, min(start + size, len(found)))
        values = sitting.values(part)
        if values is None:
            return
        found[part.start : part.stop] = values


def time_documents(sitting: Sitting, most: float) -> float:
    """Seconds of one document, from a batch of them; 0 where none has a value.

    The batch is given up after ``most`` seconds, and then counts for as much as it should have done.
    """
    places = range(min(sitting.batch, len(sitting.task.documents)))
    if not places:
        return 0.0
    start, stopping = time.monotonic(), sitting.late
    sitting.late = lambda: stopping() or time.monotonic() - start > most
    values = sitting.values(places)
    seconds = time.monotonic() - start
    if values is None:
        seconds *= max(1.0, sitting.passes_of(places) / max(1, sitting.passes))
    elif all(value is None for value in values):
        return 0.0
    return seconds / len(places)


@contextmanager
def seeded(device: str) -> Iterator[None]:
    """Inside, whoever draws at random draws the same; afterwards training goes on with its own numbers."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[] if device == "cpu" else [torch.device(device)]):
        torch.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
