"""Several base models in one run: each with tokens of its own, compared on the same validation rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetsearch.core.bases import DIMENSION, OF_MODEL, Base, ModelSetup
from budgetsearch.core.errors import DataError, RunFolderError
from budgetsearch.core.events import Opened
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.ports import Say
from budgetsearch.core.records import WorkerSetup
from budgetsearch.core.space.dimensions import Number
from budgetsearch.core.space.models import with_models, without_models
from budgetsearch.core.space.space import MODELS, Space
from budgetsearch.run.preflight import labels
from budgetsearch.run.prepare import Prepared, Watch, prepare_inputs
from budgetsearch.storage.runfolder import RunFolder

if TYPE_CHECKING:
    from budgetsearch.machine.detect import Card
    from budgetsearch.run.settings import Settings
    from budgetsearch.training.data.tokens import PreparedData

LEFT_OUT = "left_out"
"""Of a model's facts: see ``core.bases.ModelSetup``."""


@dataclass(frozen=True)
class PreparedModels:
    """Base models and their data, once they are on this machine; implements ``run.prepare.Subject``."""

    settings: Settings
    each: Mapping[str, Prepared]
    """By label, each as if it were the only one."""
    left_out: Mapping[str, tuple[int, ...]]
    """By label: the validation rows that not all of them have as a whole."""

    @classmethod
    def of(
        cls,
        settings: Settings,
        card: Card,
        say: Say,
        space: Space,
        watch: Watch | None = None,
    ) -> PreparedModels:
        """Fetch, convert and tokenize for one after the other; one that a plan has dropped from the ``space``
        need not be possible any more.

        Raises:
            UsageError: a model or the data cannot be used, or the models have no validation row in common.
        """
        each: dict[str, Prepared] = {}
        bare = without_models(space)
        for label, one in zip(labels(settings), settings.apart, strict=True):
            say(f"{label}:")
            needed = bare if label in space.values_of(DIMENSION) else None
            each[label] = Prepared(one, card, *prepare_inputs(one, say, watch, needed), bare)
        gone = in_common([one.data for one in each.values()], settings.max_length)
        left_out = dict(zip(each, gone, strict=True))
        count = len(next(iter(each.values())).data.valid) - len(gone[0])
        say(f"the {len(each)} models are compared on {count} validation rows, in nats per byte of completion")
        return cls(settings, each, left_out)

    @property
    def _first(self) -> Prepared:
        return next(iter(self.each.values()))

    def setup(self, folder: RunFolder) -> WorkerSetup:
        """What a worker process works on, whatever its jobs are."""
        models = tuple(
            ModelSetup(
                label,
                str(one.base.path),
                one.base.loadable,
                str(one.data.folder),
                self.left_out[label],
            )
            for label, one in self.each.items()
        )
        return replace(self._first.setup(folder), models=models)

    def request(self, space: Space, budget_seconds: float) -> PlanRequest:
        """What the plan rests on: memory and refusals by base, tokens as the first model counts them; of a
        model that a plan has dropped its tokens alone."""
        bare, left = without_models(space), [str(label) for label in space.values_of(DIMENSION)]
        each = {label: self.each[label].request(bare, budget_seconds) for label in left}
        stats = self._first.data.train_stats
        return replace(
            next(iter(each.values())),
            train_tokens=stats.tokens,
            train_rows=stats.rows,
            space=with_models(
                _centered(bare, [Space.parse(one.space) for one in each.values()]),
                left,
            ).to_dict(),
            footprints=_by_base({label: one.footprints for label, one in each.items()}),
            refused=_by_base({label: one.refused for label, one in each.items()}),
            longest=max(one.longest for one in each.values()),
            valid_rows=self._first.data.valid_stats.rows - len(next(iter(self.left_out.values()))),
            token_shares={
                label: one.data.train_stats.tokens / stats.tokens for label, one in self.each.items()
            },
        )

    def facts(self, run: str) -> dict[str, Any]:
        """What was found before the first job; under ``models`` what each model has its own of."""
        found = {label: one.facts(run) for label, one in self.each.items()}
        common = {name: value for name, value in next(iter(found.values())).items() if name not in OF_MODEL}
        models = {
            label: {**{name: facts[name] for name in OF_MODEL}, LEFT_OUT: list(self.left_out[label])}
            for label, facts in found.items()
        }
        return {**common, "models": models}

    def held(self, space: Space, out: Path, budget_seconds: float) -> int | None:
        """How many trials that wait may keep a checkpoint, if all are the largest; None: unknown.

        Raises:
            RunFolderError: the disk has no room for the least that a run needs.
        """
        found = [one.held(space, out, budget_seconds) for one in self.each.values()]
        return None if None in found else min(some for some in found if some is not None)

    @property
    def tokenizer(self) -> Mapping[str, Path]:
        """By label a folder with the tokenizer's files, which go with an adapter of that model."""
        return {label: one.tokenizer for label, one in self.each.items()}


def in_common(data: Sequence[PreparedData], max_length: int) -> list[tuple[int, ...]]:
    """Of each model's validation rows those to leave out, so that the same ones are left in the same order.

    Raises:
        DataError: none are left.
    """
    whole = [one.whole_rows(max_length) for one in data]
    common = set(whole[0]).intersection(*whole[1:])
    orders = [[place for place in rows if place in common] for rows in whole]
    if not common or any(order != orders[0] for order in orders):
        raise DataError(
            "the models have no validation row in common that none of them splits or cuts, so their losses "
            "cannot be compared; raise --max-length, or name other rows with --valid"
        )
    kept = [{rows[place] for place in common} for rows in whole]
    return [
        tuple(row for row in range(len(one.valid)) if row not in some)
        for one, some in zip(data, kept, strict=True)
    ]


def _by_base(each: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By model and quantization to by base."""
    return {Base(label, name).name: value for label, found in each.items() for name, value in found.items()}


def _centered(space: Space, followed: Sequence[Space]) -> Space:
    """The space with its learning rate centred between what suits each of the models."""
    rate = next((d for d in space.dimensions if d.name == "learning_rate"), None)
    if not isinstance(rate, Number) or rate.prior is None or not rate.prior.follows:
        return space
    centers = [float(one.default()["learning_rate"]) for one in followed]
    middle = math.exp(sum(map(math.log, centers)) / len(centers))
    return space.centered("learning_rate", middle, f"the middle of what suits the models of {MODELS}")


def check_same_inputs(opened: Opened, facts: Mapping[str, Any]) -> None:
    """A run goes on only with the model and the data that it began with."""
    if opened.facts.get("models", {}).keys() != facts.get("models", {}).keys():
        raise RunFolderError("The run began with other models; start a new run with another --out.")
    for label, known in opened.facts.get("models", {}).items():
        check_same_inputs(replace(opened, facts=known), facts["models"][label])
    for what, key in (("model", "sha256"), ("data", "prepared"), ("recipe", "sha256")):
        if opened.facts.get(what, {}).get(key) != facts.get(what, {}).get(key):
            raise RunFolderError(
                f"The {what} has changed since this run began, so its trials could not be compared any "
                f"more. Bring the old {what} back, or start a new run with another --out."
            )
