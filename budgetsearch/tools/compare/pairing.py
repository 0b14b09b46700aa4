"""What may be compared with what.

Losses are nats per completion token, so they mean the same only on the same token ids of the same
validation rows: that takes the same rows, tokenizer, chat template and length limit. Accuracies mean the
same on the same rows as text. The quantization may differ: it is part of what a run chose. What differs
otherwise is named and stays apart; it is never averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from budgetsearch.core.metric import Metric, Values, is_task
from budgetsearch.core.records import Params

LOSS, ACCURACY = "validation loss", "validation accuracy"


@dataclass(frozen=True)
class Rows:
    """What tells one validation set from another."""

    source: str
    """Hash of all rows before the split."""
    valid_rows: str
    """Hash of the validation rows as text, in their order."""
    valid_tokens: str
    """Hash of their token ids."""


@dataclass(frozen=True)
class Results:
    """What was measured example by example, in the order of the validation rows."""

    losses: tuple[float, ...] = ()
    targets: tuple[int, ...] = ()
    """Completion tokens of each example; empty before the final scores."""
    grades: tuple[float, ...] = ()
    metric: Values = ()
    """Of the run's own metric."""


@dataclass(frozen=True)
class Costs:
    """What a run took."""

    budget_seconds: float
    device_seconds: float
    """Seconds in which it held its card, or the CPU; not what passed between two processes."""
    train_seconds: float
    watt_hours: float | None
    """Of the whole card while jobs ran; None where NVML did not say."""
    peak_bytes: int | None
    """The most that the worker process held; what other processes had on the card is not the run's."""
    card: str = ""


@dataclass(frozen=True)
class Run:
    """One run, as its ledger tells it."""

    name: str
    path: str
    state: str
    model: str
    model_sha256: str
    quantization: str
    """Under which base and adapter were scored; empty before there is an adapter."""
    rows: Rows
    adapter: Results
    base: Results
    costs: Costs
    space: str = ""
    params: Params = field(default_factory=dict)
    tokens: int = 0
    trials: int = 0
    metric: Metric | None = None
    """What it chose by; None: the loss."""
    notes: tuple[str, ...] = ()

    @property
    def base_key(self) -> tuple[str, str]:
        """What tells one bare base from another."""
        return self.model_sha256, self.quantization


@dataclass(frozen=True)
class Measure:
    """One number per example and entrant, on the same examples for all."""

    name: str
    higher_is_better: bool
    values: Mapping[str, tuple[float, ...]]
    weights: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @property
    def examples(self) -> int:
        """How many."""
        return len(self.weights)

    @property
    def shares(self) -> bool:
        """Whether its means are shares, 0 to 1; a task's metric may be something else."""
        return self.name != LOSS and all(0 <= one <= 1 for values in self.values.values() for one in values)


@dataclass(frozen=True)
class Apart:
    """Runs that one measure cannot put side by side, and why."""

    measure: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    why: str


def base_names(runs: Sequence[Run], taken: Iterable[str]) -> dict[tuple[str, str], str]:
    """A name for each bare base under each quantization; several models are told apart by name."""
    keys = {run.base_key: run for run in runs if run.quantization}
    several = len({model for model, _ in keys}) > 1
    wanted = [f"base {run.quantization}" + (f" of {run.model}" if several else "") for run in keys.values()]
    return dict(zip(keys, unique(wanted, taken), strict=True))


