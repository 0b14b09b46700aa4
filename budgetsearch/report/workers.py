"""What the seconds of all workers together were: the hours are wall time, a bill is often GPU time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from budgetsearch.accounts import account
from budgetsearch.core.events import Entry

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


def worker_seconds_of(entries: Iterable[Entry]) -> WorkerSeconds:
    """The account of a run, finished or not."""
    found = account(entries)
    parts = sorted(found.worker_seconds().items(), key=lambda one: -one[1])
    return WorkerSeconds(
        most_workers=found.most_workers,
        worker_seconds=found.total,
        worker_seconds_by_phase={phase: seconds for phase, seconds in parts if seconds > LEAST_SECONDS},
        search_idle_share=found.search_idle_share if found.search_total else None,
    )


def seconds_word(device: str) -> str:
    """What a worker's second is called."""
    return "worker seconds" if device == "cpu" else "GPU seconds"


def shares_text(found: WorkerSeconds) -> str:
    """``train 96.5%, evaluate 2.9%, ...``"""
    whole = found.worker_seconds or 1.0
    return ", ".join(f"{phase} {part / whole:.1%}" for phase, part in found.worker_seconds_by_phase.items())


def workers_line(found: WorkerSeconds, device: str) -> str:
    """The account in one line; empty for one worker, whose seconds are those of the wall."""
    if found.most_workers == 1:
        return ""
    return (
        f"workers  up to {found.most_workers}, {found.worker_seconds:.0f} {seconds_word(device)}: "
        f"{shares_text(found)}"
    )
