"""What people write: a loop around Optuna, TPE with successive halving, then the best again till the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna

from budgetsearch.core.records import Params, Schedule
from budgetsearch.core.schedule import full_schedule
from budgetsearch.core.space.space import Space
from budgetsearch.training.recipes.loading import find_recipe, load_recipe
from budgetsearch.training.recipes.protocol import Course, Recipe
from budgetsearch.training.recipes.running import losses_of, mean

SEARCH_SHARE = 0.6
"""Of the time: the search, at the least."""
SLOWEST = 2.0
"""Where a run has a greatest length, the search lasts till so many times what that takes is left: the best
may be slower than the first."""
TRIAL_SHARE = 0.1
"""Of the time: one whole trial of the search."""
LAST_SECONDS = 3.0
"""Kept for the evaluation at the end."""
PARTS = 9
"""Of a trial: after each of them it may be pruned."""


@dataclass
class Loop:
    """One search with its last run; its seconds count from ``began``."""

    own: Recipe
    space: Space
    seconds: float
    seed: int
    began: float
    most: int
    """Units that a run may have, ..."""
    length: int = field(default=0)
    """... and those of a trial of the search."""
    kept: float = field(default=0.0)
    """Seconds that the search leaves to the last run."""

    @classmethod
    def around(cls, recipe: str, seconds: float, seed: int, began: float) -> Loop:
        """Load the recipe, and time it as the loop's author would have."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        own = load_recipe(find_recipe(recipe))
        own.setup("cpu")
        found = cls(
            *(own, Space.parse({**(own.space or {}), "free": True}), seconds, seed, began),
            most=own.length or 10**9,
        )
        rate = found._rate()
        found.length = max(own.step * PARTS, min(found.most, int(TRIAL_SHARE * seconds * rate)))
        found.kept = min((1 - SEARCH_SHARE) * seconds, SLOWEST * found.most / rate + LAST_SECONDS)
        return found

    def run(self) -> dict[str, Any]:
        """Search, and then train the best as long as there is time."""
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=self.seed), pruner=pruner)
        study.optimize(self._trial, timeout=self._left_to_search(), catch=(ArithmeticError, ValueError))
        best = _best(study.trials)
        return {**self._last(best), "trials": len(study.trials), "spent_seconds": self.seconds - self._left()}

    def _trial(self, trial: optuna.Trial) -> float:
        params = self.space.from_unit(
            {name: trial.suggest_float(name, 0.0, 1.0) for name in self.space.searched}
        )
        state, way, units, loss = self.own.start(params, self.seed), _course(self.length), 0, 0.0
        for part in range(1, PARTS + 1):
            start, end = time.monotonic(), self.length * part // PARTS
            self.own.train(state, units, end, way)
            rate = (end - units) / max(1e-9, time.monotonic() - start)
            units, loss = end, mean(losses_of(self.own.evaluate(state)))
            trial.set_user_attr("params", dict(params))
            trial.set_user_attr("rate", rate)
            trial.report(loss, part)
            if trial.should_prune() or self._left_to_search() < 0:
                raise optuna.TrialPruned
        return loss

    def _last(self, best: optuna.trial.FrozenTrial) -> dict[str, Any]:
        params: Params = best.user_attrs["params"]
        goal = min(self.most, int(0.9 * (self._left() - LAST_SECONDS) * best.user_attrs["rate"]))
        state, units, way = self.own.start(params, self.seed), 0, _course(goal)
        while units < goal and self._left() > LAST_SECONDS:
            end = min(goal, units + max(self.own.step, goal // 50))
            self.own.train(state, units, end, way)
            units = end
        loss = mean(losses_of(self.own.evaluate(state)))
        return {"loss": loss, "params": params, "units": units, "planned_units": goal}

    def _left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def _left_to_search(self) -> float:
        return self._left() - self.kept

    def _rate(self) -> float:
        """Units per second."""
        params, course, size = self.space.default(), _course(10**9), self.own.step
        state, units = self.own.start(params, 0), 0
        self.own.train(state, units, units + size, course)
        units, began, mark = units + size, time.monotonic(), units + size
        while time.monotonic() - began < 0.02 * self.seconds:
            self.own.train(state, units, units + size, course)
            units, size = units + size, 2 * size
        return float((units - mark) / max(1e-9, time.monotonic() - began))


def _course(length: int) -> Course:
    """The same schedule as here, to its end."""
    trunk: Schedule = full_schedule({}, min(20, length // 3), length)
    schedule = full_schedule({}, trunk.warmup_tokens, length, max(1, int(trunk.share * length)))
    return Course(lambda: schedule, lambda: False, lambda units, loss: None)


def _best(trials: Sequence[optuna.trial.FrozenTrial]) -> optuna.trial.FrozenTrial:
    """The finished trial of the least loss; where none finished, that of the least loss reported."""
    known = [trial for trial in trials if trial.intermediate_values and "params" in trial.user_attrs]
    finished = [trial for trial in known if trial.value is not None and trial.state.name == "COMPLETE"]
    return min(finished or known, key=lambda trial: min(trial.intermediate_values.values()))
