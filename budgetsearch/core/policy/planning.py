"""The plan of a run: from what was asked for and what was measured to the ladder and the reserve."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from budgetsearch.core.errors import BudgetError
from budgetsearch.core.footprint import Footprint
from budgetsearch.core.ladders import FEW_TRIALS, ladders_for, scouts_for
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.costs import PLANNING_MARGIN
from budgetsearch.core.policy.deadline import TASK_SHARE, answer_seconds, exit_seconds
from budgetsearch.core.records import Calibration
from budgetsearch.core.resources.disk import held_of
from budgetsearch.core.space.space import Space

MIN_RUNG_STEPS = 4
"""A rung shorter than this ranks nothing; the ladder loses a rung instead."""
MINIMUM_STEPS = 2 * MIN_RUNG_STEPS
"""A budget without room for so many steps is refused."""
MIN_EVAL_EXAMPLES = 16
MAX_EVAL_EXAMPLES = 512
ANSWER_FACTOR = 1.2
"""Answers by base and adapter may take so much longer than the calibration's by the bare base, which were of
full length; those that do not fit are left out of the accuracy."""
FULL_EVAL_SHARE = 0.03
"""Evaluations in the middle of a full run take so much of its training's time at most."""
LOSS_FACTOR = 1.5
"""Evaluations in the reserve may take so much longer than the calibration's."""


@dataclass(frozen=True)
class PlanRequest:
    """Facts from the user and the data, before anything was measured."""

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

    @property
    def step_tokens(self) -> float:
        """Mean tokens of one optimizer step."""
        return self.batch_size * self.train_tokens / self.train_rows

    @property
    def max_tokens(self) -> int:
        """``max_epochs`` over the training data."""
        return int(self.max_epochs * self.train_tokens)


@dataclass(frozen=True)
class _Measured:
    """The calibrations' word on the slowest quantization; seconds throughout."""

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

    @classmethod
    def of(cls, request: PlanRequest, usable: Collection[Calibration], spent: float) -> _Measured:
        """The worst that any usable quantization needs; of the data's time the least."""
        rates = [c.tokens_per_second for c in usable]
        return cls(
            step=request.step_tokens / min(rates),
            data=request.max_tokens / max(rates),
            example=max(c.eval_seconds_per_example for c in usable),
            write=max(c.checkpoint_seconds for c in usable),
            load=max(c.load_seconds for c in usable),
            answer=max(c.answer_seconds for c in usable),
            spent=spent,
        )


def make_plan(request: PlanRequest, calibrations: Mapping[str, Calibration], now: float) -> Plan:
    """The plan, from what the calibrations measured; ``now`` is what they have already cost.

    Raises:
        BudgetError: the budget is below the measured minimum.
    """
    usable = {name: c for name, c in calibrations.items() if c.status == "ok"}
    measured = _Measured.of(request, usable.values(), now)
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
        reference_rates={name: c.tokens_per_second for name, c in usable.items()},
        micro_batches={name: c.micro_batch for name, c in usable.items()},
        overheads={
            name: examples * c.eval_seconds_per_example + c.checkpoint_seconds for name, c in usable.items()
        },
        checkpoint_seconds={name: c.checkpoint_seconds for name, c in usable.items()},
        load_seconds={name: c.load_seconds for name, c in usable.items()},
        max_tokens=request.max_tokens,
        batch_size=request.batch_size,
        step_tokens=request.step_tokens,
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
    """Gains: how many times the rate of one alone 1, 2, ... members reach, up to the chosen size.

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


def checkpoint_interval(budget_seconds: float) -> float:
    """Seconds of training between two checkpoints of a full run: what a crash may cost."""
    return max(60.0, 0.01 * budget_seconds)


def _multiple(request: PlanRequest, full_seconds: float, measured: _Measured) -> float:
    """Full runs that the rest of the budget holds, on all workers together."""
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


def _reserve(request: PlanRequest, examples: int, measured: _Measured) -> tuple[float, float]:
    """(seconds for the final scores, the whole reserve)."""
    losses = measured.load + 2 * examples * measured.example * LOSS_FACTOR
    answers = answer_seconds(request.budget_seconds) if request.task_examples else 0.0
    if measured.answer:
        answers = min(answers, ANSWER_FACTOR * 2 * request.task_examples * measured.answer)
    score = losses + answers
    return score, score + 2 * measured.write + exit_seconds(request.budget_seconds)
