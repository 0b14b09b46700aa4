"""The user's metric in numbers: of each trial, and base against adapter."""

from __future__ import annotations

from dataclasses import dataclass

from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.metric import Metric, Values, mean_of
from budgetsearch.views.intervals import MIN_EXAMPLES, RESAMPLES, SEED, Estimate, bootstrapped

METHOD = f"BCa bootstrap over the answers ({RESAMPLES} resamples, seed {SEED}); the difference is paired"
TOO_FEW = f"no interval: it takes {MIN_EXAMPLES} answers that differ"


@dataclass(frozen=True)
class MetricAnswer:
    """Mean of the metric over the answers of base and adapter, on the examples that both have."""

    name: str
    direction: str
    """Whether more (max) or less (min) of it is better."""
    base: Estimate
    adapter: Estimate
    difference: Estimate
    answers: int
    failed: int
    """Further examples for which the metric gave no number for one of them."""
    method: str
    decides: bool
    """Whether the run chooses by it."""


def metric_of(history: History) -> Metric | None:
    """What the run chooses by, or what its recipe has beside the loss; None: the loss alone."""
    if history.plan is not None and history.plan.metric is not None:
        return history.plan.metric
    second = history.facts.get("recipe", {}).get("second")
    return Metric(second["name"], "min" if second["direction"] == "min" else "max") if second else None


def trial_metric(state: TrialState, history: History) -> float | None:
    """The mean at the trial's best checkpoint; None where it was not measured."""
    metric = metric_of(history)
    return mean_of(metric.merits(state.merits)) if metric else None


def metric_answer(history: History) -> MetricAnswer | None:
    """Base against adapter, as far as the final scores have it."""
    metric, score = metric_of(history), history.score
    if metric is None or score is None:
        return None
    pairs = [
        (a, b) for a, b in zip(score.base_metric, score.adapter_metric, strict=False)
        if a is not None and b is not None
    ]  # fmt: skip
    if not pairs:
        return None
    base, adapter = [a for a, _ in pairs], [b for _, b in pairs]
    even = [1.0] * len(pairs)
    difference = bootstrapped([b - a for a, b in pairs], even)
    return MetricAnswer(
        name=metric.name,
        direction=metric.direction,
        base=bootstrapped(base, even),
        adapter=bootstrapped(adapter, even),
        difference=difference,
        answers=len(pairs),
        failed=len(score.adapter_metric) - len(pairs),
        method=METHOD if difference.low is not None else TOO_FEW,
        decides=history.plan is not None and history.plan.metric is not None,
    )


def metric_line(history: History) -> tuple[str, float, float, int] | None:
    """(name, base, adapter, answers) without intervals, which take a moment."""
    metric, score = metric_of(history), history.score
    if metric is None or score is None:
        return None
    base, adapter = mean_of(score.base_metric), mean_of(score.adapter_metric)
    if base is None or adapter is None:
        return None
    return metric.name, base, adapter, known(score.adapter_metric)


def ungraded(history: History) -> tuple[int, int]:
    """(answers for which the metric gave no number, of how many) in the whole search."""
    values = [value for _, result in history.results for value in result.metric]
    return len(values) - known(values), len(values)


def known(values: Values | list[float | None]) -> int:
    """How many there are."""
    return sum(value is not None for value in values)
