"""Every number of a report, once: report.json holds them, report.html and report.md show them.

They come from the ledger alone. The names carry the units: seconds, bytes, tokens, nats. Where something was
not measured there is None, never a zero that looks like a measurement.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from budgetsearch.core.events import Entry
from budgetsearch.core.history.history import History
from budgetsearch.core.records import Params
from budgetsearch.core.space.space import Space
from budgetsearch.views.report.answer import Answer, Budget, answer_of, budget_of
from budgetsearch.views.report.facts import RunFacts, facts_of
from budgetsearch.views.report.peaks import Peaks, peaks_of
from budgetsearch.views.report.timeline import Timeline, timeline_of
from budgetsearch.views.report.workers import WorkerSeconds, worker_seconds_of
from budgetsearch.views.shortfalls import Shortfall, shortfalls
from budgetsearch.views.tables import CardRow, card_row, rank_correlations, trial_rows
from budgetsearch.views.words import rung_name, rung_names

SCHEMA = "budgetsearch.report"
SCHEMA_VERSION = 1
"""Goes up when a key changes its name, its unit or its meaning; not when one is added."""
MIN_IMPORTANCE = 10
"""With fewer trials at a rung an importance is noise: the method asks for five that count as good."""
RULED_OUT = "foreseen not to fit into memory, so it never ran"
ALPHA = 0.05
"""A parameter whose p-value is not below it does not stand out from chance."""
Importances = Callable[[Space, Sequence[tuple[Params, float]]], Mapping[str, tuple[float, float]]]
"""From a space, configurations and their losses to each parameter's share and p-value (study.importance)."""


@dataclass(frozen=True)
class Rung:
    """One level of the ladder."""

    rung: int
    name: str
    train_seconds: float
    """Of training alone that a trial gets up to here."""
    tokens: Mapping[str, int]
    """The same in tokens, by quantization."""
    trials_sent: int
    trials_finished: int


@dataclass(frozen=True)
class TrialNumbers:
    """One trial."""

    trial_id: int
    params: Mapping[str, Any]
    origin: str
    status: str
    rung: int
    """The highest that it finished; -1 before the first."""
    rung_losses_nats_per_token: tuple[float | None, ...]
    best_loss_nats_per_token: float | None
    metric: float | None
    """Mean of the run's metric at its best checkpoint."""
    tokens: int
    charged_seconds: float
    peak_bytes: int | None
    """Of the worker process, with all that trained beside it; None: not measured."""
    on_memory_front: bool
    """No other trial reached as low a loss with as little memory."""


@dataclass(frozen=True)
class Promotion:
    """A decision to send a trial up the ladder."""

    wall_seconds: float
    trial_id: int
    to_rung: int
    loss_before_nats_per_token: float | None
    """At the rung from which it was promoted."""
    reason: str


@dataclass(frozen=True)
class RankCorrelation:
    """Agreement of a rung's ranking with the next one's."""

    lower_rung: int
    upper_rung: int
    trials: int
    spearman: float | None
    """From -1 to 1; None for fewer than three trials, or where all are tied."""


@dataclass(frozen=True)
class Importance:
    """Weight of each parameter in being among the best at one rung."""

    rung: int | None
    """None: no rung has a result."""
    trials: int
    shares: Mapping[str, float]
    """They add up to 1; empty: too few trials."""
    method: str
    p_values: Mapping[str, float] = field(default_factory=dict)
    """How often losses that depend on no parameter give as much, corrected for their number."""
    above_chance: tuple[str, ...] = ()
    """Those that stand out from that."""


@dataclass(frozen=True)
class Failure:
    """Something that did not work."""

    what: str
    where: str
    status: str
    why: str


@dataclass(frozen=True)
class Notice:
    """Line that the run wanted the user to know."""

    wall_seconds: float
    text: str


@dataclass(frozen=True)
class ProbeNumbers:
    """Cost of some real steps of the calibration."""

    quantization: str
    trials_at_once: int
    micro_batch: int
    checkpointing: bool
    tokens_per_second: float
    tflops: float
    """1e12 operations a second, without attention."""
    mfu: float | None
    """Their share of the card's dense 16-bit peak, 0 to 1."""
    peak_bytes: int
    """Of the worker process."""
    chosen: bool


