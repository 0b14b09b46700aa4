"""Evidence in losses: whether a rung predicts the next one, and whether two trials differ at all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from budgetsearch.core.history.history import History
from budgetsearch.core.plan import Plan

MIN_AGREEMENT = 0.84
"""Below this agreement between the scouts' first two rungs, new trials enter at the second. On recorded
curves eight random trials fall below it nine times in ten where a rung at 1/27 lies inside the warmup
(fine-tuning), and once in seven where short rungs pay."""
MIN_SCOUTS = 4
MIN_EXAMPLES = 8
"""With fewer validation examples nothing is called a tie."""


def entry_rung(plan: Plan, history: History) -> int:
    """The rung at which new trials enter: 0, or 1 if the scouts say that rung 0 does not predict."""
    scouts = [history.trials[n] for n in range(plan.scouts) if n in history.trials]
    if len(scouts) < plan.scouts or any(s.running or not (s.stuck or s.rung >= 1) for s in scouts):
        return 0
    pairs = [(_loss(s.losses, 0, s.dead), _loss(s.losses, 1, s.dead)) for s in scouts]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(known) < MIN_SCOUTS:
        return 0
    return int(agreement([a for a, _ in known], [b for _, b in known]) < MIN_AGREEMENT)


def _loss(losses: dict[int, float], rung: int, dead: str | None) -> float | None:
    return math.inf if dead == "diverged" and rung not in losses else losses.get(rung)


def agreement(first: Sequence[float], second: Sequence[float]) -> float:
    """The correlation of two rungs' distances from their best value, on a logarithmic scale.

    Unlike a rank correlation it weighs the good trials most, and those are what a rung must tell apart.
    Infinite losses (diverged) count as the worst finite one.
    """
    return _correlation(_distances(first), _distances(second))


def indistinguishable(first: Sequence[float], second: Sequence[float]) -> bool:
    """Two trials' losses on the same validation examples differ by less than a standard error."""
    if len(first) != len(second) or len(first) < MIN_EXAMPLES:
        return False
    mean, error = paired_difference(first, second)
    return abs(mean) <= error


def clearly_worse(first: Sequence[float], second: Sequence[float]) -> bool:
    """The second's losses on the same validation examples are higher by more than two standard errors; where
    there are too few to tell, nobody is clearly worse."""
    if len(first) != len(second) or len(first) < MIN_EXAMPLES:
        return False
    mean, error = paired_difference(first, second)
    return mean > 2 * error


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """How much more the second loses on the same examples, two at least, and the standard error of that.

    The differences are paired, for what an example costs varies far more than what two trials make of it.
    """
    count = len(first)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean = math.fsum(differences) / count
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    return mean, math.sqrt(variance / count)


def _distances(losses: Sequence[float]) -> list[float]:
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    if not finite or finite[0] == finite[-1]:
        return [0.0] * len(losses)
    best, worst = finite[0], finite[-1]
    unit = 0.05 * max(finite[len(finite) // 2] - best, 1e-3 * (worst - best))
    return [math.log(min(loss, worst) - best + unit) for loss in losses]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's coefficient, from -1 to 1; ties share their mean rank. 1 if all are tied."""
    return _correlation(_ranks(first), _ranks(second))


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's coefficient; 1 if one side has no spread, for then nothing speaks against it."""
    left, right = statistics.fmean(a), statistics.fmean(b)
    covariance = sum((x - left) * (y - right) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - left) ** 2 for x in a) * sum((y - right) ** 2 for y in b))
    return covariance / spread if spread else 1.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    start = 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or values[order[stop]] != values[order[start]]:
            for k in order[start:stop]:
                ranks[k] = (start + stop - 1) / 2
            start = stop
    return ranks
