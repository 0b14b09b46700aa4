"""What every recipe promises, tried on it: ``budgetsearch check my_module:MyRecipe``."""

from __future__ import annotations

import random
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from budgetsearch.core.records import Params, Schedule
from budgetsearch.core.space.space import Space
from budgetsearch.training.recipes import folders
from budgetsearch.training.recipes.folders import Kept
from budgetsearch.training.recipes.protocol import Course, Recipe
from budgetsearch.training.recipes.running import Run, losses_of, mean

STEPS = 3
"""So many are trained before and after a pause."""
SAMPLES = 3
"""So many further configurations of the space are tried."""
SEED = 1
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".joblib")
"""Formats that run code when they are read."""


@dataclass(frozen=True)
class Promise:
    """One point of the contract, and whether it was kept."""

    name: str
    kept: bool
    detail: str = ""


@dataclass
class Examination:
    """A recipe under examination; every point is tried, as far as those before it allow."""

    recipe: Recipe
    space: Space
    device: str = "cpu"
    seen: Callable[[Promise], None] = lambda promise: None
    """Hears of each point as soon as it is known."""
    promises: list[Promise] = field(default_factory=list)

    def examine(self) -> list[Promise]:
        """All points, in order."""
        with tempfile.TemporaryDirectory(prefix="budgetsearch-check-") as folder:
            if self._ready():
                self._examine(Path(folder))
        return self.promises

    def _ready(self) -> bool:
        return self._try("setup runs", lambda: self.recipe.setup(self.device))

    def _examine(self, folder: Path) -> None:
        first, second = STEPS * self.recipe.step, 2 * STEPS * self.recipe.step
        if self.recipe.length:
            second = min(second, self.recipe.length)
            first = max(self.recipe.step, second // 2)
        params = self.space.default()
        whole = self._trained(params, second)
        if not self._try("start, train and evaluate run", lambda: self.losses(whole())):
            return
        wanted = self.losses(whole())
        if self.recipe.second_metric is not None:
            self._try(f"second gives {self.recipe.second_metric}", lambda: self._second(whole()))
        self._try("evaluate changes nothing", lambda: self._evaluates_twice(whole()))
        self._equal("the same seed gives the same trial", wanted, lambda: self.losses(whole()))
        if not self.recipe.whole:
            paused = self._trained(params, first, second)
            self._equal("a pause changes nothing", wanted, lambda: self.losses(paused()))
        place = folder / "trial0000-rung0-tokens1-attempt0"
        half = self._trained(params, first)
        kept = Kept(half(), first, params, SEED)
        if not self._try("save and export write files alone", lambda: self._write(place, kept)):
            return
        self._equal(
            "load gives back what was saved", self.losses(kept.trial), lambda: self.losses(self._read(place))
        )
        if not self.recipe.whole:
            self._equal(
                "a loaded trial goes on as if it had never stopped",
                wanted,
                lambda: self._goes_on(place, second),
            )
        for number, other in enumerate(self._samples()):
            values = ", ".join(f"{key} {value}" for key, value in other.items())
            name = f"configuration {number + 1} of {SAMPLES} trains: {values}"
            self._try(name, partial(self._trains, other, first))

    # --------------------------------------------------------------------------- the parts

    def losses(self, trial: Any) -> tuple[float, ...]:
        """What its evaluation returns."""
        return losses_of(self.recipe.evaluate(trial))

    def _second(self, trial: Any) -> str:
        """What is wrong with the second metric, in words."""
        if self.recipe.second_direction not in ("max", "min"):
            return f"second_direction is {self.recipe.second_direction!r}; say max or min"
        losses_of(self.recipe.second(trial), "second")
        return ""

    def _trains(self, params: Params, end: int) -> None:
        self._trained(params, end)()

    def _trained(self, params: Params, *ends: int) -> Callable[[], Any]:
        def train() -> Any:
            run = Run(self.recipe, self.recipe.start(params, SEED), 0, _steady())
            for end in ends:
                run.go(end)
            return run.trial

        return train

    def _goes_on(self, place: Path, end: int) -> tuple[float, ...]:
        kept = folders.read(place, self.recipe)
        run = Run(self.recipe, kept.trial, kept.units, _steady())
        run.go(end)
        return self.losses(run.trial)

    def _evaluates_twice(self, trial: Any) -> str:
        before, after = self.losses(trial), self.losses(trial)
        return "" if before == after else _apart(before, after)

    def _write(self, place: Path, kept: Kept) -> str:
        folders.write(place, self.recipe, kept)
        risky = [path.name for path in place.iterdir() if path.suffix in PICKLES]
        self._note(risky)
        return ""

    def _note(self, risky: list[str]) -> None:
        if risky:
            said = f"{', '.join(risky)}: such files run code when they are read; safetensors and JSON do not"
            self._add(Promise("files that can be read without running code", True, said))

    def _read(self, place: Path) -> Any:
        return folders.read(place, self.recipe).trial

    def _samples(self) -> Iterator[Params]:
        rng = random.Random(SEED)
        for _ in range(SAMPLES):
            yield self.space.from_unit({name: rng.random() for name in self.space.searched})

    # ---------------------------------------------------------------------------- verdicts

    def _try(self, name: str, work: Callable[[], Any]) -> bool:
        """A point that is kept unless it raises, or says in words what is wrong."""
        with self._judged(name) as verdict:
            wrong = work()
            verdict.append(wrong if isinstance(wrong, str) else "")
        return self.promises[-1].kept

    def _equal(self, name: str, wanted: tuple[float, ...], work: Callable[[], tuple[float, ...]]) -> None:
        with self._judged(name) as verdict:
            found = work()
            verdict.append("" if found == wanted else _apart(wanted, found))

    @contextmanager
    def _judged(self, name: str) -> Iterator[list[str]]:
        verdict: list[str] = []
        try:
            yield verdict
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            verdict.append(f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
        wrong = next(iter(verdict), "")
        self._add(Promise(name, not wrong, wrong))

    def _add(self, promise: Promise) -> None:
        self.promises.append(promise)
        self.seen(promise)


def _steady() -> Course:
    """A constant rate, and nobody who stops."""
    trunk = Schedule(warmup_tokens=0, stop_tokens=0)
    return Course(lambda: trunk, lambda: False, lambda units, loss: None)


def _apart(wanted: tuple[float, ...], found: tuple[float, ...]) -> str:
    if len(wanted) != len(found):
        return f"{len(found)} numbers instead of {len(wanted)}"
    most = max(abs(a - b) for a, b in zip(wanted, found, strict=True))
    return f"{mean(found):.9g} instead of {mean(wanted):.9g}; numbers differ by up to {most:.3g}"
