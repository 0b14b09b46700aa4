"""The plan of a run: from what was asked for and what was measured to the ladder and the reserve."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from budgetsearch.core.bases import cost_class
from budgetsearch.core.ladders import FEW_TRIALS, ladders_for, scouts_for
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.costs import PESSIMISM, PLANNING_MARGIN
from budgetsearch.core.policy.deadline import TASK_SHARE, answer_seconds, exit_seconds
from budgetsearch.core.policy.metric_plan import FINALS_SHARE, GRADE_SHARE, metric_answers
from budgetsearch.core.policy.minimum import too_small
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.policy.usable import usable_space
from budgetsearch.core.records import Calibration
from budgetsearch.core.resources.disk import held_of
from budgetsearch.core.resources.memory import gang_micro_batches
from budgetsearch.core.space.space import Space

MIN_RUNG_STEPS = 4
"""A rung shorter than this ranks nothing; the ladder loses a rung instead."""
MINIMUM_STEPS = 2 * MIN_RUNG_STEPS
"""A budget without room for so many steps is too small for a search."""
SINGLE_EXAMPLES = (16, 8, 4)
"""One configuration alone is evaluated on the most of these examples that leave it ``MIN_RUNG_STEPS``."""
SINGLE = "too little time for a search: one configuration was trained"
"""What a run says of itself then."""
MIN_EVAL_EXAMPLES = 16
MAX_EVAL_EXAMPLES = 512
ANSWER_FACTOR = 1.2
"""Answers by base and adapter may take so much longer than the calibration's by the bare base, which were of
full length; those that do not fit are left out of the accuracy."""
FULL_EVAL_SHARE = 0.03
"""Evaluations in the middle of a full run take so much of its training's time at most."""
FULL_LINKS = 12
"""A full run need not have more of them because evaluations are cheap."""
LOSS_FACTOR = 1.5
"""Evaluations in the reserve may take so much longer than the calibration's."""


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
    questions: int
    """That the metric can ask."""
    spent: float
    """What the run has already cost."""

    @classmethod
    def of(cls, request: PlanRequest, usable: Collection[Calibration], spent: float) -> _Measured:
        """The worst that any usable quantization needs; of the data's time the least."""
        rates = [request.rate(c) for c in usable]
        return cls(
            step=request.step_tokens / min(rates),
            data=request.max_tokens / max(rates),
            example=max(c.eval_seconds_per_example for c in usable),
            write=max(c.checkpoint_seconds for c in usable),
            load=max(c.load_seconds for c in usable),
            answer=max(c.answer_seconds for c in usable),
            questions=max(c.documents for c in usable) or request.valid_rows,
            spent=spent,
        )


@dataclass(frozen=True)
class _Layout:
    """What the budget is divided into."""

    ladder: tuple[float, ...]
    """Seconds of training at each rung."""
    examples: int
    """Of an evaluation."""
    score: float
    """Seconds of the final scores."""
    reserve: float
    """Seconds of all that is kept for the end."""
    scouts: int = 0
    single: bool = False


def make_plan(request: PlanRequest, calibrations: Mapping[str, Calibration], now: float) -> Plan:
    """The plan, from what the calibrations measured; ``now`` is what they have already cost. Where the rest
    is too little for a search it is one configuration.

    Raises:
        BudgetError: the budget is below the measured minimum.
    """
    usable = {name: c for name, c in calibrations.items() if c.status == "ok"}
    measured = _Measured.of(request, usable.values(), now)
    layout = _search(request, measured)
    if layout is None:
        usable = _likeliest(request, usable)
        request = replace(request, task_examples=0, max_trials=1, workers=1)
        layout = _single(request, _Measured.of(request, usable.values(), now))
    space = usable_space(request.space, list(usable), list(calibrations))
    plan = Plan(
        budget_seconds=request.budget_seconds,
        gpu=request.gpu,
        space=space,
        seed=request.seed,
        eta=request.eta,
        ladder=layout.ladder,
        max_tokens=request.max_tokens,
        batch_size=request.batch_size,
        step_tokens=request.step_tokens,
        eval_examples=layout.examples,
        task_examples=request.task_examples,
        reserve_seconds=layout.reserve,
        score_seconds=layout.score,
        checkpoint_every_seconds=_link_seconds(request, layout, measured),
        max_trials=Space.parse(space).size(request.max_trials * request.workers),
        limit_bytes=request.limit_bytes,
        longest=request.longest,
        scouts=layout.scouts,
        workers=request.workers,
        single=layout.single,
        whole=request.whole,
        metric=request.metric,
        metric_answers=_metric_answers(request, layout, measured),
        token_shares=request.token_shares,
        length_shares=request.length_shares,
        epoch_tokens=request.train_tokens if "epochs" in Space.parse(space).named else 0,
        **_by_class(request, usable, layout.examples),
    )
    return plan if request.max_held is None else replace(plan, max_held=held_of(plan, request.max_held))


