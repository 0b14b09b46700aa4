"""Trials that will never run again, as counts: what a decision asks of them does not cost more with each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from budgetsearch.core.records import ParamValue

if TYPE_CHECKING:
    from budgetsearch.core.history.trial import TrialState

NO_RESULT = ("infeasible", "crashed", "lost")
"""Ends that say nothing about a configuration's loss."""
STRATA = ("quantization", "rank")
"""Early rungs cannot tell how well a value of these ends (docs/policy.md), so a tie goes to the trial that
brings one that no trial has carried up yet."""


def has_entered(state: TrialState, rung: int) -> bool:
    """Whether it has come to a rung; what fits in no memory has not competed."""
    nothing = state.dead in NO_RESULT or state.rests
    return state.goal >= rung >= state.trial.entry and not (nothing and state.rung < rung)


def has_competed(state: TrialState, rung: int) -> bool:
    """Whether it is known how it does there."""
    known = state.rung >= rung or (state.goal == rung and state.dead == "diverged")
    return known and rung >= state.trial.entry


@dataclass
class Retired:
    """How many there are, by rung."""

    started: int = 0
    able: Counter[int] = field(default_factory=Counter)
    """Those that did nothing wrong, by the highest rung that they were sent to."""
    entered: Counter[int] = field(default_factory=Counter)
    competed: Counter[int] = field(default_factory=Counter)
    direct: Counter[int] = field(default_factory=Counter)
    """Of those that entered a rung the ones that were at no lower one."""
    first: dict[tuple[int, str], dict[ParamValue, int]] = field(default_factory=dict)
    """By the highest rung that they were sent to and a stratum: of each value the first trial."""

    def add(self, state: TrialState) -> None:
        """One more."""
        if not state.started:
            return
        self.started += 1
        if not state.stuck:
            self.able[state.goal] += 1
        for rung in range(state.goal + 1):
            self.entered[rung] += has_entered(state, rung)
            self.direct[rung] += has_entered(state, rung) and rung == state.trial.entry > 0
            self.competed[rung] += has_competed(state, rung)
        for name in STRATA:
            if name in state.trial.params:
                values = self.first.setdefault((state.goal, name), {})
                value = state.trial.params[name]
                values[value] = min(values.get(value, state.trial_id), state.trial_id)
