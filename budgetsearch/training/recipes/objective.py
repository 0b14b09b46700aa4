"""``@objective``: a plain function as a recipe, for what cannot pause."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import RecipeError
from budgetsearch.core.records import Params
from budgetsearch.training.recipes.protocol import Course, Recipe

Function = Callable[[Params, int], float]
FILE = "value.json"


class Objective(Recipe):
    """A trial that is a function's value: whatever goes on goes on from the beginning.

    ``function(params, budget)`` trains from scratch with that much of the budget and returns a number, of
    which less is better.
    """

    function: Function

    def start(self, params: Params, seed: int) -> dict[str, Any]:
        """Nothing is trained yet."""
        return {"params": dict(params), "budget": 0, "value": None}

    def train(self, trial: Any, units: int, until: int, course: Course) -> int:
        """The function from its beginning, with the whole budget up to here."""
        value = type(self).function(trial["params"], until)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RecipeError(
                f"{type(self).__qualname__} returned {str(value)[:80]!r}; it must return a number, of which "
                "less is better."
            )
        trial.update(budget=until, value=float(value))
        return until

    def evaluate(self, trial: Any) -> float:
        """The function's last value; of nothing trained it is not a number."""
        return float("nan") if trial["value"] is None else float(trial["value"])

    def save(self, trial: Any, folder: Path) -> None:
        """Configuration, budget and value."""
        (folder / FILE).write_text(json.dumps(trial), encoding="utf-8")

    def load(self, params: Params, seed: int, folder: Path) -> Any:
        """The same again."""
        return read_json((folder / FILE).read_bytes())


@overload
def objective(function: Function) -> type[Objective]: ...


@overload
def objective(
    function: None = None,
    *,
    space: Mapping[str, Any] | None = None,
    most: int | None = None,
    unit: str = "units",
    metric: str = "value",
) -> Callable[[Function], type[Objective]]: ...


def objective(
    function: Function | None = None,
    *,
    space: Mapping[str, Any] | None = None,
    most: int | None = None,
    unit: str = "units",
    metric: str = "value",
) -> Any:
    """Make a recipe of a function of (params, budget) that returns a number, of which less is better::

        @bs.objective(space={"dimensions": {...}}, most=100, unit="epochs")
        def train(params, budget):
            ...
            return error

    ``budgetsearch run --recipe my_module:train``. The function is run whole, with a larger budget for each
    promotion. What is lost against a ``Recipe``: a promoted trial begins again, so that its first rungs are
    paid for twice; a call that is too long for the deadline is ended from outside and leaves nothing; and
    nothing but its configuration and its value is exported.

    Args:
        function: of the configuration, and of how many units to train; less is better.
        space: the search space, unless ``--space`` names another one.
        most: the largest budget that makes sense; None: as the time allows.
        unit: what the budget is counted in, as a plural.
        metric: what it returns.
    """

    def recipe(function: Function) -> type[Objective]:
        name = getattr(function, "__name__", "objective")
        own = {
            "function": staticmethod(function),
            "__doc__": function.__doc__,
            "__module__": function.__module__,
            "__qualname__": getattr(function, "__qualname__", name),
            "space": space,
            "length": most,
            "unit": unit,
            "metric": metric,
            "whole": True,
        }
        return type(name, (Objective,), own)

    return recipe if function is None else recipe(function)
