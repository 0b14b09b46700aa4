"""The plan of a run with a recipe: measured for a few seconds first, for nobody can guess what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from budgetsearch.core.errors import RecipeError
from budgetsearch.core.ports import Say
from budgetsearch.core.records import Calibration
from budgetsearch.run.foresight import LEAST_SETUP_SECONDS
from budgetsearch.tools.plan.probe import probe_here
from budgetsearch.tools.plan.rehearsal import Rehearsal, rehearse

if TYPE_CHECKING:
    from budgetsearch.run.settings import Settings


@dataclass(frozen=True)
class RecipePreview:
    """What a run would do; its seconds were measured here."""

    recipe: str
    calibrations: Mapping[str, Calibration]
    rehearsal: Rehearsal

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def preview_recipe(settings: Settings, say: Say) -> RecipePreview:
    """Measure the likeliest configuration, then play the policy in virtual time.

    Raises:
        RecipeError: it cannot be loaded, or its calibration fails.
        BudgetError: the hours are too few.
    """
    request, found = probe_here(settings, say)
    if failed := [one for one in found.values() if one.status != "ok"]:
        raise RecipeError(
            f"The recipe {settings.recipe} cannot be measured: {failed[0].status} {failed[0].detail}. "
            f"`budgetsearch check {settings.recipe}` looks closer."
        )
    return RecipePreview(
        str(settings.recipe), found, rehearse(request, found, LEAST_SETUP_SECONDS, settings.gpus or 1)
    )
