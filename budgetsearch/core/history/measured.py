"""What the segments that have ended took, added up one after the other: no decision reads them all again."""

from __future__ import annotations

import math
import statistics
from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from budgetsearch.core.bases import cost_class
from budgetsearch.core.history.effects import Effects
from budgetsearch.core.plan import Plan
from budgetsearch.core.records import Params, ParamValue, Segment, SegmentResult
from budgetsearch.core.space.knobs import cost_kind
from budgetsearch.core.space.space import Space

RECENT = 5
"""So many segments show whether the machine has changed."""
NOTICEABLE = 1.25
"""... by this factor at least."""
KNOWN_FROM = 8
"""So many segments must have been measured before one that took longer than its parameters say shows that."""
CostKey = tuple[str, ParamValue | None]
"""A quantization and a rank; None for all ranks."""


@dataclass
class Mean:
    """A mean to which values are added; rounded once, like that of all values together."""

    count: int = 0
    _parts: list[float] = field(default_factory=list)
    """Their exact sum, as numbers that do not overlap."""

    def add(self, value: float) -> None:
        """One more (Shewchuk 1997: what rounding loses becomes a part of its own)."""
        self.count += 1
        parts = []
        for part in self._parts:
            large, small = (value, part) if abs(value) >= abs(part) else (part, value)
            value = large + small
            if rest := small - (value - large):
                parts.append(rest)
        self._parts = [*parts, value]

    @property
    def value(self) -> float:
        """The mean of at least one."""
        return math.fsum(self._parts) / self.count


@dataclass
class Measured:
    """Ratios to the reference rate and seconds beside training, under one plan."""

    plan: Plan
    count: int = 0
    """Results that were looked at."""
    ratios: dict[CostKey, list[float]] = field(default_factory=dict)
    """Measured over reference seconds of training, sorted; by quantization, and by both and rank."""
    everything: list[float] = field(default_factory=list)
    """All ratios, sorted."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    """The last ratios, each over the usual one of its quantization till then."""
    extras: dict[tuple[str, bool], Mean] = field(default_factory=dict)
    """Seconds beside training and grading, by quantization and whether the segment was evaluated."""
    answers: dict[str, Mean] = field(default_factory=dict)
    """Seconds of one answer with its grading, by quantization."""

    @cached_property
    def effects(self) -> Effects:
        """What the parameters of a free space do to the ratio."""
        return Effects(Space.parse(self.plan.space))

    def pace(self, params: Params) -> float:
        """How many times the reference seconds a unit of a configuration is expected to take, by its
        parameters; 1 where costs are known by class."""
        return self.effects.factor(params) if self.plan.free else 1.0

    @property
    def usual(self) -> list[float]:
        """All ratios over what the parameters of a free space say, sorted."""
        return self.effects.residuals() if self.plan.free else self.everything

    @classmethod
    def of(cls, plan: Plan, results: Iterable[tuple[Segment, SegmentResult]]) -> Measured:
        """What all of them say."""
        found = cls(plan)
        for segment, result in results:
            found.add(segment, result)
        return found

    def holds(self, plan: Plan, count: int) -> bool:
        """Whether it is what so many results say under that plan."""
        same = plan.reference_rates == self.plan.reference_rates and plan.gang_gains == self.plan.gang_gains
        return same and self.count == count

    @property
    def drift(self) -> float:
        """How many times longer everything takes of late than it used to: 1 unless that is beyond noise."""
        if len(self.recent) < RECENT:
            return 1.0
        found = statistics.median(self.recent)
        return found if max(found, 1.0 / found) > NOTICEABLE else 1.0

    def add(self, segment: Segment, result: SegmentResult) -> None:
        """One more segment has ended."""
        self.count += 1
        name = self.plan.cost_class(segment.params)
        train = result.seconds.get("train", 0.0)
        tokens = result.tokens - segment.start_tokens
        if tokens > 0 and train > 0:  # also what a segment did before it was stopped for slowness
            ratio = train * self.plan.reference_rates[name] * self.plan.gang_gain(name, result.gang) / tokens
            if result.gang > 1:  # a gang that gains more than calibrated makes nobody faster alone
                ratio = max(1.0, ratio)
            self._note(name, segment.params, ratio)
        if result.status == "ok":
            graded = result.seconds.get("score", 0.0)
            if result.metric and graded > 0:
                self.answers.setdefault(name, Mean()).add(graded / len(result.metric))
            if not segment.only_grades:
                extra = self.extras.setdefault((name, segment.evaluate), Mean())
                extra.add(sum(result.seconds.values()) - train - graded)

    def _note(self, name: str, params: Params, ratio: float) -> None:
        usual = self.ratios.get((name, None), ())
        if self.plan.free:
            self.recent.append(ratio / self.pace(params) if len(self.effects) >= KNOWN_FROM else 1.0)
            self.effects.add(params, ratio)
        else:
            self.recent.append(ratio / usual[len(usual) // 2] if len(usual) > RECENT else 1.0)
        insort(self.everything, ratio)
        for key in cost_keys(params, self.plan.free):
            insort(self.ratios.setdefault(key, []), ratio)


def cost_keys(params: Params, free: bool = False) -> tuple[CostKey, CostKey]:
    """The general class of a configuration, and the one that its rank makes (and what else has a cost); of a
    free space each configuration is one of its own."""
    name = cost_class(params, free)
    kind = ", ".join(f"{key} {params[key]}" for key in sorted(params)) if free else cost_kind(params)
    return (name, None), (name, kind)
