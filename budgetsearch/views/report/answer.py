"""The answer in numbers: base against adapter, how sure that is, and what became of the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from budgetsearch.core.history.history import History
from budgetsearch.core.policy.planning import SINGLE
from budgetsearch.core.records import Score
from budgetsearch.views.card import adapter_path, load_lines
from budgetsearch.views.intervals import (
    MIN_ANSWERS,
    MIN_EXAMPLES,
    RESAMPLES,
    SEED,
    Estimate,
    bootstrapped,
    paired_shares,
    wilson,
)
from budgetsearch.views.metric import MetricAnswer, metric_answer, trial_metric
from budgetsearch.views.tables import deadline_kept, padding_share, phase_rows, trial_counts
from budgetsearch.views.words import accuracy_of

CAVEAT = (
    "The validation examples also chose the trial, so its numbers are a little optimistic; data that the "
    "search never saw would tell more."
)

BOOTSTRAP = (
    f"BCa bootstrap over the validation examples ({RESAMPLES} resamples, seed {SEED}), each weighted by the "
    "length of its completion; the difference is paired by example"
)
TOO_FEW = f"no interval: it takes {MIN_EXAMPLES} examples that differ"
PAIRED = "Wilson's intervals; the difference's is Newcombe's for pairs, answer by answer"
FEW_ANSWERS = f"no interval: it takes {MIN_ANSWERS} answers"


@dataclass(frozen=True)
class LossAnswer:
    """Validation loss of base and adapter, in nats per completion token."""

    base_nats_per_token: Estimate
    adapter_nats_per_token: Estimate
    difference_nats_per_token: Estimate
    """Adapter less base, on the same examples: below 0 the adapter is better."""
    examples: int
    """Validation examples behind the intervals."""
    examples_better: int
    """Of them: how many the adapter predicts better than the base."""
    method: str


@dataclass(frozen=True)
class AccuracyAnswer:
    """Mean grade of the answers of base and adapter, 0 to 1."""

    base: Estimate
    adapter: Estimate
    difference: Estimate
    answers: int
    what: str
    """How many answers, and how they were graded."""
    method: str


@dataclass(frozen=True)
class BestTrial:
    """The trial behind the adapter."""

    trial_id: int
    params: Mapping[str, Any]
    loss_nats_per_token: float | None
    """At the checkpoint that was exported."""
    metric: float | None
    """Its mean there, in the search; None of a run without one."""
    tokens: int
    """Trained on at that checkpoint."""
    adapter_path: str | None


@dataclass(frozen=True)
class Answer:
    """Result of the run."""

    quantization: str | None
    """Under which base and adapter were scored."""
    loss: LossAnswer | None
    accuracy: AccuracyAnswer | None
    metric: MetricAnswer | None
    """What the run chose by; None: the loss, or it was not measured in the end."""
    best: BestTrial | None
    trials_tried: int
    trials_promoted: int
    trials_in_full: int
    loading: tuple[str, ...] = ()
    """Lines of Python that load the adapter; none before there is one."""
    caveat: str = CAVEAT


@dataclass(frozen=True)
class PhaseShare:
    """Seconds that one phase was charged."""

    phase: str
    charged_seconds: float
    share: float
    """Of all phases together."""


@dataclass(frozen=True)
class Budget:
    """Use of the time."""

    budget_seconds: float | None
    wall_seconds: float
    """Of the run, over all its processes: what the deadline is about."""
    charged_seconds: float
    """Every second of the run once, by what it went into; whatever runs at once, they add up to the wall's.
    Of all workers together: ``Numbers.workers``."""
    deadline_kept: bool | None
    """None of a run that has not come to its end, as long as it has time left."""
    reserve_seconds: float | None
    phases: tuple[PhaseShare, ...]
    training_share_of_budget: float | None
    padding_share: float | None
    """Of the positions that were computed in training."""


def answer_of(history: History) -> Answer:
    """Base against adapter as far as it was scored, and the trial that it is about."""
    tried, promoted, in_full = trial_counts(history)
    return Answer(
        quantization=history.score.quantization if history.score else None,
        loss=_loss(history.score),
        accuracy=_accuracy(history.score),
        metric=metric_answer(history),
        best=_best(history),
        trials_tried=tried,
        trials_promoted=promoted,
        trials_in_full=in_full,
        loading=tuple(load_lines(history)),
        caveat=f"{SINGLE.capitalize()}." if history.plan and history.plan.single else CAVEAT,
    )


def budget_of(history: History) -> Budget:
    """Wall seconds and charged seconds, apart."""
    budget = history.opened.budget_seconds if history.opened else None
    rows = [(row.phase, row.seconds) for row in phase_rows(history)]
    whole = sum(seconds for _, seconds in rows) or 1.0
    return Budget(
        budget_seconds=budget,
        wall_seconds=history.spent,
        charged_seconds=sum(history.charged.values()),
        deadline_kept=deadline_kept(history),
        reserve_seconds=history.plan.reserve_seconds if history.plan else None,
        phases=tuple(PhaseShare(name, seconds, seconds / whole) for name, seconds in rows),
        training_share_of_budget=history.charged.get("train", 0.0) / budget if budget else None,
        padding_share=padding_share(history),
    )


# -------------------------------------------------------------------------- estimates


def _loss(score: Score | None) -> LossAnswer | None:
    if score is None or score.base_loss is None or score.adapter_loss is None:
        return None
    base, adapter, weights = score.base_example_losses, score.adapter_example_losses, score.example_tokens
    differences = [after - before for before, after in zip(base, adapter, strict=True)]
    if not differences:  # nothing was really scored: a plan played in virtual time
        plain = (Estimate(score.base_loss), Estimate(score.adapter_loss))
        return LossAnswer(*plain, Estimate(score.adapter_loss - score.base_loss), 0, 0, TOO_FEW)
    difference = bootstrapped(differences, weights)
    return LossAnswer(
        base_nats_per_token=bootstrapped(base, weights),
        adapter_nats_per_token=bootstrapped(adapter, weights),
        difference_nats_per_token=difference,
        examples=len(base),
        examples_better=sum(1 for one in differences if one < 0),
        method=BOOTSTRAP if difference.low is not None else TOO_FEW,
    )


def _accuracy(score: Score | None) -> AccuracyAnswer | None:
    if score is None or score.base_accuracy is None or score.adapter_accuracy is None:
        return None
    count, before, after = score.task_examples, score.base_accuracy, score.adapter_accuracy
    what = accuracy_of(score)
    if min(count, len(score.base_grades)) < MIN_ANSWERS:
        plain = (Estimate(before), Estimate(after), Estimate(after - before))
        return AccuracyAnswer(*plain, count, what, FEW_ANSWERS)
    paired = paired_shares(score.base_grades, score.adapter_grades)
    return AccuracyAnswer(wilson(before, count), wilson(after, count), paired, count, what, PAIRED)


def _best(history: History) -> BestTrial | None:
    state = history.incumbent
    if state is None:
        return None
    path = adapter_path(history)
    params, metric = dict(state.trial.params), trial_metric(state, history)
    return BestTrial(state.trial_id, params, state.best_loss, metric, state.best_tokens, path)
