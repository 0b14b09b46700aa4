"""Everything that the policy may know, from the ledger alone: the state, and the questions to it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from budgetsearch.core.bases import facts_for
from budgetsearch.core.decisions import Finish
from budgetsearch.core.events import Closed, Exported, Opened, Scored
from budgetsearch.core.history.accounts import Accounts
from budgetsearch.core.history.measured import Measured
from budgetsearch.core.history.retired import Retired
from budgetsearch.core.history.trial import TrialState, turned_worse
from budgetsearch.core.metric import chosen
from budgetsearch.core.plan import Plan
from budgetsearch.core.records import Calibration, Params, Score, Segment, SegmentResult, TrainJob
from budgetsearch.core.reports import Beat, CardUse


@dataclass(frozen=True)
class Ahead:
    """Who leads, so that whoever does not come up to it concerns nobody."""

    best: tuple[float, int]
    """The incumbent's loss and number."""
    second: tuple[float, int]
    """Loss and negative tokens of the best checkpoint of another trial, which stands in for it."""
    trials: frozenset[int]
    """Whose they are."""


@dataclass
class History:
    """The fold of a ledger. Only ``core.history.fold`` changes it; everyone else reads."""

    opened: Opened | None = None
    plan: Plan | None = None
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    trials: dict[int, TrialState] = field(default_factory=dict)
    active: dict[int, TrialState] = field(default_factory=dict, repr=False, compare=False)
    """Those of the trials that may still run."""
    retired: Retired = field(default_factory=Retired, repr=False, compare=False)
    """What counts of the others."""
    ranks: dict[int, list[tuple[float, int]]] = field(default_factory=dict, repr=False, compare=False)
    """By rung: the losses there and whose they are, best first."""
    reached: Counter[int] = field(default_factory=Counter, repr=False, compare=False)
    """By rung: how many trials were sent to it or beyond."""
    passed: set[int] = field(default_factory=set, repr=False, compare=False)
    """Rungs from which a trial with a loss there was sent on."""
    ahead: Ahead | None = field(default=None, repr=False, compare=False)
    """What else an end may concern; None: everything has to be looked at."""
    holders: set[int] = field(default_factory=set, repr=False, compare=False)
    """Trials of which something is on disk."""
    running: dict[int, list[Segment]] = field(default_factory=dict)
    """Segments under way, by job."""
    running_since: dict[int, float] = field(default_factory=dict)
    """When each of these jobs began, in active seconds of the run."""
    workers: int = 1
    """Jobs that can run at once."""
    results: list[tuple[Segment, SegmentResult]] = field(default_factory=list)
    measured: Measured | None = field(default=None, repr=False, compare=False)
    """What the results since the plan say of costs."""
    result_jobs: list[int] = field(default_factory=list)
    """The job that each of the results comes from."""
    charged: dict[str, float] = field(default_factory=dict)
    """Seconds by phase."""
    accounts: Accounts = field(default_factory=Accounts, repr=False, compare=False)
    """Seconds of all workers together."""
    seq: int = field(default=0, compare=False)
    """Number of the last entry."""
    spent: float = 0.0
    """Active seconds of the run up to the last entry."""
    next_job: int = 0
    last_beat: Beat | None = None
    last_beat_at: float = 0.0
    scored: Scored | None = None
    """The last scores, of whichever checkpoint; its losses and its answers joined."""
    exported: Exported | None = None
    finish: Finish | None = None
    """The decision that the search is over, with its reason."""
    finished_at: float = 0.0
    """When it was taken, in active seconds of the run."""
    closed: Closed | None = None
    decisions: int = 0
    full_trials: list[int] = field(default_factory=list)
    """The trials in their full runs, each from its first link until it ends; one at a time on one worker."""
    full_done: list[int] = field(default_factory=list)
    last_quantization: str | None = None
    gang_limits: dict[str, int] = field(default_factory=dict)
    """By quantization: how many still fitted when memory ran out with more."""
    job_sizes: dict[int, int] = field(default_factory=dict)
    """How many segments each running job began with."""
    refused: list[Params] = field(default_factory=list)
    """Configurations that ran out of memory all alone."""
    shrunk: list[tuple[Params, int]] = field(default_factory=list)
    """Configurations that ran out of memory on the way, and the micro-batch that they went down to."""
    notices: list[tuple[float, str]] = field(default_factory=list)
    """What the user should know, and when it was found."""
    uses: list[CardUse] = field(default_factory=list)
    """What the watcher saw, job by job."""
    lost: list[tuple[str, str]] = field(default_factory=list)
    """Checkpoints that turned out to be missing or damaged, and why."""
    dropped: set[int] = field(default_factory=set)
    """Trials whose checkpoints were given up: a later loser does not bring them back."""
    wall: float = 0.0
    """When the last entry was written, in seconds since the epoch; for people."""
    unwritten: set[int] = field(default_factory=set)
    """The last jobs, as far as none of them could write a checkpoint."""

    @property
    def score(self) -> Score | None:
        """The final scores, if they are those of the best adapter: a better one has to be scored anew."""
        best = self.incumbent
        if self.scored is None or best is None or best.best_checkpoint != self.scored.checkpoint:
            return None
        return self.scored.score

    @property
    def incumbent(self) -> TrialState | None:
        """The trial with the best adapter on disk: the lowest validation loss seen at a checkpoint."""
        holders = map(self.trials.__getitem__, self.holders)
        able = [t for t in holders if t.best_checkpoint and (t.held or t.exported)]
        known = [t for t in able if t.best_loss is not None]
        return chosen(known, lambda t: (t.best_loss or 0.0, t.trial_id))

    @property
    def candidates(self) -> list[TrialState]:
        """Trials that were sampled, may fit into memory, and have never run."""
        return [t for t in self.active.values() if not t.started and not t.dead]

    def at_rung(self, rung: int) -> list[TrialState]:
        """Trials with a result at ``rung``, best first; the diverged and the given up are not here."""
        return [self.trials[number] for _, number in self.ranks.get(rung, ())]

    def place(self, state: TrialState, rung: int) -> int:
        """Its place at a rung where its loss is known, from 1."""
        return bisect_left(self.ranks[rung], (state.losses[rung], state.trial_id)) + 1

    def send(self, state: TrialState, rung: int) -> None:
        """A trial sets out for a rung."""
        for higher in range(state.goal + 1, rung + 1):
            self.reached[higher] += 1
        state.wished = state.wished and rung <= state.goal
        state.running, state.goal = True, max(state.goal, rung)
        if new := {known for known in state.losses if known < state.goal} - self.passed:
            self.passed |= new
            self.ahead = None

    def with_running(self, job: TrainJob) -> History:
        """A copy in which the job's segments have started; this history stays as it is."""
        changed = {s.trial_id: replace(self.trials[s.trial_id]) for s in job.segments}
        found = replace(
            self,
            trials={**self.trials, **changed},
            active={**self.active, **changed},
            running={**self.running, job.job_id: list(job.segments)},
            last_quantization=job.quantization,
            reached=Counter(self.reached),
            passed=set(self.passed),
        )
        for segment in job.segments:
            found.send(changed[segment.trial_id], segment.rung)
        return found

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was found before the first job; of several models of that of the best trial."""
        if self.opened is None:
            return {}
        best = self.incumbent
        return facts_for(self.opened.facts, best.trial.params if best is not None else None)

    @property
    def free(self) -> bool:
        """The space is one of anything: see ``Space.free``."""
        return self.plan is not None and self.plan.free

    def ran_in_full(self, state: TrialState) -> bool:
        """Its full run came to its planned end, or was ended because its loss rose."""
        top = self.plan is not None and state.rung == self.plan.top_rung
        return top or turned_worse(state)

    def standing(self, state: TrialState) -> str:
        """One word or two for where a trial stands."""
        over = self.closed is not None and self.closed.state == "finished"
        if state.dead:
            return state.dead
        if state.trial_id in self.full_done or (over and state.full_losses):
            return "done" if self.ran_in_full(state) else "cut short"
        if state.trial_id in self.full_trials:
            return "full run"
        if over:
            return "dropped" if state.started else "not tried"
        if state.running:
            return "promoted" if state.goal > 0 else "running"
        if state.trial_id in self.dropped:
            return "dropped"
        return "paused" if state.started else "waiting"
