"""``fold(entries) -> History``: everything that the policy may know, from the ledger alone."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace

from budgetsearch.core.decisions import Finish
from budgetsearch.core.errors import LedgerError
from budgetsearch.core.events import (
    Calibrated,
    CardWatched,
    Charged,
    CheckpointLost,
    Closed,
    Decided,
    Entry,
    Event,
    Exported,
    Heartbeat,
    Noticed,
    Opened,
    Planned,
    Rescheduled,
    Resumed,
    Scored,
    SegmentEnded,
    SegmentStarted,
    TrialAdded,
    WorkersChanged,
)
from budgetsearch.core.history.measured import Measured
from budgetsearch.core.history.outcomes import rule_out_infeasible, segment_ended
from budgetsearch.core.history.retention import contenders, forget, lose, needed_checkpoints, recount
from budgetsearch.core.history.retired import Retired
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.plan import Plan
from budgetsearch.core.records import (
    Beat,
    Calibration,
    CardUse,
    Params,
    Score,
    Segment,
    SegmentResult,
    TrainJob,
    cost_class,
)
from budgetsearch.core.resources.memory import taught


@dataclass
class History:
    """The fold of a ledger. Only ``apply`` changes it; everyone else reads."""

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
    spent: float = 0.0
    """Active seconds of the run up to the last entry."""
    next_job: int = 0
    last_beat: Beat | None = None
    last_beat_at: float = 0.0
    scored: Scored | None = None
    """The last scores, of whichever checkpoint; its losses and its answers joined."""
    exported: Exported | None = None
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
    dropped: set[int] = field(default_factory=set)
    """Trials whose checkpoints were given up: a later loser does not bring them back."""
    wall: float = 0.0
    """When the last entry was written, in seconds since the epoch; for people."""
    unwritten: set[int] = field(default_factory=set)
    """The last jobs, as far as none of them could write a checkpoint."""

    # ------------------------------------------------------------------ questions

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
        return min(known, key=lambda t: (t.best_loss, t.trial_id), default=None)

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

    def contenders(self) -> set[int]:
        """Trials that may still run: once a rung has been promoted from, its best and a few behind."""
        return contenders(self)

    def needed_checkpoints(self) -> set[str]:
        """Names of the checkpoints that the run may still want."""
        return needed_checkpoints(self)

    def with_running(self, job: TrainJob) -> History:
        """A copy in which the job's segments have started; this history stays as it is."""
        changed = {}
        for segment in job.segments:
            state = self.trials[segment.trial_id]
            changed[segment.trial_id] = replace(state, running=True, goal=max(state.goal, segment.rung))
        trials, active = {**self.trials, **changed}, {**self.active, **changed}
        running = {**self.running, job.job_id: list(job.segments)}
        return replace(
            self, trials=trials, active=active, running=running, last_quantization=job.quantization
        )

    def standing(self, state: TrialState) -> str:
        """One word or two for where a trial stands."""
        over = self.closed is not None and self.closed.state == "finished"
        if state.dead:
            return state.dead
        if state.trial_id in self.full_done or (over and state.full_losses):
            return "done"
        if state.trial_id in self.full_trials:
            return "full run"
        if over:
            return "dropped" if state.started else "not tried"
        if state.running:
            return "promoted" if state.goal > 0 else "running"
        if state.trial_id in self.dropped:
            return "dropped"
        return "paused" if state.started else "waiting"

    # ---------------------------------------------------------------------- apply

    def apply(self, entry: Entry) -> None:
        """Take one more entry into account.

        Raises:
            LedgerError: the entry contradicts what came before.
        """
        self.spent = max(self.spent, entry.at)
        self.wall = entry.wall
        event: Event = entry.event
        handler = getattr(self, f"_on_{type(event).__name__.lower()}")
        try:
            handler(event, entry.at)
        except KeyError as error:
            raise LedgerError(
                f"entry {entry.seq} ({type(event).__name__}) names {error} which the ledger never "
                "introduced. The ledger is damaged: restore ledger.sqlite from a copy, or start a new run."
            ) from error

    def _on_opened(self, event: Opened, at: float) -> None:
        self.opened = event

    def _on_resumed(self, event: Resumed, at: float) -> None:
        self.closed = None
        self.unwritten.clear()
        for state in self.trials.values():
            state.unread = 0
        recount(self)

    def _on_rescheduled(self, event: Rescheduled, at: float) -> None:
        if self.opened is not None:
            self.opened = replace(self.opened, budget_seconds=event.budget_seconds)
        if self.plan is not None:
            self.plan = replace(self.plan, budget_seconds=event.budget_seconds)

    def _on_calibrated(self, event: Calibrated, at: float) -> None:
        self.calibrations[event.calibration.quantization] = event.calibration

    def _on_planned(self, event: Planned, at: float) -> None:
        self.plan = event.plan
        self.workers = event.plan.workers
        self.measured = Measured(event.plan)

    def _on_workerschanged(self, event: WorkersChanged, at: float) -> None:
        self.workers = event.workers
        if self.plan is not None and event.workers > self.plan.workers:
            self.plan = replace(self.plan, workers=event.workers)

    def _on_trialadded(self, event: TrialAdded, at: float) -> None:
        trial = event.trial
        micro = taught(self.shrunk, trial.params, trial.micro_batch)
        self.trials[trial.trial_id] = TrialState(trial, micro, added_wall=self.wall)
        self.active[trial.trial_id] = self.trials[trial.trial_id]
        rule_out_infeasible(self)

    def _on_decided(self, event: Decided, at: float) -> None:
        self.decisions += 1
        if isinstance(event.decision, Finish):
            self.full_done += self.full_trials  # the time ended them
            self.full_trials.clear()

    def _on_segmentstarted(self, event: SegmentStarted, at: float) -> None:
        segment = event.segment
        state = self.trials[segment.trial_id]
        state.running = True
        state.goal = max(state.goal, segment.rung)
        self.running.setdefault(event.job_id, []).append(segment)
        self.running_since.setdefault(event.job_id, at)
        self.job_sizes[event.job_id] = len(self.running[event.job_id])
        self.next_job = max(self.next_job, event.job_id + 1)
        self.last_quantization = cost_class(segment.params)
        if self.plan and segment.rung == self.plan.top_rung:
            state.full_stop_tokens = segment.schedule.stop_tokens
            state.full_cooldown_tokens = segment.schedule.cooldown_tokens
            self._note_full_run(segment.trial_id)

    def _note_full_run(self, trial_id: int) -> None:
        if self.plan is not None and self.plan.workers == 1:
            self.full_trials.clear()
        if trial_id not in self.full_trials:
            self.full_trials.append(trial_id)

    def _on_segmentended(self, event: SegmentEnded, at: float) -> None:
        segment_ended(self, event, at)

    def _on_heartbeat(self, event: Heartbeat, at: float) -> None:
        self.last_beat = event.beat
        self.last_beat_at = at

    def _on_noticed(self, event: Noticed, at: float) -> None:
        self.notices.append((at, event.text))

    def _on_cardwatched(self, event: CardWatched, at: float) -> None:
        self.uses.append(event.use)

    def _on_checkpointlost(self, event: CheckpointLost, at: float) -> None:
        lose(self, event.checkpoint, event.detail, at, exported=event.exported)
        forget(self)

    def _on_charged(self, event: Charged, at: float) -> None:
        self.charged[event.phase] = self.charged.get(event.phase, 0.0) + event.seconds

    def _on_scored(self, event: Scored, at: float) -> None:
        best = self.incumbent
        if not event.checkpoint and best is not None:
            event = replace(event, trial_id=best.trial_id, checkpoint=str(best.best_checkpoint))
        before = self.scored
        if before and before.checkpoint == event.checkpoint and event.score.base_loss is None:
            event = replace(event, score=before.score.joined(event.score))
        self.scored = event

    def _on_exported(self, event: Exported, at: float) -> None:
        self.exported = event
        for state in map(self.trials.__getitem__, self.holders):
            if state.exported is not None and state.exported.checkpoint != event.checkpoint:
                state.exported = None

    def _on_closed(self, event: Closed, at: float) -> None:
        self.closed = event
