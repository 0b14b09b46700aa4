"""From which hours on a run compares configurations, and from which on more hours change nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from budgetsearch.core.errors import BudgetError
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.costs import PLANNING_MARGIN
from budgetsearch.core.policy.planning import make_plan
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.records import Calibration
from budgetsearch.run.foresight import measuring_seconds
from budgetsearch.tools.plan.rehearsal import Rehearsal

GROWTH = 1.1
"""From one budget that is looked at to the next."""
PLAYS = 40
"""Budgets that are played to find the first search: 45 times the first one."""
SPAN = 100
"""Budgets between the given one divided and multiplied by this are looked at."""


def search_from(request: PlanRequest, first: Rehearsal, play: Callable[[PlanRequest], Rehearsal]) -> float:
    """Seconds from which on more than one configuration is tried; ``first``: what the given ones come to."""
    seconds, found = request.budget_seconds, first
    for _ in range(PLAYS):
        if found.trials[0] > 1 or request.max_trials == 1:
            break
        seconds *= GROWTH
        found = play(replace(request, budget_seconds=seconds))
    return seconds


def enough_from(request: PlanRequest, found: Mapping[str, Calibration], setup_seconds: float) -> float | None:
    """Seconds in which ``max_trials`` configurations are tried and the best has seen the data ``max_epochs``
    times; None where these are far from the given ones."""
    usable = {name: c for name, c in found.items() if c.status == "ok"}
    data = request.max_tokens / max(c.tokens_per_second for c in usable.values())
    seconds = request.budget_seconds / SPAN
    while seconds <= SPAN * request.budget_seconds:
        now = replace(request, budget_seconds=seconds)
        spent = setup_seconds + sum(measuring_seconds(c, now, seconds) for c in usable.values())
        try:
            plan = make_plan(now, usable, spent)
        except BudgetError:
            plan = None
        if plan and plan.full_seconds >= 0.99 * data and spent + _whole_seconds(plan) <= seconds:
            return seconds
        seconds *= GROWTH
    return None


def trials_in(plan: Plan, spent: float) -> int:
    """About how many configurations are tried where ``spent`` seconds are gone when the search begins: up to
    a sixth fewer than playing the policy comes to, and of less than ten up to two fewer."""
    if plan.single:
        return 1
    low, high = 1, plan.max_trials
    while low < high:
        middle = (low + high + 1) // 2
        fits = spent + _whole_seconds(replace(plan, max_trials=middle)) <= plan.budget_seconds
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _whole_seconds(plan: Plan) -> float:
    """All trials, one in ``eta`` of each rung at the next, at least one at each; and the reserve."""
    overhead = sum(plan.overheads.values()) / len(plan.overheads)
    before, trials, total = 0.0, float(plan.max_trials), 0.0
    for seconds in plan.ladder:
        total += max(1.0, trials) * (seconds - before + overhead)
        before, trials = seconds, trials / plan.eta
    return PLANNING_MARGIN * total + plan.reserve_seconds
