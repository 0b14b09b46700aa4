"""Where a worker comes in: the trainer of its recipe."""

from __future__ import annotations

from budgetsearch.core.records import WorkerSetup
from budgetsearch.training.recipes.protocol import Recipe
from budgetsearch.training.trainers import Send, Stopping, Trainer


def trainer_of(setup: WorkerSetup, send: Send, stopping: Stopping) -> Trainer:
    """Of the recipe that the setup names, or of the one that trains adapters: its own, or the usual one."""
    recipe = _recipe(setup)
    if (own := recipe.trainer(setup, send, stopping)) is not None:
        return own
    from budgetsearch.training.recipes.workshop import RecipeWorkshop

    return RecipeWorkshop(recipe, setup, send, stopping)


def _recipe(setup: WorkerSetup) -> Recipe:
    if setup.recipe is not None:
        from budgetsearch.training.recipes.loading import load_recipe

        return load_recipe(setup.recipe)
    from budgetsearch.training.adapters_recipe import Adapters

    return Adapters()
