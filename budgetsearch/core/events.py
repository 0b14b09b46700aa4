"""What the ledger records: every event of a run, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from budgetsearch.core.decisions import Decision
from budgetsearch.core.plan import Plan, Trial
from budgetsearch.core.records import Calibration, Phase, Score, Segment, SegmentResult
from budgetsearch.core.reports import Beat, CardUse


@dataclass(frozen=True)
class Opened:
    """The run exists. ``settings`` are complete, defaults included."""

    budget_seconds: float
    settings: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Measured at the start: data statistics, model, versions, machine."""


@dataclass(frozen=True)
class Resumed:
    """The run goes on in a new process."""


@dataclass(frozen=True)
class Rescheduled:
    """The run may take so long from now on: it was resumed with another deadline."""

    budget_seconds: float


@dataclass(frozen=True)
class Calibrated:
    calibration: Calibration


@dataclass(frozen=True)
class Planned:
    plan: Plan


@dataclass(frozen=True)
class WorkersChanged:
    """So many jobs can run at once from now on: a node went away, or one came (back)."""

    workers: int


@dataclass(frozen=True)
class TrialAdded:
    trial: Trial


@dataclass(frozen=True)
class Asked:
    """A person's word on a trial, given while the run went; a configuration to try is a ``TrialAdded``."""

    action: Literal["drop", "promote"]
    trial_id: int


@dataclass(frozen=True)
class Decided:
    """A decision with all that it depended on beside the ledger before it."""

    now: float
    free_slots: int
    decision: Decision


@dataclass(frozen=True)
class SegmentStarted:
    job_id: int
    segment: Segment


@dataclass(frozen=True)
class Heartbeat:
    beat: Beat


@dataclass(frozen=True)
class Noticed:
    """What the user should know: memory that another process took, a card that was slowed down."""

    text: str


@dataclass(frozen=True)
class CardWatched:
    """What a job did to the card."""

    job_id: int
    use: CardUse


@dataclass(frozen=True)
class SegmentEnded:
    job_id: int
    result: SegmentResult


@dataclass(frozen=True)
class CheckpointLost:
    """A checkpoint that was on disk is missing or damaged; found outside a segment that starts from it (there
    the segment's result says so)."""

    checkpoint: str
    detail: str
    exported: bool = False
    """Whether the adapter that was exported from it is no good either."""


@dataclass(frozen=True)
class Charged:
    """Seconds of the budget that are gone, and for what. Every second is charged exactly once."""

    phase: Phase
    seconds: float
    trial_id: int | None = None


@dataclass(frozen=True)
class Scored:
    """``checkpoint`` of trial ``trial_id`` against the base."""

    score: Score
    trial_id: int
    checkpoint: str


@dataclass(frozen=True)
class Exported:
    """An adapter stands on disk. ``final`` is False for an incumbent that may still be replaced."""

    trial_id: int
    checkpoint: str
    path: str
    final: bool


@dataclass(frozen=True)
class Closed:
    """The process stops; ``state`` says whether the run is over."""

    state: Literal["finished", "interrupted", "failed"]
    reason: str
    signal: str = ""
    """The signal that asked for it, such as SIGTERM."""


Event = (
    Opened
    | Resumed
    | Rescheduled
    | Calibrated
    | Planned
    | WorkersChanged
    | TrialAdded
    | Asked
    | Decided
    | SegmentStarted
    | Heartbeat
    | Noticed
    | CardWatched
    | SegmentEnded
    | CheckpointLost
    | Charged
    | Scored
    | Exported
    | Closed
)


@dataclass(frozen=True)
class Entry:
    """An event as the ledger holds it."""

    seq: int
    at: float
    """Active seconds of the run, over all its processes."""
    wall: float
    """Seconds since the epoch, for people; nothing is computed from it."""
    event: Event
