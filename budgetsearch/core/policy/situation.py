"""The situation in which the policy decides, and the segments that it may ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

from budgetsearch.core.decisions import Run
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.answers import Refusal
from budgetsearch.core.policy.costs import CostModel
from budgetsearch.core.policy.deadline import seconds_left
from budgetsearch.core.policy.evidence import entry_rung
from budgetsearch.core.policy.rungs import Rungs
from budgetsearch.core.records import Schedule, Segment, TrainJob
from budgetsearch.core.resources.memory import plain_positions

RULED_OUT = 20
"""When so many samples in a row cannot fit into memory, nothing of the space does."""
TWO_FINALISTS_FROM = 6.0
"""Full runs that the budget must hold for a second finalist: if the first fails, or its rungs promised
too much, there is another."""
LIMIT_FACTOR = 4.0
"""The watchdog stops a rung's segment that takes so many times its expected seconds."""
LIMIT_SECONDS = 30.0
"""... plus this, for the segments of a few seconds."""


@dataclass(frozen=True)
class Situation:
    """All that a rule looks at."""

    plan: Plan
    history: History
    candidates: Sequence[TrialState]
    now: float
    costs: CostModel
    workers: int = 1
    """Jobs that can run at once now; 1 where the plan knows of no more, for then nothing runs beside
    anything."""
    free: int = 1
    """Workers without a job."""
    saved: float = 0.0
    """Worker seconds that are not gone although ``now`` has moved: only the worker of a gang that is being
    gathered is busy till then."""

    @classmethod
    def of(
        cls, plan: Plan, history: History, candidates: Sequence[TrialState], now: float, free_slots: int
    ) -> Situation:
        """From what ``decide`` is told."""
        workers = free_slots + len(history.running) if plan.workers > 1 else 1
        return cls(plan, history, candidates, now, CostModel.learn(plan, history), workers, free_slots)

    @cached_property
    def rungs(self) -> Rungs:
        """The rungs as they stand."""
        return Rungs(self.plan, self.history)

    @property
    def left(self) -> float:
        """Seconds that may still be spent before the reserve."""
        return seconds_left(self.plan, self.now) - self.costs.reserve_rise

    @property
    def several(self) -> bool:
        """Jobs may run beside each other."""
        return self.plan.workers > 1

    @property
    def work_left(self) -> float:
        """Worker seconds before the reserve that nobody has yet; with one worker the seconds left."""
        if not self.several:
            return self.left
        return self.workers * self.left + self.saved - self.under_way

    @cached_property
    def under_way(self) -> float:
        """Worker seconds that running jobs, and full runs that have begun, are expected to take still."""
        return self._running_seconds() + self._full_run_seconds()

    def _running_seconds(self) -> float:
        total = 0.0
        for job_id, segments in self.history.running.items():
            since = self.history.running_since.get(job_id)
            if since is not None:  # else its time has passed already: see ``after``
                total += max(0.0, sum(map(self._expected, segments)) - (self.now - since))
        return total

    def _full_run_seconds(self) -> float:
        """Of full runs beyond the links that run now."""
        ends = {s.trial_id: s.stop_tokens for some in self.history.running.values() for s in some}
        total = 0.0
        for state in map(self.history.trials.__getitem__, self.history.full_trials):
            rest = (state.full_stop_tokens or 0) - ends.get(state.trial_id, state.tokens)
            total += self.costs.train_seconds(state.trial.params, max(0, rest))
        return total

    def _expected(self, segment: Segment) -> float:
        return self.segment_seconds(segment)

    def segment_seconds(self, segment: Segment, *, pessimistic: bool = False) -> float:
        """What a segment is expected to take, or may take."""
        start, answers = 0 if self.plan.whole else segment.start_tokens, segment.answers
        tokens = segment.stop_tokens - start
        return self.costs.segment_seconds(segment.params, tokens, answers=answers, pessimistic=pessimistic)

    @property
    def entry(self) -> int:
        """The rung at which new trials enter, those aside that enter higher."""
        return entry_rung(self.plan, self.history)

    def entry_of(self, state: TrialState) -> int:
        """The rung at which a trial enters."""
        return max(self.entry, state.trial.entry)

    @property
    def wanted_finalists(self) -> int:
        """Trials that shall run in full, at the least."""
        work = self.plan.workers * self.plan.budget_seconds
        return 2 if work >= TWO_FINALISTS_FROM * self.plan.full_seconds else 1

    @property
    def may_ask(self) -> bool:
        """Another sample may be asked for: there is time, and not all of the last ones were ruled out
        before they ran."""
        last = list(islice(reversed(self.history.trials.values()), RULED_OUT))
        hopeless = len(last) == RULED_OUT and all(s.dead and not s.started for s in last)
        return self.left > 0 and not hopeless

    @property
    def next_candidate(self) -> TrialState:
        """Of those that wait: one whose quantization has a whole gang waiting, else one whose quantization is
        loaded, so that the worker need not load another; of them whoever enters lowest, the oldest first."""
        waiting = Counter(self.plan.cost_class(state.trial.params) for state in self.candidates)
        loaded = self.history.last_quantization

        def rank(state: TrialState) -> tuple[bool, bool, int, int]:
            name = self.plan.cost_class(state.trial.params)
            return waiting[name] < self.gang_size(name), name != loaded, state.trial.entry, state.trial_id

        return min(self.candidates, key=rank)

    def load_seconds(self, state: TrialState) -> float:
        """Seconds that loading the trial's base may take, if another quantization ran last; nobody knows here
        which of several workers will get it, and what that one holds."""
        name = self.plan.cost_class(state.trial.params)
        held = name == self.history.last_quantization and not self.several
        return 0.0 if held else self.plan.load_seconds.get(name, 0.0)

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

    def begin(self, state: TrialState) -> int:
        """Tokens from which the trial's next segment trains."""
        return 0 if self.plan.whole else state.tokens

    def gang_size(self, quantization: str) -> int:
        """Members that may train at once: what the calibration found, or less since memory ran out."""
        gains = self.plan.gang_gains.get(quantization, (1.0,))
        return min(len(gains), self.history.gang_limits.get(quantization, len(gains)))

    def after(self, run: Run) -> Situation:
        """The situation as if the job were running and its time had passed."""
        segments = run.job.segments
        started = {segment.trial_id for segment in segments}
        seconds = sum(self.segment_seconds(segment, pessimistic=True) for segment in segments)
        first = self.history.trials[segments[0].trial_id]
        load = self.load_seconds(first)
        return replace(
            self,
            history=self.history.with_running(run.job),
            candidates=[state for state in self.candidates if state.trial_id not in started],
            now=self.now + seconds + load,
            saved=self.saved + (self.workers - 1) * (seconds + load),
        )


