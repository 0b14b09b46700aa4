"""A run of a training of the user's own: what it prepares, what its plan rests on, what it exports."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from budgetsearch.core.code import RecipeCode
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.records import WorkerSetup
from budgetsearch.core.space.space import Space
from budgetsearch.run.export import AdapterExporter
from budgetsearch.run.prepare import PACKAGES, common_facts
from budgetsearch.storage.runfolder import MANIFEST_FILE, RunFolder
from budgetsearch.storage.shared import folder_of
from budgetsearch.training.recipes.folders import UNTAKEN, handed_out
from budgetsearch.training.recipes.loading import find_recipe, load_recipe
from budgetsearch.views.card import CARD_FILE, recipe_card, recipe_manifest

if TYPE_CHECKING:
    from budgetsearch.machine.detect import Card
    from budgetsearch.run.settings import Settings
    from budgetsearch.training.recipes.protocol import Recipe

ENDLESS = 10**12
"""Units of a recipe that has no length of its own."""
ENDLESS_SHARE = 0.1
"""Of the budget: what trials of such a recipe are promoted towards. Nothing says that they need more, many of
them find more, and the last full run goes on as long as there is time."""


@dataclass(frozen=True)
class PreparedRecipe:
    """A recipe that was found and loaded; see the protocol ``Subject``."""

    settings: Settings
    card: Card
    space: Space
    code: RecipeCode
    recipe: Recipe
    tokenizer: None = None

    @classmethod
    def of(cls, settings: Settings, card: Card, space: Space) -> PreparedRecipe:
        """Load the recipe that the settings name.

        Raises:
            RecipeError: it cannot be found or loaded.
        """
        code = dataclasses.replace(find_recipe(str(settings.recipe)), params=dict(space.default()))
        return cls(settings, card, space, code, load_recipe(code))

    def setup(self, folder: RunFolder) -> WorkerSetup:
        """What a worker process works on, whatever its jobs are."""
        settings, card = self.settings, self.card
        return WorkerSetup(
            model_path="",
            model_name="",
            data_path="",
            checkpoint_path=str((folder_of(settings.shared) or folder.checkpoints).absolute()),
            shared=settings.shared or "",
            device=card.device,
            targets="",
            seed=settings.seed,
            card_uuid=card.uuid,
            limit_bytes=card.usable_bytes,
            recipe=self.code,
        )

    def request(self, space: Space, budget_seconds: float) -> PlanRequest:
        """What the plan rests on, beside what is still to be measured: a token is a unit of the recipe's."""
        settings, recipe = self.settings, self.recipe
        length = recipe.length or ENDLESS
        return PlanRequest(
            budget_seconds=budget_seconds,
            gpu=self.card.profile.name,
            space=space.to_dict(),
            seed=settings.seed,
            eta=settings.eta,
            first_rung=settings.first_rung,
            full_share=settings.full_share if recipe.length else min(settings.full_share, ENDLESS_SHARE),
            max_epochs=1.0,
            eval_share=settings.eval_share,
            batch_size=recipe.step,
            train_tokens=length,
            train_rows=length,
            valid_rows=1,
            task_examples=0,
            max_trials=settings.max_trials,
            limit_bytes=self.card.usable_bytes,
            whole_evaluation=True,
            whole=recipe.whole,
            own_lengths=recipe.own_schedule,
        )

    def facts(self, run: str) -> dict[str, Any]:
        """What was found before the first job, for the ledger, the report and the card."""
        return {
            **common_facts(self.settings, self.card, run),
            "recipe": {
                "name": self.code.name,
                "place": self.code.place,
                "sha256": self.code.sha256,
                "unit": self.recipe.unit,
                "metric": self.recipe.metric,
                "second": self._second(),
                "length": self.recipe.length,
            },
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }

    def _second(self) -> dict[str, str] | None:
        """The metric that is shown beside the first."""
        name = self.recipe.second_metric
        return None if name is None else {"name": name, "direction": self.recipe.second_direction}

    def held(self, space: Space, out: Path, budget_seconds: float) -> int | None:
        """Nobody foresees how large a recipe's checkpoints are."""
        return None


@dataclass
class RecipeExporter(AdapterExporter):
    """Keeps ``run_folder/adapter`` at what the best trial hands out."""

    def with_tokenizer(self, folder: Path) -> Self:
        """There is none."""
        return self

    def names(self, known: Mapping[str, str], source: Path) -> dict[str, str]:
        """The files that are handed out, by their names in the source: a checkpoint, or what was exported."""
        return handed_out(name for name in known if name not in UNTAKEN)

    def describe(self, history: History, state: TrialState, names: Mapping[str, str]) -> None:
        """Write what people and programs read beside the files."""
        manifest = recipe_manifest(history, state, sorted(names.values()))
        text = json.dumps(manifest, indent=2, default=str)
        (self.fresh / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
        (self.fresh / CARD_FILE).write_text(recipe_card(history, state, manifest), encoding="utf-8")

    @property
    def needed(self) -> tuple[str, ...]:
        """What an exported folder has in any case."""
        return (MANIFEST_FILE,)
