"""What is looked at of a recipe before a run touches anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from budgetsearch.core.errors import SettingsError
from budgetsearch.core.space.space import Space
from budgetsearch.run.settings import Settings
from budgetsearch.run.spaces import load_space
from budgetsearch.storage.shared import url_of
from budgetsearch.training.recipes.loading import find_recipe, load_recipe


def check_recipe(settings: Settings) -> None:
    """Check what can be checked without running the recipe.

    Raises:
        RecipeError: there is no such module.
        SettingsError: a setting that a recipe cannot have.
    """
    find_recipe(str(settings.recipe))
    if url_of(settings.shared):
        raise SettingsError(
            f"--shared {settings.shared}: a recipe's checkpoints go into a folder; name one that all "
            "machines mount."
        )


def recipe_space(settings: Settings) -> Space:
    """The space of a run with a recipe: the one that ``--space`` names, else the recipe's own.

    Raises:
        SpaceError: it is broken.
        RecipeError: the recipe cannot be loaded.
        SettingsError: nobody names a space.
    """
    given: Any = settings.space
    if given == "-":
        given = load_recipe(find_recipe(str(settings.recipe))).space
    if given is None:
        raise SettingsError(
            f"--recipe {settings.recipe} has no search space of its own; name one with --space FILE.yaml."
        )
    return load_space(given, free=True)


def anchored_recipe(recipe: str) -> str:
    """The recipe as any folder finds it."""
    code = find_recipe(recipe)
    return f"{code.place}:{code.name}" if Path(code.place).is_absolute() else recipe