@dataclass(frozen=True)
class Numbers:
    """All of it."""

    schema: str
    schema_version: int
    run: RunFacts
    shortfalls: tuple[Shortfall, ...]
    """What the run lost or never measured, and why; none while it goes."""
    answer: Answer
    budget: Budget
    workers: WorkerSeconds
    """What all of them together were busy with; the budget is wall time."""
    rungs: tuple[Rung, ...]
    eta: int | None
    """One in so many trials is promoted."""
    eval_examples: int | None
    """Validation examples on which every trial is evaluated."""
    trials: tuple[TrialNumbers, ...]
    """Those that got furthest first."""
    promotions: tuple[Promotion, ...]
    timeline: Timeline
    importance: Importance
    rank_correlations: tuple[RankCorrelation, ...]
    limit_bytes: int | None
    """What the run may use of the card; None where nothing limits it."""
    peaks: Peaks
    card: CardRow | None
    speed: tuple[ProbeNumbers, ...]
    failures: tuple[Failure, ...]
    notices: tuple[Notice, ...]
    samples: tuple[Mapping[str, Any], ...]
    """A few validation examples with both answers."""


def numbers_of(
    entries: Sequence[Entry],
    history: History,
    importances: Importances | None = None,
    *,
    going: bool = True,
) -> Numbers:
    """All numbers of a run, finished or not; ``history`` is the fold of ``entries``.

    ``going``: a process works on it. It counts only where the ledger does not say that the run is over.
    """
    timeline = timeline_of(entries, going=going and history.closed is None)
    return Numbers(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        run=facts_of(entries, history, going),
        shortfalls=shortfalls(history, going),
        answer=answer_of(history),
        budget=budget_of(history),
        workers=worker_seconds_of(history.accounts),
        rungs=tuple(_rungs(history)),
        eta=history.plan.eta if history.plan else None,
        eval_examples=history.plan.eval_examples if history.plan else None,
        trials=tuple(_trials(history, going)),
        promotions=_promotions(timeline, history),
        timeline=timeline,
        importance=importance_of(history, importances),
        rank_correlations=tuple(
            RankCorrelation(rung, rung + 1, count, rho) for rung, count, rho in rank_correlations(history)
        ),
        limit_bytes=history.plan.limit_bytes if history.plan else None,
        peaks=peaks_of(history),
        card=card_row(history),
        speed=tuple(_speed(history)),
        failures=tuple(_failures(history)),
        notices=tuple(Notice(at, text) for at, text in history.notices),
        samples=tuple(history.score.samples) if history.score else (),
    )


