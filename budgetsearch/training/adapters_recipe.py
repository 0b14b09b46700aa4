"""Adapters on a frozen base as a recipe: what a run trains that names no other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from budgetsearch.core.bases import cost_class
from budgetsearch.core.landing import Pilot
from budgetsearch.core.records import Params, Schedule, Segment
from budgetsearch.storage.ownership import PROBE_TRIAL
from budgetsearch.training.recipe import GangTraining
from budgetsearch.training.recipes.protocol import Course, Recipe
from budgetsearch.training.sums import META_FILE
from budgetsearch.training.workshop import Workshop

if TYPE_CHECKING:
    from budgetsearch.core.records import WorkerSetup
    from budgetsearch.training.trainers import Send, Stopping, Trainer

PROGRESS = "progress.json"
"""What a checkpoint of an adapter says of itself, where the recipe's own stands beside it."""


class Adapters(Recipe):
    """LoRA and QLoRA.

    Its trainer, ``Workshop``, is what a run uses: it trains gangs, foresees memory, counts costs by token and
    grades answers. The methods that every recipe has are the same training with a single member; the contract
    suite holds them to what every recipe promises.
    """

    unit, metric = "tokens", "loss"

    def __init__(self, workshop: Workshop | None = None, batch_size: int = 8) -> None:
        """``workshop``: whose bases and data the methods take; a trainer brings its own. ``batch_size``: in
        sequences, where a configuration has none."""
        self._workshop, self._batch_size = workshop, batch_size

    def trainer(self, setup: WorkerSetup, send: Send, stopping: Stopping) -> Trainer:
        """Gangs on resident bases."""
        return Workshop(setup, send, stopping)

    def start(self, params: Params, seed: int) -> GangTraining:
        """A gang of one, still to be trained."""
        return self._gang(params, seed)

    def train(self, trial: GangTraining, units: int, until: int, course: Course) -> int:
        """Whole steps of the optimizer, to ``until`` tokens or a little beyond.

        Raises:
            FloatingPointError: the loss ran away.
            MemoryError: not even one row fits.
        """
        (member,) = trial.members
        segment = replace(member.segment, start_tokens=units, stop_tokens=until, schedule=course.schedule)
        member.segment, member.pilot, member.status = segment, Pilot(segment), None
        trial.shop = member.shop = replace(trial.shop, stopping=course.should_stop)
        trial.train()
        if member.status == "diverged":
            raise FloatingPointError(member.detail)
        if member.status == "out_of_memory":
            raise MemoryError(member.detail)
        return member.tokens

    def evaluate(self, trial: GangTraining) -> list[float]:
        """The averaged weights' loss on each validation row, in nats per token."""
        count = len(trial.shop.data.valid)
        trial.evaluate(count, trial.members)
        return list(trial.evaluated[trial.members[0].segment.trial_id].example_losses)

    def save(self, trial: GangTraining, folder: Path) -> None:
        """The checkpoint of a run, file by file: a PEFT adapter, and what training needs to go on."""
        written = trial.shop.checkpoint_path / trial.members[0].save()
        for file in written.iterdir():
            file.replace(folder / (PROGRESS if file.name == META_FILE else file.name))
        written.rmdir()

    def load(self, params: Params, seed: int, folder: Path) -> GangTraining:
        """From such files."""
        assert self._workshop is not None
        kept = self._workshop.shop.checkpoint_path / f"trial{PROBE_TRIAL}-rung0-tokens0-attempt0"
        try:
            shutil.copytree(folder, kept)
            (kept / PROGRESS).replace(kept / META_FILE)
            return self._gang(params, seed, kept.name)
        finally:
            shutil.rmtree(kept, ignore_errors=True)

    def _gang(self, params: Params, seed: int, checkpoint: str | None = None) -> GangTraining:
        assert self._workshop is not None
        base, _ = self._workshop.bases.get(cost_class(params))
        batch = int(params.get("batch_size", self._batch_size))
        segment = Segment(0, params, seed, 0, 0, 1, Schedule(0, 1), batch, batch, checkpoint_in=checkpoint)
        found = GangTraining.set_up(base, [segment], self._workshop.shop)
        if found.broken:
            raise OSError(found.broken[0].detail)
        return found
