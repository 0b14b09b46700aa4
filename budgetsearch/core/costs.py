"""What a segment will cost, learned from the segments that have ended."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from budgetsearch.core.history import History
from budgetsearch.core.records import Params, Plan, cost_class

PESSIMISM = 1.25
"""A segment may take so much longer than expected before the deadline arithmetic is wrong; shared
machines were seen to differ by far more, which the quantile of what this run measured covers."""
QUANTILE_MARGIN = 1.1
"""... and so much longer than the slowest tenth of what was measured."""
PLANNING_MARGIN = 1.1
"""Trials are planned at so many times their expected cost, so that the full run is not starved."""
MIN_SAMPLES = 2
"""Segments of one quantization that must have ended before its own factor is trusted."""


@dataclass(frozen=True)
class CostModel:
    """Seconds of training and of overhead, expected and pessimistic."""

    plan: Plan
    factors: dict[str, tuple[float, float]]
    """Measured over reference seconds, by quantization: (expected, pessimistic)."""
    overheads: dict[str, float]
    margin: float
    """Plans take so many times the expected cost: less, the more segments have been measured."""

    @classmethod
    def learn(cls, plan: Plan, history: History) -> CostModel:
        """From the calibrated rates and every segment that has ended."""
        ratios: dict[str, list[float]] = {}
        extras: dict[str, list[float]] = {}
        for segment, result in history.results:
            name = cost_class(segment.params)
            train = result.seconds.get("train", 0.0)
            tokens = result.tokens - segment.start_tokens
            if tokens > 0 and train > 0:  # also what a segment did before it was stopped for slowness
                ratios.setdefault(name, []).append(train * plan.reference_rates[name] / tokens)
            if result.status == "ok":
                extras.setdefault(name, []).append(sum(result.seconds.values()) - train)
        everything = [ratio for some in ratios.values() for ratio in some]
        between = _between_segments(history)
        names = plan.reference_rates
        return cls(
            plan=plan,
            factors={name: _factors(ratios.get(name, []), everything) for name in names},
            overheads={name: between + _mean(extras.get(name, []), plan.overheads[name]) for name in names},
            margin=1.0 + (PLANNING_MARGIN - 1.0) / math.sqrt(1.0 + len(everything) / 4),
        )

    def train_seconds(self, params: Params, tokens: float, *, pessimistic: bool = False) -> float:
        """Seconds of training alone for so many tokens."""
        name = cost_class(params)
        expected, worst = self.factors[name]
        return tokens / self.plan.reference_rates[name] * (worst if pessimistic else expected)

    def segment_seconds(self, params: Params, tokens: float, *, pessimistic: bool = False) -> float:
        """Seconds of a whole segment: training, evaluation and checkpoint."""
        extra = self.overheads[cost_class(params)] * (PESSIMISM if pessimistic else 1.0)
        return self.train_seconds(params, tokens, pessimistic=pessimistic) + extra

    def typical_seconds(self, reference_seconds: float) -> float:
        """A segment of so many reference seconds, whatever its quantization will be."""
        factor = statistics.fmean(expected for expected, _ in self.factors.values())
        return reference_seconds * factor + statistics.fmean(self.overheads.values())


def _between_segments(history: History) -> float:
    """Seconds that the driver itself takes for each segment: recording, exporting, handing over."""
    own = history.charged.get("idle", 0.0) + history.charged.get("export", 0.0)
    return own / len(history.results) if history.results else 0.0


def _factors(own: Sequence[float], everything: Sequence[float]) -> tuple[float, float]:
    sample = own if len(own) >= MIN_SAMPLES else everything
    if not sample:
        return 1.0, PESSIMISM
    expected = statistics.median(sample)
    high = sorted(sample)[max(0, round(0.9 * len(sample)) - 1)]
    doubt = 1.0 + (PESSIMISM - 1.0) / math.sqrt(max(1.0, len(sample) / 4))
    return expected, max(expected * doubt, high * QUANTILE_MARGIN)


def _mean(sample: Sequence[float], default: float) -> float:
    return statistics.fmean(sample) if sample else default
