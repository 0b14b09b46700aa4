"""The arithmetic of the budget: what is planned, what is left, what is kept back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from budgetsearch.core.costs import PLANNING_MARGIN
from budgetsearch.core.disk import held_of
from budgetsearch.core.errors import BudgetError
from budgetsearch.core.feasibility import foresee, micro_batch
from budgetsearch.core.footprint import Footprint
from budgetsearch.core.ladders import FEW_TRIALS, ladders_for, scouts_for
from budgetsearch.core.plan import Plan, Trial
from budgetsearch.core.ports import Proposal
from budgetsearch.core.records import CalibrateJob, Calibration, Job, Score, ScoreJob, cost_class
from budgetsearch.core.space import Space
from budgetsearch.core.trial_state import TrialState

MIN_RUNG_STEPS = 4
"""A rung shorter than this ranks nothing; the ladder loses a rung instead."""
MINIMUM_STEPS = 2 * MIN_RUNG_STEPS
"""A budget without room for so many steps is refused."""
WARMUP_STEPS = 20
MIN_EVAL_EXAMPLES = 16
MAX_EVAL_EXAMPLES = 512
TASK_SHARE = 0.06
"""Share of the budget that generating answers for the accuracy may take, ..."""
MAX_ANSWER_SECONDS = 600.0
"""... and this at most."""
MAX_ANSWERS = 512
"""More of them would hardly make the accuracy surer, even where there is time."""
ANSWER_FACTOR = 1.2
"""Answers by base and adapter may take so much longer than the calibration's by the bare base, which were of
full length; those that do not fit are left out of the accuracy."""
EXIT_SECONDS = 6.0
"""Report, study and process exit; the larger of this and 0.5% of the budget (30 s at most)."""
OPTIONAL_SHARE = 0.15
"""Of a calibration's limit: gangs are tried and answers timed only while this lasts, so that a slow machine
with a short budget still gets to train."""
FULL_EVAL_SHARE = 0.03
"""Evaluations in the middle of a full run take so much of its training's time at most."""
LOSS_FACTOR = 1.5
"""Evaluations in the reserve may take so much longer than the calibration's."""


@dataclass(frozen=True)
class PlanRequest:
    """What the user asked for and what the data are, before anything was measured."""

    budget_seconds: float
    gpu: str
    space: Mapping[str, Any]
    seed: int
    eta: int
    """Of so many trials at a rung one goes on."""
    first_rung: float | None
    """The first rung as a share of the full run; None: as the budget allows."""
    full_share: float
    """The full run's training as a share of the budget, at most."""
    max_epochs: float
    eval_share: float
    """Evaluation as a share of the first rung's time, at most."""
    batch_size: int
    train_tokens: int
    train_rows: int
    valid_rows: int
    task_examples: int
    max_trials: int
    limit_bytes: int | None = None
    max_gang: int = 1
    """Adapters that may train at once, at most."""
    ranks: tuple[int, ...] = (16,)
    """Ranks that the space can ask for; of a range its ends and its middle."""
    footprints: Mapping[str, Footprint] = field(default_factory=dict)
    """Memory as foreseen, by quantization; absent where nobody can foresee it."""
    longest: int = 0
    """Tokens of the longest training row."""
    dropout: float = 0.0
    """The largest dropout that the space can ask for."""
    max_held: int | None = None
    """The disk has room for the checkpoints of so many trials that wait; None: nobody looked."""
    workers: int = 1
    """Jobs that can run at once."""


@dataclass(frozen=True)
class _Measured:
    """What the calibrations say, the slowest quantization first; seconds throughout."""

    step: float
    """One optimizer step."""
    data: float
    """``max_epochs`` over the data."""
    example: float
    """Evaluating one example."""
    write: float
    """Writing one checkpoint."""
    load: float
    """Loading a base."""
    answer: float
    """Generating one answer; 0 if nobody knows."""
    spent: float
    """What the run has already cost."""


