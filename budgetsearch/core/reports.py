"""What workers tell on the way, and when a job is over, as frozen, JSON-able dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from budgetsearch.core.records import Calibration, Score, SegmentResult


@dataclass(frozen=True)
class Beat:
    """A sign of life from a running job, every two seconds at most."""

    job_id: int
    trial_id: int | None
    activity: str
    tokens: int = 0
    loss: float | None = None
    used_bytes: int = 0
    """Memory in use now: of the card, by all processes; without a card of the worker process."""
    utilization: float | None = None
    """Share of the time that the card computed, 0 to 1; None where nobody can say."""
    watts: float | None = None
    celsius: float | None = None


@dataclass(frozen=True)
class Notice:
    """Something that the user should know of a running job, in a sentence."""

    job_id: int
    text: str


@dataclass(frozen=True)
class CardUse:
    """What the watcher saw of the card while a job ran; without a card, of the worker process."""

    samples: int
    peak_bytes: int
    """The most memory that was in use, by all processes together."""
    others_bytes: int = 0
    """The most that other processes held."""
    utilization: float | None = None
    """Mean share of the time that the card computed, 0 to 1."""
    joules: float | None = None
    """Energy of the whole card."""
    celsius: float | None = None
    """The hottest sample."""
    throttled: Mapping[str, float] = field(default_factory=dict)
    """By reason: share of the samples in which the card was slowed down."""


@dataclass(frozen=True)
class JobEnded:
    """The job is over; the engine has a free slot again."""

    job_id: int
    results: tuple[SegmentResult | Calibration | Score, ...]
    use: CardUse | None = None


Report = Beat | Notice | JobEnded
