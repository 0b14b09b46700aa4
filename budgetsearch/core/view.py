"""What the rules of ``decide`` look at: the plan, the history and the time, with the questions they ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from budgetsearch.core.budget import seconds_left
from budgetsearch.core.costs import CostModel
from budgetsearch.core.evidence import entry_rung
from budgetsearch.core.history import History, TrialState
from budgetsearch.core.records import Plan, Run, Segment, TrainJob, cost_class

NO_RESULT = ("infeasible", "crashed", "lost")
"""Ends that say nothing about a configuration's loss."""
RULED_OUT = 20
"""When so many samples in a row cannot fit into memory, nothing of the space does."""
TWO_FINALISTS_FROM = 6.0
"""Full runs that the budget must hold for a second finalist: if the first fails, or its rungs promised
too much, there is another."""


def _brings_nothing(state: TrialState) -> bool:
    return state.dead in NO_RESULT or state.rests


@dataclass(frozen=True)
class View:
    """What a rule looks at."""

    plan: Plan
    history: History
    candidates: Sequence[TrialState]
    now: float
    costs: CostModel

    @property
    def left(self) -> float:
        """Seconds that may still be spent before the reserve."""
        return seconds_left(self.plan, self.now) - self.costs.reserve_rise

    @property
    def entry(self) -> int:
        """The rung at which new trials enter."""
        return entry_rung(self.plan, self.history)

    @property
    def wanted_finalists(self) -> int:
        """How many trials shall run in full, at the least."""
        return 2 if self.plan.budget_seconds >= TWO_FINALISTS_FROM * self.plan.full_seconds else 1

    @property
    def may_ask(self) -> bool:
        """Whether another sample may be asked for: there is time, and not all of the last ones were ruled out
        before they ran."""
        last = list(self.history.trials.values())[-RULED_OUT:]
        hopeless = len(last) == RULED_OUT and all(s.dead and not s.started for s in last)
        return self.left > 0 and not hopeless

    def entered(self, rung: int) -> int:
        """How many trials have come to a rung; what fits in no memory has not competed."""
        trials = self.history.trials.values()
        return sum(1 for s in trials if s.goal >= rung and not (_brings_nothing(s) and s.rung < rung))

    def quota(self, rung: int) -> int:
        """How many of a rung's trials have earned the next."""
        return self.entered(rung) // self.plan.eta

    def fits(self, state: TrialState, tokens: int, extra: float = 0.0) -> bool:
        """Whether a segment of so many tokens surely ends in time."""
        seconds = self.costs.segment_seconds(state.trial.params, tokens, pessimistic=True)
        return seconds + self.load_seconds(state) + extra <= self.left

    def load_seconds(self, state: TrialState) -> float:
        """What loading the trial's base may take, if another quantization ran last."""
        name = cost_class(state.trial.params)
        return 0.0 if name == self.history.last_quantization else self.plan.load_seconds.get(name, 0.0)

    def run(self, segment: Segment, reason: str, limit: float) -> Run:
        """The decision to execute one segment."""
        job = TrainJob(
            job_id=self.history.next_job,
            segments=(segment,),
            eval_examples=self.plan.eval_examples,
            limit_seconds=min(limit, self.left),
            limit_bytes=self.plan.limit_bytes,
        )
        return Run(job, (reason,))

    def gang_size(self, quantization: str) -> int:
        """How many may train at once: what the calibration found, or less since memory ran out."""
        gains = self.plan.gang_gains.get(quantization, (1.0,))
        return min(len(gains), self.history.gang_limits.get(quantization, len(gains)))

    def after(self, run: Run) -> View:
        """The view as if the job were running and its time had passed."""
        segments = run.job.segments
        started = {segment.trial_id for segment in segments}
        seconds = sum(
            self.costs.segment_seconds(s.params, s.stop_tokens - s.start_tokens, pessimistic=True)
            for s in segments
        )
        first = self.history.trials[segments[0].trial_id]
        return replace(
            self,
            history=self.history.with_running(run.job),
            candidates=[state for state in self.candidates if state.trial_id not in started],
            now=self.now + seconds + self.load_seconds(first),
        )