def make_plan(request: PlanRequest, calibrations: Mapping[str, Calibration], now: float) -> Plan:
    """The plan, from what the calibrations measured; ``now`` is what they have already cost.

    Raises:
        BudgetError: the budget is below the measured minimum.
    """
    usable = {name: c for name, c in calibrations.items() if c.status == "ok"}
    rates = {name: c.tokens_per_second for name, c in usable.items()}
    step_tokens = request.batch_size * request.train_tokens / request.train_rows
    max_tokens = int(request.max_epochs * request.train_tokens)
    measured = _Measured(
        step=step_tokens / min(rates.values()),
        data=max_tokens / max(rates.values()),
        example=max(c.eval_seconds_per_example for c in usable.values()),
        write=max(c.checkpoint_seconds for c in usable.values()),
        load=max(c.load_seconds for c in usable.values()),
        answer=max(c.answer_seconds for c in usable.values()),
        spent=now,
    )
    _check_minimum(request, measured)
    shares, ladder, examples = _ladder(request, measured)
    score, reserve = _reserve(request, examples, measured)
    space = _usable_space(request.space, list(usable), list(calibrations))
    plan = Plan(
        budget_seconds=request.budget_seconds,
        gpu=request.gpu,
        space=space,
        seed=request.seed,
        eta=request.eta,
        ladder=ladder,
        reference_rates=rates,
        micro_batches={name: c.micro_batch for name, c in usable.items()},
        overheads={
            name: examples * c.eval_seconds_per_example + c.checkpoint_seconds for name, c in usable.items()
        },
        checkpoint_seconds={name: c.checkpoint_seconds for name, c in usable.items()},
        load_seconds={name: c.load_seconds for name, c in usable.items()},
        max_tokens=max_tokens,
        batch_size=request.batch_size,
        step_tokens=step_tokens,
        eval_examples=examples,
        task_examples=request.task_examples,
        reserve_seconds=reserve,
        score_seconds=score,
        checkpoint_every_seconds=checkpoint_interval(request.budget_seconds),
        max_trials=Space.parse(space).size(request.max_trials * request.workers),
        limit_bytes=request.limit_bytes,
        gang_gains={name: gang_gains(c) for name, c in usable.items()},
        recompute={name: c.recompute for name, c in usable.items()},
        footprints={
            name: request.footprints[name].corrected(c.probes, c.rank)
            for name, c in usable.items()
            if name in request.footprints
        },
        largest_ranks={name: c.rank for name, c in usable.items() if c.rank},
        longest=request.longest,
        scouts=scouts_for(shares, _multiple(request, ladder[-1], measured)),
        workers=request.workers,
    )
    return plan if request.max_held is None else replace(plan, max_held=held_of(plan, request.max_held))


def gang_gains(calibration: Calibration) -> tuple[float, ...]:
    """How many times the rate of one alone 1, 2, ... members reach, up to the chosen size.

    Sizes between two probes are interpolated in the logarithm of the size.
    """
    known = {
        p.members: max(1.0, p.tokens_per_second / calibration.tokens_per_second)
        for p in calibration.probes
        if p.members > 1
    }
    gains = [1.0]
    for members in range(2, calibration.gang + 1):
        above = min(k for k in known if k >= members)
        below = max((k for k in known if k < members), default=1)
        share = math.log(members / below) / math.log(above / below)
        low = known.get(below, 1.0)
        gains.append(low + share * (known[above] - low))
    return tuple(gains)


def _check_minimum(request: PlanRequest, measured: _Measured) -> None:
    """Refuse a budget without room for one short training segment and the final scores."""
    few = min(MIN_EVAL_EXAMPLES, request.valid_rows)
    _, reserve = _reserve(replace(request, budget_seconds=0.0), few, measured)
    fixed = measured.spent + MINIMUM_STEPS * measured.step + few * measured.example + measured.write + reserve
    minimum = fixed / (1.0 - TASK_SHARE if request.task_examples else 1.0)
    if minimum > request.budget_seconds:
        raise BudgetError(
            f"A budget of {request.budget_seconds:.0f} s is too small here: loading, measuring, one short "
            f"training segment and the final evaluation need {minimum:.0f} s on this machine. "
            f"Use --hours {math.ceil(minimum * 1.1) / 3600:.3f} or more.",
            minimum,
        )


