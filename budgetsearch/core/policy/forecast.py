"""Forecast of what the rest of the search will take, in seconds, and whether another trial fits into it."""

from __future__ import annotations

from budgetsearch.core.ladders import FEW_TRIALS
from budgetsearch.core.policy.answers import Refusal
from budgetsearch.core.policy.costs import PESSIMISM
from budgetsearch.core.policy.full_run import full_run_seconds
from budgetsearch.core.policy.situation import Situation

FEW_SHARE = 0.5
"""Of a full run: what another trial may cost while there are few."""


def no_room(situation: Situation) -> Refusal | None:
    """Why no further trial may enter; None if there is the time for its rungs and its full run one after the
    other, and for what everybody together still has to do."""
    if situation.several and (way := _way_seconds(situation)) > situation.left:
        return Refusal("another trial with its full run", way, situation.left)
    search = _search_seconds(situation)
    if search <= situation.work_left:
        return None
    workers = ", on all workers together," if situation.several else ""
    return Refusal(f"another trial and all that is due behind it{workers}", search, situation.work_left)


def no_other_full_run(situation: Situation) -> Refusal | None:
    """Why nobody else runs in full; None where another full run would fit."""
    needed = full_run_seconds(situation) * PESSIMISM
    return Refusal("another full run", needed, situation.left) if needed > situation.left else None


def second_full_run_fits(situation: Situation) -> bool:
    """Another full run fits behind one that would start now, with a group to choose from."""
    if situation.several and _way_seconds(situation) > situation.left:
        return False
    group = situation.plan.eta * situation.costs.typical_seconds(situation.plan.ladder[situation.entry])
    return 2 * full_run_seconds(situation) + group <= situation.work_left


def fitting_trials(situation: Situation) -> float:
    """Trials that surely have the time to start; one at the least, and not only whole ones."""
    first = situation.plan.ladder[situation.entry]
    each = situation.costs.typical_seconds(first, ganged=True) * situation.costs.margin
    return 1 + max(0.0, situation.work_left - _search_seconds(situation)) / max(each, 1e-9)


def _way_seconds(situation: Situation) -> float:
    """Seconds from a trial's beginning to the end of its full run if it never waits."""
    plan, entry, costs = situation.plan, situation.entry, situation.costs
    steps = [plan.ladder[entry]]
    steps += [plan.ladder[k] - plan.ladder[k - 1] for k in range(entry + 1, plan.top_rung)]
    rungs = sum(map(costs.typical_seconds, steps)) + max(plan.load_seconds.values(), default=0.0)
    return rungs * costs.margin + _full_share(situation) * full_run_seconds(situation)


def _search_seconds(situation: Situation) -> float:
    """Seconds until every promotion is done and has run in full, if one more trial enters."""
    ladder, rungs, costs = situation.plan.ladder, situation.rungs, situation.costs
    top, least = situation.plan.top_rung, situation.wanted_finalists
    entering = rungs.entered(situation.entry) + 1
    total = costs.typical_seconds(ladder[situation.entry], ganged=True)
    for rung in range(situation.entry + 1, top):
        already = rungs.sent(rung)
        entering = max(already, rungs.groups(entering), least)
        total += (entering - already) * costs.typical_seconds(ladder[rung] - ladder[rung - 1])
    already = rungs.entered(top)
    full = max(already, rungs.groups(entering), least) - already
    return total * costs.margin + full * _full_share(situation) * full_run_seconds(situation)


def _full_share(situation: Situation) -> float:
    return FEW_SHARE if situation.rungs.entered(0) < FEW_TRIALS else 1.0