def unique(names: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """The same names, a number added to what is there already."""
    seen, found = set(taken), []
    for name in names:
        number, fresh = 1, name
        while fresh in seen:
            number += 1
            fresh = f"{name} ({number})"
        seen.add(fresh)
        found.append(fresh)
    return found


# ------------------------------------------------------------------------- validation


def validation_measures(
    runs: Sequence[Run], bases: Mapping[tuple[str, str], str]
) -> tuple[list[Measure], list[Apart]]:
    """Loss, accuracy and metrics on the validation rows, once for each set of runs that share them."""
    measures, aparts = [], []
    metrics = dict.fromkeys(run.metric for run in runs if run.metric)
    names: list[str | Metric] = [LOSS, ACCURACY, *metrics]
    for name in names:
        groups: dict[str, list[Run]] = {}
        for run in runs:
            if _values(run.adapter, name) and (isinstance(name, str) or run.metric == name):
                same = run.rows.valid_tokens if name == LOSS else run.rows.valid_rows
                groups.setdefault(same, []).append(run)
        made = (_measure(name, members, bases) for members in groups.values())
        measures += [measure for measure in made if measure.examples]
        aparts += _apart(name, list(groups.values()))
    return measures, aparts


def _values(results: Results, name: str | Metric) -> Values:
    if isinstance(name, Metric):
        return results.metric
    return results.losses if name == LOSS else results.grades


def _measure(name: str | Metric, runs: Sequence[Run], bases: Mapping[tuple[str, str], str]) -> Measure:
    found = {run.name: run.adapter for run in runs}
    for run in runs:
        mine = bases.get(run.base_key)
        # One base is measured by several runs; the one with the most examples stands for it.
        known = found.get(mine, Results()) if mine else Results()
        if mine and len(_values(run.base, name)) > len(_values(known, name)):
            found[mine] = run.base
    count = min(len(_values(results, name)) for results in found.values())
    most = max(len(_values(results, name)) for results in found.values())
    notes = [f"the first {count} of up to {most} examples: all have these"] if count < most else []
    weights = [1.0] * count
    if name == LOSS:
        targets = max((results.targets for results in found.values()), key=len)
        if len(targets) >= count:
            weights = [float(number) for number in targets[:count]]
        else:
            notes.append("each example counts alike: no run has its final scores, and so no lengths")
    values = {who: _values(results, name)[:count] for who, results in found.items()}
    kept = [place for place in range(count) if all(some[place] is not None for some in values.values())]
    if len(kept) < count:
        notes.append(f"{count - len(kept)} of {count} examples are left out: the metric gave no number there")
    return Measure(
        name=_title(name),
        higher_is_better=name != LOSS and not (isinstance(name, Metric) and name.direction == "min"),
        values={who: tuple(some[place] or 0.0 for place in kept) for who, some in values.items()},
        weights=tuple(weights[place] for place in kept),
        notes=tuple(notes),
    )


def _title(name: str | Metric) -> str:
    if isinstance(name, Metric):
        return name.name if is_task(name.name) else f"validation {name.name}"
    return name


def _apart(name: str | Metric, groups: Sequence[Sequence[Run]]) -> list[Apart]:
    return [
        Apart(
            _title(name),
            tuple(r.name for r in one),
            tuple(r.name for r in other),
            why(one[0].rows, other[0].rows),
        )
        for place, one in enumerate(groups)
        for other in groups[place + 1 :]
    ]


def why(one: Rows, other: Rows) -> str:
    """Why two validation sets are not the same."""
    if one.source != other.source:
        return "other data"
    if one.valid_rows != other.valid_rows:
        return "the same data in another split (--split-seed, --valid-share or --max-rows)"
    return "the same rows under another tokenizer, chat template or length limit"


# ------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class TaskResult:
    """What one entrant did on one task, example by example."""

    task: str
    metric: str
    higher_is_better: bool
    examples: tuple[str, ...]
    """What tells them apart."""
    grades: tuple[float, ...]


def task_measure(task: str, results: Mapping[str, TaskResult]) -> Measure | None:
    """One task on the examples that all entrants answered; None where there are none."""
    if not results:
        return None
    by_name = {name: dict(zip(one.examples, one.grades, strict=True)) for name, one in results.items()}
    first = next(iter(results.values()))
    common = [key for key in first.examples if all(key in grades for grades in by_name.values())]
    if not common:
        return None
    most = max(len(one.examples) for one in results.values())
    return Measure(
        name=task,
        higher_is_better=first.higher_is_better,
        values={name: tuple(grades[key] for key in common) for name, grades in by_name.items()},
        weights=(1.0,) * len(common),
        notes=(f"{len(common)} of up to {most} examples: all have these",) if len(common) < most else (),
    )
