"""The cost of a segment, learned from the segments that have ended."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from budgetsearch.core.history.history import History
from budgetsearch.core.history.measured import CostKey, Mean, Measured, cost_keys
from budgetsearch.core.plan import Plan
from budgetsearch.core.records import Params

PESSIMISM = 1.25
"""A segment may take so much longer than expected before the deadline arithmetic is wrong; shared
machines were seen to differ by far more, which the quantile of what this run measured covers."""
QUANTILE_MARGIN = 1.1
"""... and so much longer than the slowest tenth of what was measured."""
PLANNING_MARGIN = 1.1
"""Trials are planned at so many times their expected cost, so that the full run is not starved."""
MIN_SAMPLES = 2
"""Segments of one kind that must have ended before its own factor is trusted."""
MANY = 10**6
"""More members than any gang has."""


@dataclass(frozen=True)
class CostModel:
    """Seconds of training and of overhead, expected and pessimistic."""

    plan: Plan
    factors: dict[CostKey, tuple[float, float]]
    """Measured over reference seconds, by quantization and by both quantization and rank: (expected,
    pessimistic); those of a quantization as a whole come beside the pace that parameters make."""
    overheads: dict[str, float]
    """Seconds beside training of a segment that is evaluated, by quantization."""
    bare_overheads: dict[str, float]
    """The same of one that only writes a checkpoint."""
    gains: dict[str, float]
    """How many times the rate of one alone the largest gang that fits reaches, by quantization."""
    drift: float
    """How many times longer everything takes of late than what the factors say."""
    margin: float
    """Plans take so many times the expected cost: less, the more segments have been measured."""
    answers: dict[str, float]
    """Seconds of one answer that the metric grades, by quantization."""
    measured: Measured
    """What was measured."""

    @classmethod
    def learn(cls, plan: Plan, history: History) -> CostModel:
        """From the calibrated rates and every segment that has ended."""
        measured = history.measured
        if measured is None or not measured.holds(plan, len(history.results)):
            measured = Measured.of(plan, history.results)
        names = plan.reference_rates
        between = _between_segments(history)
        known = {key: some for key, some in measured.ratios.items() if len(some) >= MIN_SAMPLES}
        extras = measured.extras
        return cls(
            plan=plan,
            factors={key: _factors(some) for key, some in known.items()} | _general(plan, measured, known),
            overheads={n: between + _mean(extras.get((n, True)), plan.overheads[n]) for n in names},
            bare_overheads={
                n: between + _mean(extras.get((n, False)), plan.checkpoint_seconds[n]) for n in names
            },
            gains={n: plan.gang_gain(n, history.gang_limits.get(n, MANY)) for n in names},
            drift=measured.drift,
            margin=1.0 + (PLANNING_MARGIN - 1.0) / math.sqrt(1.0 + len(measured.everything) / 4),
            answers={n: _mean(measured.answers.get(n), plan.answer_seconds.get(n, 0.0)) for n in names},
            measured=measured,
        )

    @property
    def reserve_rise(self) -> float:
        """Seconds that the reserve must be larger than planned, since evaluations turned out dearer: base and
        adapter are evaluated once more at the end."""
        dearer = (self.overheads[n] - self.plan.overheads[n] for n in self.plan.reference_rates)
        return 2.0 * max(0.0, *dearer)

    def train_seconds(self, params: Params, tokens: float, *, pessimistic: bool = False) -> float:
        """Seconds of training alone for so many tokens."""
        general, own = cost_keys(params, self.plan.free)
        pace = self.measured.pace(params)
        usual, slow = (pace * factor for factor in self.factors[general])
        expected, worst = self.factors.get(own, (usual, slow))
        worst = max(worst, expected * slow / usual)  # few samples of a rank do not make it certain
        expected, worst = expected * self.drift, worst * max(1.0, self.drift)
        return tokens / self.plan.reference_rates[general[0]] * (worst if pessimistic else expected)

    def segment_seconds(
        self, params: Params, tokens: float, *, answers: int = 0, pessimistic: bool = False
    ) -> float:
        """Seconds of a whole segment: training, evaluation, checkpoint and graded answers."""
        extra = self.overhead_seconds(params, pessimistic=pessimistic)
        extra += self.grading_seconds(params, answers, pessimistic=pessimistic) if answers else 0.0
        return self.train_seconds(params, tokens, pessimistic=pessimistic) + extra

    def grading_seconds(
        self, params: Params, answers: int | None = None, *, pessimistic: bool = False
    ) -> float:
        """Seconds of so many answers and their grades; of as many as the plan grades of each checkpoint."""
        count = self.plan.metric_answers if answers is None else answers
        return count * self.answers[self.plan.cost_class(params)] * (PESSIMISM if pessimistic else 1.0)

    def overhead_seconds(self, params: Params, *, evaluated: bool = True, pessimistic: bool = False) -> float:
        """Seconds of a segment beside its training."""
        seconds = (self.overheads if evaluated else self.bare_overheads)[self.plan.cost_class(params)]
        return seconds * (PESSIMISM if pessimistic else 1.0)

    def evaluation_seconds(self, params: Params) -> float:
        """Seconds that measuring a loss takes."""
        return max(0.0, self.overhead_seconds(params) - self.overhead_seconds(params, evaluated=False))

    def typical_seconds(self, reference_seconds: float, *, ganged: bool = False) -> float:
        """A segment of so many reference seconds, whatever its quantization will be; ``ganged``: its share
        of the time of a whole gang."""
        factor = statistics.fmean(
            self.drift * self.factors[name, None][0] / (self.gains[name] if ganged else 1.0)
            for name in self.plan.reference_rates
        )
        return reference_seconds * factor + statistics.fmean(self.overheads.values())


def _general(
    plan: Plan, measured: Measured, known: dict[CostKey, list[float]]
) -> dict[CostKey, tuple[float, float]]:
    """Of each class as a whole; in a free space beside what the parameters say."""
    names = plan.reference_rates
    if plan.free:
        return {(name, None): _factors(measured.usual) for name in names}
    return {(name, None): _factors(known.get((name, None), measured.everything)) for name in names}


def _between_segments(history: History) -> float:
    """Seconds that the driver itself takes for each segment: recording, exporting, handing over."""
    own = history.charged.get("idle", 0.0) + history.charged.get("export", 0.0)
    return own / len(history.results) if history.results else 0.0


def _factors(sample: Sequence[float]) -> tuple[float, float]:
    """Of a sorted sample: (expected, pessimistic)."""
    if not sample:
        return 1.0, PESSIMISM
    middle = len(sample) // 2
    expected = sample[middle] if len(sample) % 2 else (sample[middle - 1] + sample[middle]) / 2
    high = sample[max(0, round(0.9 * len(sample)) - 1)]
    doubt = 1.0 + (PESSIMISM - 1.0) / math.sqrt(max(1.0, len(sample) / 4))
    return expected, max(expected * doubt, high * QUANTILE_MARGIN)


def _mean(sample: Mean | None, default: float) -> float:
    return sample.value if sample else default
