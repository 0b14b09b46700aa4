"""The arithmetic of the budget: what is planned, what is left, what is kept back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from budgetsearch.core.errors import BudgetError
from budgetsearch.core.ports import Proposal
from budgetsearch.core.records import Calibration, Plan, Trial
from budgetsearch.core.space import Space

MIN_RUNG_STEPS = 4
"""A rung shorter than this ranks nothing; the ladder loses a rung instead."""
WARMUP_STEPS = 20
MIN_EVAL_EXAMPLES = 8
MAX_EVAL_EXAMPLES = 512
TASK_SHARE = 0.06
"""Share of the budget that generating answers for the accuracy may take, 600 s at most."""
EXIT_SECONDS = 4.0
"""Report, study and process exit; the larger of this and 1% of the budget (60 s at most)."""
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
    first_rung: float
    """The first rung as a share of the full run."""
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


def make_plan(request: PlanRequest, calibrations: Mapping[str, Calibration], now: float) -> Plan:
    """The plan, from what the calibrations measured; ``now`` is what they have already cost.

    Raises:
        BudgetError: the budget is below the measured minimum.
    """
    usable = {name: c for name, c in calibrations.items() if c.status == "ok"}
    rates = {name: c.tokens_per_second for name, c in usable.items()}
    step_tokens = request.batch_size * request.train_tokens / request.train_rows
    step_seconds = step_tokens / min(rates.values())
    eval_cost = max(c.eval_seconds_per_example for c in usable.values())
    write = max(c.checkpoint_seconds for c in usable.values())
    max_tokens = int(request.max_epochs * request.train_tokens)

    ladder, examples = _ladder(request, step_seconds, max_tokens / max(rates.values()), eval_cost, write, now)
    score, reserve = _reserve(request, examples, eval_cost, write)
    minimum = now + 2 * MIN_RUNG_STEPS * step_seconds + examples * eval_cost + write + reserve
    if minimum > request.budget_seconds:
        raise BudgetError(
            f"A budget of {request.budget_seconds:.0f} s is too small here: loading, measuring, one short "
            f"training segment and the final evaluation need {minimum:.0f} s on this machine. "
            f"Use --hours {math.ceil(minimum * 1.1) / 3600:.3f} or more.",
            minimum,
        )
    return Plan(
        budget_seconds=request.budget_seconds,
        gpu=request.gpu,
        space=_usable_space(request.space, list(usable), list(calibrations)),
        seed=request.seed,
        eta=request.eta,
        ladder=ladder,
        reference_rates=rates,
        micro_batches={name: c.micro_batch for name, c in usable.items()},
        overheads={
            name: examples * c.eval_seconds_per_example + c.checkpoint_seconds for name, c in usable.items()
        },
        max_tokens=max_tokens,
        batch_size=request.batch_size,
        step_tokens=step_tokens,
        eval_examples=examples,
        task_examples=request.task_examples,
        reserve_seconds=reserve,
        score_seconds=score,
        checkpoint_every_seconds=checkpoint_interval(request.budget_seconds),
        max_trials=request.max_trials,
        limit_bytes=request.limit_bytes,
    )


def _usable_space(space: Mapping[str, Any], usable: list[str], tried: list[str]) -> Mapping[str, Any]:
    """The space without the quantizations that the calibration found infeasible."""
    if usable == tried:
        return space
    return Space.parse(space).restrict("quantization", usable).to_dict()


def _ladder(
    request: PlanRequest, step_seconds: float, data_seconds: float, eval_cost: float, write: float, now: float
) -> tuple[tuple[float, ...], int]:
    """The longest ladder whose first rung is worth its evaluation, and the evaluation's examples."""
    levels = max(0, round(math.log(1 / request.first_rung, request.eta)))
    while True:
        full = min(request.full_share * request.budget_seconds, data_seconds)
        examples = _eval_examples(request, full * request.eta**-levels, eval_cost)
        _, reserve = _reserve(request, examples, eval_cost, write)
        free = request.budget_seconds - now - reserve
        links = max(1.0, full / checkpoint_interval(request.budget_seconds))
        full = min(full, _longest_full_run(free, request.eta, levels, links, examples * eval_cost + write))
        first = full * request.eta**-levels
        if levels == 0 or first >= MIN_RUNG_STEPS * step_seconds:
            ladder = tuple(full * request.eta ** (k - levels) for k in range(levels + 1))
            return ladder, _eval_examples(request, first, eval_cost)
        levels -= 1


def _eval_examples(request: PlanRequest, first_rung_seconds: float, eval_cost: float) -> int:
    affordable = int(request.eval_share * max(0.0, first_rung_seconds) / max(eval_cost, 1e-9))
    wanted = min(MAX_EVAL_EXAMPLES, max(MIN_EVAL_EXAMPLES, affordable))
    return min(wanted, request.valid_rows)


def checkpoint_interval(budget_seconds: float) -> float:
    """Seconds of training between two checkpoints of a full run: what a crash may cost."""
    return max(60.0, 0.01 * budget_seconds)


def _longest_full_run(free: float, eta: int, levels: int, links: float, overhead: float) -> float:
    """R for which a bracket of ``eta ** levels`` trials, its promotions and one full run fit.

    With rungs at R / eta^levels ... R such a bracket trains for (1 + levels * (1 - 1/eta)) * R, and
    its segments cost an overhead each. A full run longer than this would leave too few trials to
    choose from.
    """
    segments = sum(eta**k for k in range(1, levels + 1)) + links
    work = 1.0 + levels * (1.0 - 1.0 / eta)
    return max(0.0, free - segments * overhead) / (work * 1.1)


def _reserve(request: PlanRequest, examples: int, eval_cost: float, write: float) -> tuple[float, float]:
    """(seconds for the final scores, the whole reserve)."""
    losses = 2 * examples * eval_cost * LOSS_FACTOR
    answers = min(600.0, TASK_SHARE * request.budget_seconds) if request.task_examples else 0.0
    score = losses + answers
    leave = max(EXIT_SECONDS, min(60.0, 0.01 * request.budget_seconds))
    return score, score + 2 * write + leave


def seconds_left(plan: Plan, now: float) -> float:
    """What may still be spent on the search and the full run: the rest is reserved."""
    return plan.budget_seconds - now - plan.reserve_seconds


def new_trial(plan: Plan, trial_id: int, proposal: Proposal) -> Trial:
    """Freeze a configuration's rungs in tokens: the ladder's seconds at its reference rate."""
    name = str(proposal.params["quantization"])
    rate = plan.reference_rates[name]
    step = math.ceil(plan.step_tokens)
    rungs = tuple(max(step, min(round(seconds * rate), plan.max_tokens)) for seconds in plan.ladder)
    return Trial(
        trial_id=trial_id,
        params=dict(proposal.params),
        seed=plan.seed + trial_id,
        rung_tokens=rungs,
        warmup_tokens=min(WARMUP_STEPS * step, rungs[0] // 3),
        batch_size=plan.batch_size,
        micro_batch=plan.micro_batches[name],
        origin=proposal.origin,
    )
