"""The worker seconds of a run with several workers, in words and for the reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from budgetsearch.core.history.accounts import Accounts
from budgetsearch.core.history.history import History
from budgetsearch.views.card import device_of

MUCH_IDLE = 0.2
"""A larger share of the workers' time that nobody used is explained."""
LEAST_SECONDS = 1e-3
"""Less is what is left over from adding up."""


@dataclass(frozen=True)
class WorkerSeconds:
    """The account of a run's workers; with a GPU each, a worker second is a GPU second."""

    most_workers: int
    """As many as there were at any time."""
    worker_seconds: float
    """Workers times wall seconds. With one worker it is the wall time."""
    worker_seconds_by_phase: Mapping[str, float]
    """What the workers did with them, most first; ``idle`` is what nobody used."""
    search_idle_share: float | None
    """Of the workers' time from the first segment's beginning to the last one's end, what they waited, 0 to
    1; None before the first end."""
    search_idle_seconds: float = 0.0
    """The same in worker seconds."""


def worker_seconds_of(found: Accounts) -> WorkerSeconds:
    """The account of a run, finished or not."""
    parts = sorted(found.worker_seconds().items(), key=lambda one: -one[1])
    return WorkerSeconds(
        most_workers=found.most_workers,
        worker_seconds=found.total,
        worker_seconds_by_phase={phase: seconds for phase, seconds in parts if seconds > LEAST_SECONDS},
        search_idle_share=found.search_idle_share if found.search_total else None,
        search_idle_seconds=found.search_idle_share * found.search_total,
    )


def seconds_word(device: str) -> str:
    """Name of a worker's second."""
    return "worker seconds" if device == "cpu" else "GPU seconds"


def shares_text(found: WorkerSeconds) -> str:
    """``train 96.5%, evaluate 2.9%, ...``"""
    whole = found.worker_seconds or 1.0
    return ", ".join(f"{phase} {part / whole:.1%}" for phase, part in found.worker_seconds_by_phase.items())


def workers_line(found: WorkerSeconds, history: History) -> str:
    """The account in one line; empty for one worker, whose seconds are those of the wall. Where a run is over
    in which they waited much, it says why."""
    if found.most_workers == 1:
        return ""
    seconds = f"{found.worker_seconds:.0f} {seconds_word(device_of(history))}"
    line = f"workers  up to {found.most_workers}, {seconds}: {shares_text(found)}"
    idle = found.worker_seconds_by_phase.get("idle", 0.0)
    if history.closed is None or idle <= MUCH_IDLE * found.worker_seconds:
        return line
    return f"{line}; {idle / found.worker_seconds:.0%} waited: {_why_idle(found, idle, history)}"


def _why_idle(found: WorkerSeconds, idle: float, history: History) -> str:
    if found.search_idle_seconds < idle / 2:
        return "most of it while one prepared the run, measured the base or scored"
    plan = history.plan
    if plan is not None and len(history.trials) >= plan.max_trials:
        return f"all {plan.max_trials} configurations of --max-trials were tried, and fewer are promoted"
    return history.finish.reason if history.finish else history.closed.reason if history.closed else ""
