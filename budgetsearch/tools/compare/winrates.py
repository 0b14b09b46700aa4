"""The score of the NeurIPS LLM Efficiency Challenge: the geometric mean of win rates.

Rebuilt from its published tables. Of each scenario: the share of the other entrants that one is better
than, a tie counting half. The score is the geometric mean over the scenarios, so one zero makes it zero.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

Scores = Mapping[str, Mapping[str, float]]
"""By scenario and entrant; more is better."""


@dataclass(frozen=True)
class Winning:
    """What one entrant comes to."""

    name: str
    rates: Mapping[str, float]
    """By scenario, 0 to 1."""
    mean: float
    score: float
    """Geometric mean of the rates."""

    @property
    def zeros(self) -> list[str]:
        """Scenarios in which it is better than nobody."""
        return [scenario for scenario, rate in self.rates.items() if rate == 0.0]


def challenge(scores: Scores) -> list[Winning]:
    """All entrants, two or more and the same in every scenario; the best first."""
    rates = {scenario: win_rates(by_name) for scenario, by_name in scores.items()}
    found = [_winning(name, rates) for name in next(iter(scores.values()))]
    return sorted(found, key=lambda winning: (-winning.score, -winning.mean, winning.name))


def win_rates(scores: Mapping[str, float]) -> dict[str, float]:
    """Share of the others that each is better than; a tie counts half."""
    return {
        name: statistics.fmean(
            1.0 if mine > other else 0.5 if mine == other else 0.0
            for rival, other in scores.items()
            if rival != name
        )
        for name, mine in scores.items()
    }


def warnings_of(winnings: list[Winning]) -> list[str]:
    """What a reader of the scores must know: where a zero comes from."""
    found = [
        f"{winning.name} is better than nobody in {', '.join(winning.zeros)}: that makes its score 0, "
        "however well it does elsewhere."
        for winning in winnings
        if winning.zeros
    ]
    if found and len(winnings) <= 5:
        found.append(
            f"With {len(winnings)} entrants the last one of a scenario always has a win rate of 0; the "
            "challenge had dozens. Look at the accuracies as well."
        )
    return found


def _winning(name: str, rates: Mapping[str, Mapping[str, float]]) -> Winning:
    mine = {scenario: by_name[name] for scenario, by_name in rates.items()}
    values = list(mine.values())
    score = 0.0 if 0.0 in values else math.exp(statistics.fmean(map(math.log, values)))
    return Winning(name, mine, statistics.fmean(values), score)
