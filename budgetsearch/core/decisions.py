"""What ``decide`` can answer: values, each of its own kind."""

from __future__ import annotations

from dataclasses import dataclass, field

from budgetsearch.core.records import TrainJob


@dataclass(frozen=True)
class Run:
    """Execute this job now."""

    job: TrainJob
    reasons: tuple[str, ...]
    """Why each of its segments runs."""

    @property
    def reason(self) -> str:
        """All of them in one line."""
        return "; ".join(dict.fromkeys(self.reasons))


@dataclass(frozen=True)
class NeedCandidates:
    """Ask the sampler for so many configurations, then decide again."""

    count: int


@dataclass(frozen=True)
class Wait:
    """Nothing to start while something runs."""


@dataclass(frozen=True)
class Finish:
    """The search is over: score and export the incumbent."""

    reason: str = field(compare=False)
    """For people: two that differ only in words are the same decision."""


Decision = Run | NeedCandidates | Wait | Finish
