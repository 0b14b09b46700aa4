"""The whole comparison, from runs to what is shown: standings, pairs, what stays apart, notes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from budgetsearch.tools.compare.pairing import (
    Apart,
    Measure,
    Run,
    TaskResult,
    base_names,
    task_measure,
    validation_measures,
)
from budgetsearch.tools.compare.pairs import ALPHA, Pair, Values, bootstrapped_difference, pairs_of
from budgetsearch.tools.compare.winrates import Winning, challenge, warnings_of
from budgetsearch.views.intervals import (
    CONFIDENCE,
    MIN_ANSWERS,
    MIN_EXAMPLES,
    RESAMPLES,
    Estimate,
    bootstrapped,
    paired_shares,
    weighted_mean,
    wilson,
)

FORMAT = 1
CAVEATS = (
    f"Intervals ({CONFIDENCE:.0%}; of accuracies Wilson's, of their differences Newcombe's for pairs, of all "
    f"else a bootstrap over examples, {RESAMPLES} resamples) and p-values (sign flips of paired differences, "
    "Holm's correction within a measure) say what the choice of examples explains. They say nothing of other "
    "seeds: a run again with another seed would differ as well.",
    "A run's validation rows also chose its configuration, so its loss on them is a little too good; that "
    "of a base is not.",
)


@dataclass(frozen=True)
class Compared:
    """One measure of all that share its examples."""

    measure: Measure
    means: Mapping[str, Estimate]
    """By entrant, the best first."""
    pairs: tuple[Pair, ...]

    @property
    def too_few(self) -> str:
        """Why there is no interval; empty where there are examples enough."""
        needed = MIN_ANSWERS if self.measure.shares else MIN_EXAMPLES
        if self.measure.examples >= needed:
            return ""
        what = "answers" if self.measure.shares else "examples"
        return f"{self.measure.examples} {what} are too few for an interval: it takes {needed}"

    def better(self, pair: Pair) -> str | None:
        """Which of the two is better; None where chance explains the difference."""
        if not pair.told_apart:
            return None
        return pair.first if (pair.difference > 0) == self.measure.higher_is_better else pair.second


@dataclass(frozen=True)
class Comparison:
    """Everything that is shown and written."""

    runs: tuple[Run, ...]
    bases: Mapping[tuple[str, str], str]
    """Names of the bare bases, by hash of the model and quantization."""
    validation: tuple[Compared, ...]
    tasks: tuple[Compared, ...]
    apart: tuple[Apart, ...]
    winnings: tuple[Winning, ...]
    notes: tuple[str, ...]
    interrupted: bool = False
    price: float | None = None
    """Of an hour of the card, in the user's money."""

    def cost(self, run: Run) -> float | None:
        """What a run cost in that money."""
        return None if self.price is None else self.price * run.costs.device_seconds / 3600

    @property
    def compared(self) -> tuple[Compared, ...]:
        """All measures."""
        return (*self.validation, *self.tasks)

    @property
    def remarks(self) -> list[str]:
        """What a reader must know of the measures and the runs."""
        few = [f"{one.measure.name}: {one.too_few}" for one in self.compared if one.too_few]
        return [*dict.fromkeys(few), *self.notes]

    @property
    def warnings(self) -> list[str]:
        """What a reader of the challenge's score must know."""
        return warnings_of(list(self.winnings))


def compare_runs(
    runs: Sequence[Run],
    answers: Mapping[str, Mapping[str, TaskResult]] | None = None,
    *,
    baseline: str | None = None,
    notes: Sequence[str] = (),
    interrupted: bool = False,
) -> Comparison:
    """Compare what can be compared, name what cannot.

    ``answers``: by task and entrant. ``baseline``: pairs are formed with this entrant alone, wherever it is
    among the compared.
    """
    bases = base_names(runs, [run.name for run in runs])
    measures, aparts = validation_measures(runs, bases)
    tasks, said = _tasks(answers or {})
    compared = [_compare(measure, baseline) for measure in tasks]
    return Comparison(
        runs=tuple(runs),
        bases=bases,
        validation=tuple(_compare(measure, baseline) for measure in measures),
        tasks=tuple(compared),
        apart=tuple(aparts),
        winnings=tuple(_winnings(compared)),
        notes=(*(f"{run.name}: {note}" for run in runs for note in run.notes), *said, *notes),
        interrupted=interrupted,
    )


