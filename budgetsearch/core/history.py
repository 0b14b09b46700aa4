"""``fold(entries) -> History``: everything that the policy may know, from the ledger alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from budgetsearch.core.disk import runners_up
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
from budgetsearch.core.feasibility import problem, taught
from budgetsearch.core.measured import Measured
from budgetsearch.core.records import (
    Beat,
    Calibration,
    CardUse,
    Finish,
    Params,
    Plan,
    Score,
    Segment,
    SegmentResult,
    TrainJob,
    Trial,
    cost_class,
)
from budgetsearch.core.retired import Retired
from budgetsearch.core.stands import MAX_UNREAD, Stand, fall_back, settle, spares, with_stand

MAX_CRASHES = 1
"""A segment whose worker died is issued again so often, then its trial is given up."""


MAX_TIMEOUTS = 1
"""A trial that its watchdog stopped goes on so often, then it is given up."""
MAX_STRANDED = 3
"""Where a trial lost so many workers in a row, it is what takes them down."""


@dataclass
class TrialState:
    """What is known of one trial."""

    trial: Trial
    micro_batch: int
    tokens: int = 0
    rung: int = -1
    """Highest rung that it has finished; -1 before the first."""
    goal: int = -1
    """Highest rung that it was sent to; above ``rung`` while it is under way."""
    checkpoint: str | None = None
    losses: dict[int, float] = field(default_factory=dict)
    """Validation loss at each finished rung."""
    example_losses: dict[int, tuple[float, ...]] = field(default_factory=dict)
    best_loss: float | None = None
    best_checkpoint: str | None = None
    best_tokens: int = 0
    evaluated_tokens: int = 0
    """Where its loss was last measured."""
    full_losses: list[float] = field(default_factory=list)
    """Validation loss after each link of the full run's chain."""
    full_stop_tokens: int | None = None
    """Where the full run ends, as last recorded; None before it starts."""
    full_cooldown_tokens: int = 0
    """How long before that its cooldown begins."""
    dead: str | None = None
    """Why it will never run again (diverged, infeasible, crashed, timeout, lost), or None."""
    held: tuple[Stand, ...] = ()
    """Its checkpoints that are on disk, in the order of writing."""
    exported: Stand | None = None
    """Its best checkpoint, if that was lost and only the exported adapter is left of it."""
    lost: int = 0
    """How often the checkpoint was lost from which it would have gone on."""
    restarts: int = 0
    """How often there was no older one either."""
    unread: int = 0
    """How often in a row the checkpoint could not be read from which it would go on; it is still there."""
    crashes: int = 0
    stranded: int = 0
    """How many of its workers went away, each with its node, since a segment of it ended well."""
    moves: int = 0
    """How many went away in all."""
    timeouts: int = 0
    running: bool = False
    seconds: float = 0.0
    peak_bytes: int = 0
    steps: int = 0
    added_wall: float = 0.0
    """When it was sampled, in seconds since the epoch; for people, nothing is decided by it."""
    ended_wall: float | None = None
    """When its last segment ended, likewise."""

    @property
    def trial_id(self) -> int:
        """Its number, from 0 in the order of sampling."""
        return self.trial.trial_id

    @property
    def loss(self) -> float | None:
        """The loss at the highest finished rung."""
        return self.losses.get(self.rung)

    @property
    def rests(self) -> bool:
        """Its checkpoint is there and cannot be read: nothing is done with it until the run is resumed."""
        return self.unread >= MAX_UNREAD

    @property
    def stuck(self) -> bool:
        """It cannot run now, or never again."""
        return self.dead is not None or self.rests

    @property
    def started(self) -> bool:
        """It has run, or runs now."""
        return self.goal >= 0


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
        states = self.active.values()
        kept = {t.trial_id for t in states if not t.dead and t.trial_id not in self.dropped}
        eta = self.plan.eta if self.plan else 1
        for rung in {t.rung for t in states if t.rung >= 0}:
            if not self.retired.passed[rung] and not any(t.goal > rung and rung in t.losses for t in states):
                continue
            reached = self.retired.reached[rung] + sum(1 for t in states if t.goal >= rung)
            quota = -(-reached // eta) + self._runners_up()
            here = (t for t in states if t.goal == rung and rung in t.losses)
            kept -= {t.trial_id for t in here if self.place(t, rung) > quota}
        return kept - self._beyond_the_disk(kept)

    def _beyond_the_disk(self, kept: set[int]) -> set[int]:
        """Those of the trials whose checkpoints have no room: of each rung's best as many are kept."""
        limit = self.plan.max_held if self.plan else None
        if limit is None:
            return set()
        waiting = {n: t for n in kept if (t := self.trials[n]).checkpoint and not t.running}
        for number in self.full_done:
            waiting.pop(number, None)
        places: dict[int, int] = {}
        for rung in {t.rung for t in waiting.values()}:
            mine = sorted(
                (t.losses[rung], t.trial_id) for t in waiting.values() if t.rung == rung and rung in t.losses
            )
            places |= {number: place for place, (_, number) in enumerate(mine)}

        def rank(state: TrialState) -> tuple[bool, bool, int, int, int]:
            paused, place = state.goal <= state.rung, places.get(state.trial_id, 0)
            return state.trial_id not in self.full_trials, paused, place, -state.rung, state.trial_id

        return {t.trial_id for t in sorted(waiting.values(), key=rank)[limit:]}

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

    def _runners_up(self) -> int:
        plan = self.plan
        return runners_up(plan.budget_seconds / plan.full_seconds, plan.workers) if plan else 0

    def needed_checkpoints(self) -> set[str]:
        """Names of the checkpoints that the run may still want."""
        best = self.incumbent
        if self.closed is not None and self.closed.state == "finished":
            return {best.best_checkpoint} if best and best.best_checkpoint else set()
        return self._needed(self.contenders())

    def _needed(self, contenders: set[int]) -> set[str]:
        best = self.incumbent
        wanted = {best.best_checkpoint} if best else set()
        wanted |= {self.trials[number].checkpoint for number in contenders - set(self.full_done)}
        wanted |= {s.checkpoint_in for segments in self.running.values() for s in segments}
        if not self.unwritten:  # on a full disk spares have to go
            holders = [self.trials[number] for number in sorted(self.holders)]
            wanted |= spares(best, holders) if best else set()
            for number in self.full_trials:
                wanted |= {stand.checkpoint for stand in self.trials[number].held[-2:]}
        return {name for name in wanted if name}

    def _forget(self) -> None:
        """What is not needed now is not on disk from now on."""
        contenders = self.contenders()
        self.dropped |= {t.trial_id for t in self.active.values() if t.rung >= 0 or t.checkpoint} - contenders
        needed = self._needed(contenders)
        for number in list(self.holders):
            state = self.trials[number]
            if any(stand.checkpoint not in needed for stand in state.held):
                state.held = tuple(stand for stand in state.held if stand.checkpoint in needed)
            if not state.held and not state.exported:
                self.holders.remove(number)
        self._retire()

    def _retire(self) -> None:
        for state in list(self.active.values()):
            if (state.dead or state.trial_id in self.dropped) and not state.running:
                del self.active[state.trial_id]
                self.retired.add(state)

    def _recount(self) -> None:
        """Something became of many trials at once."""
        self.active, self.retired = dict(self.trials), Retired()
        self.holders = {t.trial_id for t in self.trials.values() if t.held or t.exported}
        self._retire()

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
        self._recount()

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
        self._rule_out_infeasible()

    def _rule_out_infeasible(self) -> None:
        """What cannot fit never starts."""
        for state in self.candidates:
            if self.plan is not None and problem(self.plan, self.refused, state.trial.params):
                state.dead = "infeasible"

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

    def _on_heartbeat(self, event: Heartbeat, at: float) -> None:
        self.last_beat = event.beat
        self.last_beat_at = at

    def _on_noticed(self, event: Noticed, at: float) -> None:
        self.notices.append((at, event.text))

    def _on_cardwatched(self, event: CardWatched, at: float) -> None:
        self.uses.append(event.use)

    def _on_segmentended(self, event: SegmentEnded, at: float) -> None:
        result = event.result
        segment = self._take_running(event.job_id, result.trial_id)
        self.results.append((segment, result))
        self.result_jobs.append(event.job_id)
        if self.measured is not None:
            self.measured.add(segment, result)
        state = self.trials[result.trial_id]
        state.running = False
        state.ended_wall = self.wall
        state.seconds += sum(result.seconds.values())
        state.peak_bytes = max(state.peak_bytes, result.peak_bytes)
        state.steps += result.steps
        # Whoever made room for other processes may have it back next time.
        if result.micro_batch is not None and not result.yielded:
            state.micro_batch = min(state.micro_batch, result.micro_batch)
            self._note_shrunk(segment, result.micro_batch)
        size = result.began or self.job_sizes[event.job_id]
        if not result.yielded:
            self._note_gang(segment, result, size)
        alone = size == 1
        if event.job_id not in self.running:
            del self.job_sizes[event.job_id], self.running_since[event.job_id]
        state.unread = state.unread + 1 if result.unread else 0
        _OUTCOMES[result.status](self, state, segment, result, alone)
        if result.worker_lost:
            self._strand(state)
        if result.lost:
            self._lose(result.lost, result.detail, at)
        self._note_end_of_full_run(state, segment, result)
        self._note_disk(event.job_id, segment, result)
        self._forget()

    def _note_disk(self, job_id: int, segment: Segment, result: SegmentResult) -> None:
        if result.checkpoint_out not in (None, segment.checkpoint_in):
            self.unwritten.clear()
        if result.unwritten:
            self.unwritten.add(job_id)

    def _on_checkpointlost(self, event: CheckpointLost, at: float) -> None:
        self._lose(event.checkpoint, event.detail, at, exported=event.exported)
        self._forget()

    def _lose(self, name: str, why: str, at: float, *, exported: bool = False) -> None:
        """A checkpoint is no good any more; ``exported``: nor is the adapter that was made from it."""
        done = self.exported
        stands = done is not None and done.checkpoint == name and not exported
        said = [f"checkpoint {name} is lost ({why})"]
        for state in self.trials.values():
            mine = next((s for s in (*state.held, state.exported) if s and s.checkpoint == name), None)
            if mine is None and state.checkpoint != name:
                continue
            if stands and mine is not None and mine.loss is not None:
                state.exported = mine
            elif mine is state.exported:
                state.exported = None
            said.append(fall_back(state, name))
            state.best_loss = state.best_checkpoint = None
        for state in self.trials.values():
            settle(state)
        self._recount()
        self.notices.append((at, "; ".join(filter(None, said))))

    def _note_shrunk(self, segment: Segment, micro_batch: int) -> None:
        """Memory ran out on the way: whoever needs as much starts smaller."""
        if micro_batch >= segment.micro_batch:
            return
        self.shrunk.append((segment.params, micro_batch))
        for state in self.trials.values():
            state.micro_batch = taught(self.shrunk, state.trial.params, state.micro_batch)

    def _note_gang(self, segment: Segment, result: SegmentResult, size: int) -> None:
        """Memory ran out with so many: in training the worker found what fits, else it is at most half."""
        whole = result.status == "out_of_memory" and result.micro_batch is None
        fits = max(1, size // 2) if whole else result.gang
        if fits < size and (whole or result.status == "ok"):
            name = cost_class(segment.params)
            self.gang_limits[name] = min(fits, self.gang_limits.get(name, fits))

    def _take_running(self, job_id: int, trial_id: int) -> Segment:
        segments = self.running[job_id]
        segment = next((s for s in segments if s.trial_id == trial_id), None)
        if segment is None:
            raise KeyError(f"trial {trial_id} in job {job_id}")
        segments.remove(segment)
        if not segments:
            del self.running[job_id]
        return segment

    def _advance(self, state: TrialState, segment: Segment, result: SegmentResult) -> None:
        """A checkpoint was written: take it, and its loss where there is one."""
        if not result.checkpoint_out:
            return
        state.tokens, state.checkpoint = result.tokens, result.checkpoint_out
        if result.loss is not None:
            state.evaluated_tokens = result.tokens
            if self.plan is not None and segment.rung == self.plan.top_rung:
                state.full_losses.append(result.loss)
            if state.best_loss is None or result.loss <= state.best_loss:
                state.best_loss, state.best_checkpoint = result.loss, result.checkpoint_out
                state.best_tokens = result.tokens
        known = result.loss, state.evaluated_tokens, len(state.full_losses)
        self.holders.add(state.trial_id)
        state.held = with_stand(state.held, Stand(result.checkpoint_out, result.tokens, *known))

    def _ended_ok(self, state: TrialState, segment: Segment, result: SegmentResult, alone: bool) -> None:
        self._advance(state, segment, result)
        state.crashes = state.stranded = 0
        if result.tokens < segment.goal_tokens:
            return
        state.rung = max(state.rung, segment.rung)
        if result.loss is not None:
            self._rank(state, segment.rung, result.loss)
            state.example_losses[segment.rung] = result.example_losses

    def _rank(self, state: TrialState, rung: int, loss: float) -> None:
        ranked = self.ranks.setdefault(rung, [])
        if rung in state.losses:
            ranked.remove((state.losses[rung], state.trial_id))
        insort(ranked, (loss, state.trial_id))
        state.losses[rung] = loss

    def _ended_early(self, state: TrialState, segment: Segment, result: SegmentResult, alone: bool) -> None:
        self._advance(state, segment, result)
        if result.status == "timeout":
            # One that got somewhere goes on once, with a limit from what was learned; others hang.
            state.timeouts += 1
            # In a gang any member may be the one that hangs: each goes on alone once.
            if state.timeouts > MAX_TIMEOUTS or (alone and result.tokens <= segment.start_tokens):
                state.dead = "timeout"

    def _ended_diverged(
        self, state: TrialState, segment: Segment, result: SegmentResult, alone: bool
    ) -> None:
        state.dead = "diverged"

    def _ended_out_of_memory(
        self, state: TrialState, segment: Segment, result: SegmentResult, alone: bool
    ) -> None:
        """In training the worker shrinks what it can by itself; elsewhere a gang did not fit, or a base."""
        if is_infeasible(segment, result):
            state.dead = "infeasible"
            self.refused.append(state.trial.params)
            self._rule_out_infeasible()
        elif alone:
            state.micro_batch = max(1, segment.micro_batch // 2)

    def _ended_crashed(self, state: TrialState, segment: Segment, result: SegmentResult, alone: bool) -> None:
        state.crashes += 1
        if state.crashes > MAX_CRASHES:
            state.dead = "crashed"

    def _strand(self, state: TrialState) -> None:
        """Its worker went away. Where there is only one, the engine itself gives up in time."""
        if self.plan is None or self.plan.workers == 1:
            return
        state.stranded += 1
        state.moves += 1
        if state.stranded >= MAX_STRANDED:
            state.dead = state.dead or "crashed"

    def _note_end_of_full_run(self, state: TrialState, segment: Segment, result: SegmentResult) -> None:
        if state.trial_id not in self.full_trials:
            return
        finished = state.full_stop_tokens is not None and state.tokens >= state.full_stop_tokens
        if state.dead or finished or turned_worse(state.full_losses):
            self.full_trials.remove(state.trial_id)
            self.full_done.append(state.trial_id)

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


_OUTCOMES = {
    "ok": History._ended_ok,
    "timeout": History._ended_early,
    "cancelled": History._ended_early,
    "diverged": History._ended_diverged,
    "out_of_memory": History._ended_out_of_memory,
    "crashed": History._ended_crashed,
}


def is_infeasible(segment: Segment, result: SegmentResult) -> bool:
    """Whether one sample of one trial alone did not fit into memory."""
    if result.status != "out_of_memory":
        return False
    if result.micro_batch is not None:  # the worker tried everything smaller
        return result.micro_batch <= 1
    return result.gang == 1 and segment.micro_batch <= 1


def turned_worse(losses: list[float], window: int = 3, margin: float = 0.05) -> bool:
    """The mean of the last ``window`` links is worse than the best earlier one by more than ``margin``.

    Means, because the best of many noisy links is too good to be matched; and a clear margin, because
    the cooldown still lowers the loss.
    """
    means = [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]
    return len(means) > window and means[-1] > min(means[:-window]) * (1 + margin)


def fold(entries: Iterable[Entry]) -> History:
    """The history that a ledger tells.

    Raises:
        LedgerError: an entry contradicts what came before.
    """
    history = History()
    for entry in entries:
        history.apply(entry)
    return history