def segment_to(situation: Situation, state: TrialState, rung: int, stop: int, schedule: Schedule) -> Segment:
    """To a token count, from the checkpoint that the trial has."""
    params = state.trial.params
    recompute = situation.plan.recompute.get(situation.plan.cost_class(params), False)
    return Segment(
        trial_id=state.trial_id,
        params=params,
        seed=state.trial.seed,
        rung=rung,
        start_tokens=state.tokens,
        stop_tokens=max(stop, state.tokens),  # a stopped one may have come further without an evaluation
        schedule=schedule,
        batch_size=state.trial.batch_size,
        micro_batch=state.micro_batch,
        checkpoint_in=state.checkpoint,
        attempt=state.crashes + state.lost + state.moves,
        recompute=recompute,
        plain_positions=plain_positions(situation.plan, params) if recompute else 0,
    )


def rung_segment(
    situation: Situation, state: TrialState, rung: int, reason: str, room: float = 0.0
) -> Run | Refusal:
    """To the end of a rung, if that surely fits with ``room`` further seconds before the reserve."""
    params, goal, costs = state.trial.params, state.trial.rung_tokens[rung], situation.costs
    tokens = max(1, goal - situation.begin(state))
    slow = costs.segment_seconds(params, tokens, pessimistic=True)
    needed = slow + situation.load_seconds(state) + room
    if needed > situation.left:
        what = "the next segment with a full run behind it" if room else "the next segment"
        return Refusal(what, needed, situation.left)
    schedule = Schedule(warmup_tokens=state.trial.warmup_tokens, stop_tokens=goal)
    limit = LIMIT_FACTOR * costs.segment_seconds(params, tokens) + LIMIT_SECONDS
    return situation.run(segment_to(situation, state, rung, goal, schedule), reason, limit)