def _usable_space(space: Mapping[str, Any], usable: list[str], tried: list[str]) -> Mapping[str, Any]:
    """The space without the quantizations that the calibration found infeasible."""
    if usable == tried:
        return space
    return Space.parse(space).restrict("quantization", usable).to_dict()


def _ladder(request: PlanRequest, measured: _Measured) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """The longest ladder whose first rung is worth its evaluation: its shares, its seconds, and the
    evaluation's examples."""
    longest = min(request.full_share * request.budget_seconds, measured.data)
    for shares in ladders_for(_multiple(request, longest, measured), request.first_rung, request.eta):
        examples = _eval_examples(request, longest * shares[0], measured)
        full = _full_seconds(request, shares, examples, measured)
        if len(shares) == 1 and full < MINIMUM_STEPS * measured.step:
            examples = min(MIN_EVAL_EXAMPLES, request.valid_rows)
            full = _full_seconds(request, shares, examples, measured)
        first = full * shares[0]
        if first >= MIN_RUNG_STEPS * measured.step:
            break
    examples = min(examples, _eval_examples(request, first, measured))
    return shares, tuple(full * share for share in shares), examples


def _multiple(request: PlanRequest, full_seconds: float, measured: _Measured) -> float:
    """How many full runs the rest of the budget holds, on all workers together."""
    return request.workers * (request.budget_seconds - measured.spent) / max(full_seconds, 1e-9)


def _full_seconds(
    request: PlanRequest, shares: tuple[float, ...], examples: int, measured: _Measured
) -> float:
    """R: what the data hold, the share of the budget, or what a whole group leaves: the shortest.

    A group of trials (``eta``, or a few more) at the first rung, of which the best goes all the way, trains
    for (1 + (group - 1) * first share) * R, and its segments cost an overhead each. A full run longer
    than that would leave too few trials to choose from. Several workers share the group.
    """
    _, reserve = _reserve(request, examples, measured)
    free = request.budget_seconds - measured.spent - reserve
    longest = min(request.full_share * request.budget_seconds, measured.data)
    links = max(1.0, longest / checkpoint_interval(request.budget_seconds))
    group = math.ceil(max(request.eta, FEW_TRIALS) / request.workers) if len(shares) > 1 else 1
    evaluated = examples * measured.example + measured.write
    overhead = (group + len(shares) - 1) * evaluated + links * measured.write + FULL_EVAL_SHARE * longest
    work = 1.0 + (group - 1) * shares[0]
    return min(longest, max(0.0, free - overhead) / (work * PLANNING_MARGIN))


def _eval_examples(request: PlanRequest, first_rung_seconds: float, measured: _Measured) -> int:
    affordable = int(request.eval_share * max(0.0, first_rung_seconds) / max(measured.example, 1e-9))
    wanted = min(MAX_EVAL_EXAMPLES, max(MIN_EVAL_EXAMPLES, affordable))
    return min(wanted, request.valid_rows)


def calibration_job(
    request: PlanRequest, quantization: str, job_id: int, limit_seconds: float
) -> CalibrateJob | Calibration:
    """What to measure of a quantization, or what is foreseen to come of it: nothing fits."""
    ahead = foresee(
        request.footprints.get(quantization),
        request.limit_bytes,
        request.ranks,
        request.batch_size,
        request.longest,
    )
    if ahead.refusal:
        return Calibration(quantization, "out_of_memory", detail=ahead.refusal)
    return CalibrateJob(
        job_id=job_id,
        quantization=quantization,
        ranks=ahead.ranks,
        batch_size=request.batch_size,
        limit_seconds=limit_seconds,
        micro_batches=ahead.micro_batches,
        dropout=request.dropout,
        limit_bytes=request.limit_bytes,
        max_gang=request.max_gang,
        probe_seconds=probe_seconds(request.budget_seconds),
        task_examples=request.task_examples,
    )


def probe_seconds(budget_seconds: float) -> float:
    """How long each size of gang is timed in the calibration: one per mille of the budget, 1 to 20 s."""
    return max(1.0, min(20.0, 0.001 * budget_seconds))