def _tasks(answers: Mapping[str, Mapping[str, TaskResult]]) -> tuple[list[Measure], list[str]]:
    measures, notes = [], []
    for task, results in answers.items():
        measure = task_measure(task, results)
        if measure is None:
            notes.append(f"{task}: there is no example that all have answered")
        else:
            measures.append(measure)
    return measures, notes


def _compare(measure: Measure, baseline: str | None) -> Compared:
    if Compared(measure, {}, ()).too_few:
        mean, difference = _plain_mean, _plain_difference
    elif measure.shares:
        mean, difference = _share, _share_difference
    else:
        mean, difference = bootstrapped, bootstrapped_difference
    means = {name: mean(values, measure.weights) for name, values in measure.values.items()}
    sign = -1 if measure.higher_is_better else 1
    order = sorted(means, key=lambda name: (sign * means[name].value, name))
    values = {name: measure.values[name] for name in order}
    pairs = pairs_of(values, measure.weights, difference, baseline if baseline in values else None)
    return Compared(measure, {name: means[name] for name in order}, tuple(pairs))


def _plain_mean(values: Values, weights: Values) -> Estimate:
    return Estimate(weighted_mean(values, weights))


def _plain_difference(first: Values, second: Values, weights: Values) -> Estimate:
    return Estimate(weighted_mean(first, weights) - weighted_mean(second, weights))


def _share(values: Values, weights: Values) -> Estimate:
    return wilson(weighted_mean(values, weights), len(values))


def _share_difference(first: Values, second: Values, weights: Values) -> Estimate:
    return paired_shares(second, first)


def _winnings(tasks: Sequence[Compared]) -> list[Winning]:
    """Of those that answered every task."""
    if not tasks:
        return []
    names = set.intersection(*(set(one.means) for one in tasks))
    if len(names) < 2:
        return []
    scores = {
        one.measure.name: {
            name: mean.value if one.measure.higher_is_better else -mean.value
            for name, mean in one.means.items()
            if name in names
        }
        for one in tasks
    }
    return challenge(scores)


# ------------------------------------------------------------------------------- JSON


def as_json(found: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON values, example by example, so that it can be checked."""
    return {
        "format": FORMAT,
        "runs": [{**_run_dict(run), "cost": found.cost(run)} for run in found.runs],
        "price": found.price,
        "bases": [
            {"name": name, "model_sha256": model, "quantization": quantization}
            for (model, quantization), name in found.bases.items()
        ],
        "measures": [_compared_dict(one) for one in found.compared],
        "not_compared": [dataclasses.asdict(one) for one in found.apart],
        "challenge": {
            "entrants": [dataclasses.asdict(winning) for winning in found.winnings],
            "warnings": found.warnings,
        },
        "notes": list(found.notes),
        "caveats": list(CAVEATS),
        "interrupted": found.interrupted,
    }


def _run_dict(run: Run) -> dict[str, Any]:
    values = dataclasses.asdict(run)
    del values["adapter"], values["base"]
    return {**values, "params": dict(run.params)}


def _compared_dict(one: Compared) -> dict[str, Any]:
    measure = one.measure
    return {
        "name": measure.name,
        "higher_is_better": measure.higher_is_better,
        "examples": measure.examples,
        "weights": list(measure.weights),
        "notes": list(measure.notes),
        "too_few": one.too_few,
        "alpha": ALPHA,
        "entrants": [
            {
                "name": name,
                "mean": mean.value,
                "low": mean.low,
                "high": mean.high,
                "values": list(measure.values[name]),
            }
            for name, mean in one.means.items()
        ],
        "pairs": [{**dataclasses.asdict(pair), "better": one.better(pair)} for pair in one.pairs],
    }