def _by_class(request: PlanRequest, usable: Mapping[str, Calibration], examples: int) -> dict[str, Any]:
    """Those fields of a plan that have a value for each quantization."""
    each = usable.items()
    return {
        "reference_rates": {name: c.tokens_per_second for name, c in each},
        "micro_batches": {name: c.micro_batch for name, c in each},
        "overheads": {name: examples * c.eval_seconds_per_example + c.checkpoint_seconds for name, c in each},
        "checkpoint_seconds": {name: c.checkpoint_seconds for name, c in each},
        "load_seconds": {name: c.load_seconds for name, c in each},
        "gang_gains": {name: gang_gains(c) for name, c in each},
        "gang_micro_batches": {name: sizes for name, c in each if (sizes := gang_micro_batches(c))},
        "recompute": {name: c.recompute for name, c in each},
        "footprints": {
            name: request.footprints[name].corrected(c.probes, c.rank)
            for name, c in each
            if name in request.footprints
        },
        "largest_ranks": {name: c.rank for name, c in each if c.rank},
        "answer_seconds": {name: c.answer_seconds for name, c in each} if request.metric else {},
    }


def minimum_seconds(request: PlanRequest, calibrations: Mapping[str, Calibration], now: float) -> float:
    """The least budget with which a run ends with an adapter, if the ``calibrations`` cost ``now``."""
    usable = {name: c for name, c in calibrations.items() if c.status == "ok"}
    one = _Measured.of(request, _likeliest(request, usable).values(), now)
    return _single_seconds(request, _single_examples(request)[-1], one)


def another_pays(
    request: PlanRequest, known: Mapping[str, Calibration], now: float, calibration_seconds: float
) -> bool:
    """A further quantization is worth measuring: as far as is known there is time to compare something, and
    if it takes as long as the last one, time for something is left."""
    usable = {name: c for name, c in known.items() if c.status == "ok"}
    if not usable:
        return True
    search = _search_seconds(request, _Measured.of(request, usable.values(), now))
    least = minimum_seconds(request, usable, now + calibration_seconds)
    return max(search, least) <= request.budget_seconds


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


def _search_seconds(request: PlanRequest, measured: _Measured) -> float:
    """The least budget of a search: room for one short training segment and the final scores."""
    few = min(MIN_EVAL_EXAMPLES, request.valid_rows)
    _, reserve = _reserve(replace(request, budget_seconds=0.0), few, measured)
    fixed = measured.spent + MINIMUM_STEPS * measured.step + few * measured.example + measured.write + reserve
    return fixed / (1.0 - TASK_SHARE if request.task_examples else 1.0)


def _search(request: PlanRequest, measured: _Measured) -> _Layout | None:
    """Rungs to compare configurations at; None where the budget is too small, or the policy would find too
    little left to start anything."""
    if _search_seconds(request, measured) > request.budget_seconds:
        return None
    shares, ladder, examples = _ladder(request, measured)
    score, reserve = _reserve(request, examples, measured)
    evaluated = examples * measured.example + measured.write
    first = ladder[0] + evaluated
    if len(ladder) == 1:  # of a full run one step, and two and another evaluation in case it is stopped
        first = (3.0 + FULL_EVAL_SHARE) * measured.step + 2 * evaluated
    if measured.spent + measured.load + PESSIMISM * first + reserve > request.budget_seconds:
        return None
    scouts = scouts_for(shares, _multiple(request, ladder[-1], measured))
    return _Layout(ladder, examples, score, reserve, scouts)