def checkpoint_interval(budget_seconds: float) -> float:
    """Seconds of training between two checkpoints of a full run: what a crash may cost."""
    return max(60.0, 0.01 * budget_seconds)


def _reserve(request: PlanRequest, examples: int, measured: _Measured) -> tuple[float, float]:
    """(seconds for the final scores, the whole reserve)."""
    losses = measured.load + 2 * examples * measured.example * LOSS_FACTOR
    answers = answer_seconds(request.budget_seconds) if request.task_examples else 0.0
    if measured.answer:
        answers = min(answers, ANSWER_FACTOR * 2 * request.task_examples * measured.answer)
    score = losses + answers
    leave = max(EXIT_SECONDS, min(30.0, 0.005 * request.budget_seconds))
    return score, score + 2 * measured.write + leave


def answer_seconds(budget_seconds: float) -> float:
    """What answers for the accuracy may take."""
    return min(MAX_ANSWER_SECONDS, TASK_SHARE * budget_seconds)


def seconds_left(plan: Plan, now: float) -> float:
    """What may still be spent on the search and the full run: the rest is reserved."""
    return plan.budget_seconds - now - plan.reserve_seconds


def grace_seconds(plan: Plan, asked: float) -> float:
    """How long a job may take to checkpoint after it was told to stop: two optimizer steps at least."""
    return max(asked, 2 * plan.step_tokens / min(plan.reference_rates.values()))


def landing_seconds(plan: Plan | None, budget_seconds: float, grace: float, now: float) -> float:
    """How long what flies may take to checkpoint when the run is to stop: what export and exit need stays."""
    behind = plan.reserve_seconds - plan.score_seconds if plan else EXIT_SECONDS
    return max(0.0, min(grace, budget_seconds - now - behind))


def watchdog_patience(plan: Plan, grace: float, job: Job) -> float:
    """How long the watchdog waits after its word: never so long that the reserve is used up."""
    behind = plan.reserve_seconds - (plan.score_seconds if isinstance(job, ScoreJob) else 0.0)
    return min(grace, behind / 3)


def score_jobs(
    plan: Plan, best: TrialState, job_id: int, checkpoint: str = "", known: Score | None = None
) -> list[ScoreJob]:
    """The final scores of a trial's best checkpoint, still without their limits: the losses first; then, in a
    job of its own that may fail alone, answers while there is time, for nothing else can use it any more.
    ``checkpoint``: that folder. ``known``:
    what an earlier process measured of it; only what is missing is measured."""
    losses = ScoreJob(
        job_id=job_id,
        quantization=cost_class(best.trial.params),
        checkpoint=checkpoint or str(best.best_checkpoint),
        eval_examples=plan.eval_examples,
        task_examples=0,
        micro_batch=best.micro_batch,
        limit_seconds=0.0,
    )
    answers = replace(
        losses,
        job_id=job_id + 1,
        eval_examples=0,
        task_examples=plan.task_examples,
        further=True,
    )
    wanted = [] if known and known.status == "ok" else [losses]
    if plan.task_examples and not (known and known.task_examples):
        wanted.append(answers)
    return wanted


def new_trial(plan: Plan, trial_id: int, proposal: Proposal) -> Trial:
    """Freeze a configuration's rungs in tokens: the ladder's seconds at its reference rate."""
    name = cost_class(proposal.params)
    rate = plan.reference_rates[name]
    step = math.ceil(plan.step_tokens)
    longest = proposal.max_tokens or plan.max_tokens
    rungs = tuple(max(step, min(round(seconds * rate), longest)) for seconds in plan.ladder)
    if proposal.max_tokens:  # a rung is a share of the trial's own full run
        rungs = tuple(max(step, round(longest * seconds / plan.full_seconds)) for seconds in plan.ladder)
    return Trial(
        trial_id=trial_id,
        params=dict(proposal.params),
        seed=plan.seed + trial_id,
        rung_tokens=rungs,
        warmup_tokens=min(WARMUP_STEPS * step, rungs[0] // 3),
        batch_size=plan.batch_size,
        micro_batch=micro_batch(plan, proposal.params),
        max_tokens=longest,
        origin=proposal.origin,
    )
