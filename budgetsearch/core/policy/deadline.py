"""Seconds until the deadline: how many are left, are kept back for the end, and who may use them."""

from __future__ import annotations

from budgetsearch.core.plan import Plan
from budgetsearch.core.records import Job, ScoreJob

TASK_SHARE = 0.06
"""Share of the budget that generating answers for the accuracy may take, ..."""
MAX_ANSWER_SECONDS = 600.0
"""... and this at most."""
ENDING = {
    "worker": 2.0,
    "loggers": 0.5,
    "study": 0.5,
    "reports": 1.0,
    "lines": 1.0,
    "exit": 1.0,
}
"""Steps that follow the last event of a run, in order, and the seconds that each is sure of: the worker's
process ends, loggers and the Optuna study take what waits, the reports are written, the last lines are
printed, the process exits. Whatever hangs is ended when "exit" begins. What scores and export need is
measured: it stands in the plan."""
EXIT_SECONDS = sum(ENDING.values())
"""All of them."""
CLOSING_SECONDS = 2.0
"""Loggers and the study may take so long, where the budget still has it."""


def answer_seconds(budget_seconds: float) -> float:
    """Seconds that answers for the accuracy may take."""
    return min(MAX_ANSWER_SECONDS, TASK_SHARE * budget_seconds)


def exit_seconds(budget_seconds: float) -> float:
    """Seconds kept for the end: 0.5% of the budget, 30 s at most, never less than ``ENDING``."""
    return max(EXIT_SECONDS, min(30.0, 0.005 * budget_seconds))


def seconds_left(plan: Plan, now: float) -> float:
    """Seconds that may still be spent on the search and the full run: the rest is reserved."""
    return plan.budget_seconds - now - plan.reserve_seconds


def seconds_behind(step: str) -> float:
    """Seconds that belong to the steps of the end that follow one."""
    steps = list(ENDING)
    return sum(ENDING[later] for later in steps[steps.index(step) + 1 :])


def closing_seconds(step: str, left: float) -> float:
    """Seconds that loggers or study may take of the ``left`` ones, so that what follows keeps its own."""
    return max(0.0, min(CLOSING_SECONDS, left - seconds_behind(step)))


def grace_seconds(plan: Plan, asked: float) -> float:
    """Seconds that a job may take to checkpoint after it was told to stop: two optimizer steps at least."""
    slowest = min(rate / plan.token_share(name) for name, rate in plan.reference_rates.items())
    return max(asked, 2 * plan.step_tokens / slowest)


def landing_seconds(plan: Plan | None, budget_seconds: float, grace: float, now: float) -> float:
    """Seconds to checkpoint for what flies when the run is to stop: what export and exit need stays."""
    behind = plan.reserve_seconds - plan.score_seconds if plan else EXIT_SECONDS
    return max(0.0, min(grace, budget_seconds - now - behind))


def watchdog_patience(plan: Plan, grace: float, job: Job) -> float:
    """Seconds that the watchdog waits after its word: never so long that the reserve is used up."""
    behind = plan.reserve_seconds - (plan.score_seconds if isinstance(job, ScoreJob) else 0.0)
    return min(grace, behind / 3)