def as_json(numbers: Numbers) -> str:
    """report.json: plain JSON, in which a number that is not finite is null."""
    return json.dumps(_plain(dataclasses.asdict(numbers)), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


# ------------------------------------------------------------------------------ parts


def _rungs(history: History) -> list[Rung]:
    plan = history.plan
    if plan is None:
        return []
    states = history.trials.values()
    return [
        Rung(
            rung=rung,
            name=name,
            train_seconds=seconds,
            tokens={kind: round(seconds * rate) for kind, rate in sorted(plan.reference_rates.items())},
            trials_sent=sum(1 for state in states if state.goal >= rung),
            trials_finished=len(history.at_rung(rung)),
        )
        for rung, (name, seconds) in enumerate(zip(rung_names(history), plan.ladder, strict=True))
    ]


def _trials(history: History, going: bool) -> list[TrialNumbers]:
    rows = trial_rows(history, going)
    known = [(r.trial_id, r.peak_bytes, r.loss) for r in rows if r.loss is not None and r.peak_bytes]
    front = pareto(known)
    return [
        TrialNumbers(
            trial_id=row.trial_id,
            params=row.params,
            origin=row.origin,
            status=row.status,
            rung=row.rung,
            rung_losses_nats_per_token=row.losses,
            best_loss_nats_per_token=row.loss,
            metric=row.metric,
            tokens=row.tokens,
            charged_seconds=row.seconds,
            peak_bytes=row.peak_bytes or None,
            on_memory_front=row.trial_id in front,
        )
        for row in rows
    ]


def pareto(points: Sequence[tuple[int, float, float]]) -> set[int]:
    """Of (number, cost, loss): the numbers for which no other is as good in one and better in the other."""
    front, best = set(), math.inf
    for number, _, loss in sorted(points, key=lambda point: (point[1], point[2], point[0])):
        if loss < best:
            front.add(number)
            best = loss
    return front


def _promotions(timeline: Timeline, history: History) -> tuple[Promotion, ...]:
    """List who was sent up the ladder, when and why."""
    return tuple(
        Promotion(
            wall_seconds=span.start_seconds,
            trial_id=span.trial_id,
            to_rung=span.rung,
            loss_before_nats_per_token=_loss_below(history, span.trial_id, span.rung),
            reason=span.reason,
        )
        for span in timeline.spans
        if span.promotion
    )


def _loss_below(history: History, trial_id: int, rung: int) -> float | None:
    losses = history.trials[trial_id].losses
    below = [k for k in losses if k < rung]
    return losses[max(below)] if below else None


def importance_of(history: History, importances: Importances | None) -> Importance:
    """Weigh the parameters; without ``importances`` say only whether there is enough to tell."""
    top = history.plan.top_rung if history.plan else -1
    counts = {rung: len(history.at_rung(rung)) for rung in range(top + 1)}
    enough = [rung for rung, count in counts.items() if count >= MIN_IMPORTANCE]
    fullest = max(counts, key=lambda rung: counts[rung], default=None)
    rung = max(enough) if enough else fullest
    if history.plan is None or rung is None or not counts[rung]:
        return Importance(None, 0, {}, "no trial has finished a rung")
    if not enough:
        return Importance(rung, counts[rung], {}, f"too few trials: it takes {MIN_IMPORTANCE} at one rung")
    if importances is None:
        return Importance(rung, counts[rung], {}, "not computed")
    results = [(state.trial.params, state.losses[rung]) for state in history.at_rung(rung)]
    found = importances(Space.parse(history.plan.space), results)
    p_values = {name: p for name, (_, p) in found.items()}
    return Importance(
        rung,
        counts[rung],
        {name: share for name, (share, _) in found.items()},
        "PED-ANOVA of Optuna",
        p_values,
        tuple(name for name, p in p_values.items() if p < ALPHA),
    )


def _speed(history: History) -> list[ProbeNumbers]:
    """Everything that the calibration measured."""
    card = history.opened.facts.get("card", {}) if history.opened else {}
    peak = None if card.get("stand_in") else card.get("tflops")  # another card's says nothing here
    found = []
    for name, calibration in sorted(history.calibrations.items()):
        for probe in calibration.probes:
            tflops = probe.tokens_per_second * calibration.flops_per_token / 1e12
            found.append(
                ProbeNumbers(
                    quantization=name,
                    trials_at_once=probe.members,
                    micro_batch=probe.micro_batch,
                    checkpointing=probe.recompute,
                    tokens_per_second=probe.tokens_per_second,
                    tflops=tflops,
                    mfu=tflops / peak if peak else None,
                    peak_bytes=probe.peak_bytes,
                    chosen=(probe.members, probe.recompute) == (calibration.gang, calibration.recompute),
                )
            )
    return found


def _failures(history: History) -> list[Failure]:
    """List what failed, and why, in the order of time."""
    rows = [
        Failure("calibration", name, calibration.status, calibration.detail)
        for name, calibration in history.calibrations.items()
        if calibration.status != "ok"
    ]
    for segment, result in history.results:
        if result.status != "ok":
            what = f"trial {result.trial_id}, attempt {segment.attempt}"
            rows.append(Failure(what, rung_name(history, result.rung), result.status, result.detail))
    for state in history.trials.values():
        if state.dead and not state.started:
            rows.append(Failure(f"trial {state.trial_id}", "before its start", state.dead, RULED_OUT))
    if history.score is not None and history.score.status != "ok":
        rows.append(Failure("score", "", history.score.status, history.score.detail))
    if history.closed is not None and history.closed.state == "failed":
        rows.append(Failure("the run", "", "failed", history.closed.reason))
    return rows