def _single(request: PlanRequest, measured: _Measured) -> _Layout:
    """One configuration that gets all the time there is: first a few steps, so that there is an adapter.

    Raises:
        BudgetError: that is not enough for a handful of steps, an evaluation and the export.
    """
    needs = {count: _single_seconds(request, count, measured) for count in _single_examples(request)}
    affordable = [count for count, seconds in needs.items() if seconds <= request.budget_seconds]
    if not affordable:
        raise too_small(request.budget_seconds, min(needs.values()))
    examples = affordable[0]
    free = request.budget_seconds - needs[examples]
    first = MIN_RUNG_STEPS * measured.step
    full = max(first, min(measured.data, first + free / PLANNING_MARGIN))
    score, reserve = _single_reserve(request, examples, measured)
    return _Layout((first, full), examples, score, reserve, single=True)


def _likeliest(request: PlanRequest, usable: Mapping[str, Calibration]) -> dict[str, Calibration]:
    """The quantization at the centre of the prior, or the first where that one is of no use."""
    space = Space.parse(request.space)
    wanted = cost_class(space.default(), space.free)
    name = wanted if wanted in usable else next(iter(usable))
    return {name: usable[name]}


def _single_examples(request: PlanRequest) -> list[int]:
    return [min(count, request.valid_rows) for count in SINGLE_EXAMPLES]


def _single_seconds(request: PlanRequest, examples: int, measured: _Measured) -> float:
    """The least budget for one configuration."""
    steps = MIN_RUNG_STEPS * measured.step
    evaluated = examples * measured.example + 2 * measured.write  # the adapter is written too
    _, reserve = _single_reserve(request, examples, measured)
    return measured.spent + measured.load + PESSIMISM * (steps + evaluated) + reserve


def _single_reserve(request: PlanRequest, examples: int, measured: _Measured) -> tuple[float, float]:
    """As ``_reserve``: the losses, and no answers; the base is loaded already."""
    score = 2 * LOSS_FACTOR * (examples * measured.example + measured.write)
    return score, score + 2 * measured.write + exit_seconds(request.budget_seconds)


def _ladder(request: PlanRequest, measured: _Measured) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """The longest ladder whose first rung is worth its evaluation: its shares, its seconds, and the
    evaluation's examples."""
    longest = min(request.full_share * request.budget_seconds, measured.data)
    multiple = _multiple(request, longest, measured)
    for shares in ladders_for(multiple, request.first_rung, request.eta, request.own_lengths):
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


def checkpoint_interval(budget_seconds: float, whole: bool = False) -> float:
    """Seconds of training between two checkpoints of a full run: what a crash may cost."""
    return budget_seconds if whole else max(60.0, 0.01 * budget_seconds)


def _link_seconds(request: PlanRequest, layout: _Layout, measured: _Measured) -> float:
    """Seconds of training in a link of the full run. Where evaluations are cheap even a short one is looked
    at several times on its way: its best checkpoint may not be its last."""
    usual = checkpoint_interval(request.budget_seconds, request.whole)
    evaluated = (layout.examples * measured.example + measured.write) / FULL_EVAL_SHARE
    return usual if request.whole else min(usual, max(layout.ladder[-1] / FULL_LINKS, evaluated))


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
    links = max(1.0, longest / checkpoint_interval(request.budget_seconds, request.whole))
    group = math.ceil(max(request.eta, FEW_TRIALS) / request.workers) if len(shares) > 1 else 1
    evaluated = examples * measured.example + measured.write
    overhead = (group + len(shares) - 1) * evaluated + links * measured.write + FULL_EVAL_SHARE * longest
    work = (1.0 + (group - 1) * shares[0]) * PLANNING_MARGIN
    work += FINALS_SHARE + GRADE_SHARE if request.metric else 0.0
    return min(longest, max(0.0, free - overhead) / work)


def _metric_answers(request: PlanRequest, layout: _Layout, measured: _Measured) -> int:
    if request.metric is None or layout.single:
        return 0
    return metric_answers(measured.questions, layout.ladder[-1], measured.answer)


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
