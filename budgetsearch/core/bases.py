"""The base of a trial: a model under a quantization, and what a run calls both.

A run with one model calls its bases by their quantizations alone. Where there are several, a configuration
has the dimension ``model``, whose values are short labels of what ``--model`` named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from budgetsearch.core.errors import ModelError

T = TypeVar("T")

DIMENSION = "model"
"""Of the search space, where a run has several models."""
OF_MODEL = ("model", "data", "inputs")
"""Facts of a run that each model has its own of."""


@dataclass(frozen=True)
class Base:
    """What a trial trains on."""

    model: str
    """Its label; empty where the run has one model."""
    quantization: str

    @classmethod
    def parse(cls, name: str) -> Base:
        """The inverse of ``name``."""
        model, _, quantization = name.rpartition("/")
        return cls(model, quantization)

    @property
    def name(self) -> str:
        """What costs, memory and speeds are kept by: ``nf4``, or ``SmolLM2-135M/nf4``."""
        return f"{self.model}/{self.quantization}" if self.model else self.quantization


@dataclass(frozen=True)
class ModelSetup:
    """One of several base models, for a worker."""

    label: str
    model_path: str
    model_name: str
    data_path: str
    left_out: tuple[int, ...] = ()
    """Validation rows, by their index, that not all models have as a whole: nobody is measured on them."""


def cost_class(params: Mapping[str, Any], free: bool = False) -> str:
    """What decides the reference rate of a configuration: its base, where the space has quantizations; of a
    ``free`` space its quantization alone, for a ``model`` there is the recipe's own."""
    quantization = params.get("quantization")
    if quantization is None:
        return "any"
    return Base("" if free else str(params.get(DIMENSION, "")), str(quantization)).name


def short_name(source: str) -> str:
    """The last part of a Hub id, path or package, fit for the name of a folder."""
    bare = re.sub(r"^\w+:|==.*$", "", source).rstrip("/\\")
    last = re.split(r"[/\\]", bare)[-1].removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "model"


def labels_of(sources: Sequence[str]) -> tuple[str, ...]:
    """A short label of each, the second of a name with its place in the list behind it, or the next number
    that is free."""
    found: list[str] = []
    for number, source in enumerate(sources, start=1):
        name = label = short_name(source)
        while label in found:
            label, number = f"{name}-{number}", number + 1
        found.append(label)
    return tuple(found)


def one_of(models: Mapping[str, T], label: str) -> T:
    """What is there of the model with this label.

    Raises:
        ModelError: there is none.
    """
    if label not in models:
        raise ModelError(
            f"This run has no model {label!r}; it has {', '.join(map(repr, models))}. Start a new run."
        )
    return models[label]


def facts_for(facts: Mapping[str, Any], params: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The facts of a run as those of the one model that a configuration trains; without a configuration of
    the first."""
    models = facts.get("models")
    if not models:
        return facts
    return {**facts, **models[str((params or {}).get(DIMENSION, next(iter(models))))]}
