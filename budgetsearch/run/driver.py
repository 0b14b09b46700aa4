"""The loop: decide, propose, dispatch, record. It knows only ports and the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from budgetsearch.core.decisions import Finish, NeedCandidates, Run
from budgetsearch.core.errors import LedgerError
from budgetsearch.core.events import (
    Calibrated,
    CardWatched,
    Closed,
    Decided,
    Event,
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
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.deadline import grace_seconds, landing_seconds, seconds_left, watchdog_patience
from budgetsearch.core.policy.decide import IN_VAIN, decide
from budgetsearch.core.policy.jobs import new_trial, score_jobs
from budgetsearch.core.policy.planning import make_plan
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.ports import Calibrations, Clock, Engine, Exporter, Sampler
from budgetsearch.core.records import Calibration, Job, Score, SegmentResult, TrainJob
from budgetsearch.core.reports import Beat, JobEnded, Notice, Report
from budgetsearch.core.results import untrained
from budgetsearch.core.secrets import without_secrets
from budgetsearch.run.incumbent import Incumbent
from budgetsearch.run.jobs import (
    Calibrator,
    Charges,
    Interrupted,
    JobsInFlight,
    NothingKept,
    Scorer,
    as_timeout,
    check_usable,
    has_crashed,
    is_well,
    limit_of,
    to_measure,
)
from budgetsearch.run.notices import told_at_start
from budgetsearch.storage.ledger import Ledger

POLL_SECONDS = 0.5
"""How long the loop waits for a report before it looks at the clock again."""
SILENCE_SECONDS = 5.0
"""While a job is silent (loading, evaluating) the driver itself notes so often that time passes."""


@dataclass
class Driver:
    """Runs one search from its opening to its end; every step of it stands in the ledger."""

    ledger: Ledger
    engine: Engine
    sampler: Sampler
    exporter: Exporter
    clock: Clock
    request: PlanRequest
    opened: Opened
    quantizations: Sequence[str]
    planner: Callable[[PlanRequest, Mapping[str, Calibration], float], Plan] = make_plan
    """From the request, the calibrations and the seconds they took to the plan."""
    stop_requested: Callable[[], str] = lambda: ""
    """The name of the signal that asked the run to stop, or nothing."""
    down_seconds: float = 0.0
    """What passed since the last process of this run, where that counts."""
    wishes: Callable[[History, Plan], Iterable[Event]] = lambda history, plan: ()
    """What a person asks for while the run goes."""
    kept: Calibrations = NothingKept()  # noqa: RUF009
    """What earlier runs measured."""
    grace_seconds: float = 30.0
    """A job that was told to stop has so long to checkpoint, two optimizer steps at the least."""

    def __post_init__(self) -> None:
        self._incumbent = Incumbent(self.exporter, self._append, lambda: self.history)
        self._in_flight = JobsInFlight(self.engine, self.clock, self._patience)
        self._charges = Charges(self.clock, self._append)
        self._improved = self._untidy = self._fresh = False
        self._last_append = 0.0

    # -------------------------------------------------------------------- the phases

    def run(self) -> History:
        """Search until the budget is used; returns the history.

        Raises:
            BudgetError: the budget is below the measured minimum.
            DeviceError: the base model does not fit into memory.
            EngineError: no quantization of the base model works here.
            DiskError: the disk is full, even after what nothing needs was removed.
        """
        try:
            self._work()
        except LedgerError:
            self.engine.close()
            raise
        except Exception as error:
            self._abandon()
            self._close("failed", without_secrets(f"{type(error).__name__}: {error}"))
            raise
        return self.history

    def _work(self) -> None:
        try:
            self._open()
            self._calibrate()
            plan = self._plan()
            reason = self._search(plan)
            self._finish(self.history.plan or plan, reason)
        except Interrupted as asked:
            self._land()
            self._close("interrupted", "stopped on request", str(asked))

    @property
    def history(self) -> History:
        """The fold of the ledger."""
        return self.ledger.history

    def _open(self) -> None:
        if self.history.opened is None:
            self._append(self.opened)
            self._charges.rest("setup")
            return
        self._charges.until = sum(self.history.charged.values())
        self._charges.charge("crash", self.history.spent - self._charges.until)
        self._charges.charge("down", min(self.down_seconds, self.clock.now() - self._charges.until))
        self._append_lost_segments()
        self._append(Resumed())
        if self.request.budget_seconds != self.history.opened.budget_seconds:
            self._append(Rescheduled(self.request.budget_seconds))
        self._incumbent.look_round()
        # The process may have been killed between a result and its export, or the adapter been damaged.
        self._incumbent.export_meanwhile()
        self._charges.rest("setup")

    def _append_lost_segments(self) -> None:
        """Segments that a killed process left behind: they start again from their checkpoints."""
        for job_id, segments in list(self.history.running.items()):
            for segment in list(segments):
                why = "the process was killed; the segment starts again from its checkpoint"
                self._append(SegmentEnded(job_id, untrained(segment, "cancelled", why)))

    def _calibrate(self) -> None:
        if self.history.plan is not None:
            return
        waiting = to_measure(self.quantizations, self.history.calibrations)
        measuring = Calibrator(
            self.request,
            self.clock,
            self._dispatch,
            self._note_calibration,
            waiting,
            lambda: self.history.calibrations,
            self.kept,
        )
        while measuring.waiting or self._in_flight:
            self._obey_stop()
            while measuring.waiting and self._in_flight.free:
                measuring.begin()
            if measuring.waiting and not self._in_flight:
                measuring.await_worker()
            if measuring.waiting or self._in_flight:
                self._wait()
            for landing in self._in_flight.landings():
                measuring.take(landing)

    def _note_calibration(self, found: Calibration) -> None:
        self._append(Calibrated(found))
        self._charges.rest("calibrate")

    def _plan(self) -> Plan:
        if self.history.plan is not None:
            return self.history.plan
        check_usable(self.history.calibrations, self.request.budget_seconds, self.clock.now())
        request = replace(self.request, workers=max(1, self.engine.slots))
        plan = self.planner(request, self.history.calibrations, self.clock.now())
        self._append(Planned(plan))
        for text in told_at_start(plan, self.request):
            self._append(Noticed(text))
        return plan

    def _search(self, plan: Plan) -> str:
        """Until there is nothing left to run; returns why."""
        while True:
            self._obey_stop()
            self._incumbent.check_disk()
            plan = self._count_workers(plan)
            for event in self.wishes(self.history, plan):
                self._append(event)
            now, slots = self.clock.now(), self._in_flight.free
            if not slots and (self._in_flight or seconds_left(plan, now) > 0):
                self._pause()  # even if no worker is left: one may come back
                continue
            decision = decide(plan, self.history, self.history.candidates, now, slots)
            if isinstance(decision, Run):
                self._append(Decided(now, slots, decision))
                self._dispatch(decision.job)
            elif isinstance(decision, NeedCandidates):
                self._append(Decided(now, slots, decision))
                self._propose(plan, decision.count)
            elif isinstance(decision, Finish):
                self._append(Decided(now, slots, decision))
                return decision.reason
            else:
                self._pause()

    def _count_workers(self, plan: Plan) -> Plan:
        """Write down how many workers there are, if that has changed; returns the plan that holds now."""
        if self.engine.slots != self.history.workers:
            self._append(WorkersChanged(self.engine.slots))
        return self.history.plan or plan

    def _pause(self) -> None:
        self._tidy()
        self._wait()
        # Else the free workers come first, but for the first adapter: until it stands there is none.
        if not self._several or self.history.exported is None:
            self._tidy()

    def _propose(self, plan: Plan, count: int) -> None:
        first = len(self.history.trials)
        proposals = self.sampler.propose(self.history, plan.seed, first, count)
        for number, proposal in enumerate(proposals, start=first):
            self._append(TrialAdded(new_trial(plan, number, proposal, self.history.measured)))

    def _finish(self, plan: Plan, reason: str) -> None:
        if (best := self._incumbent.best()) is not None:
            self._score(plan, best)
        if self._incumbent.export(final=True) is None:
            self._charges.rest("idle")
            self._close("failed", f"{reason}, {IN_VAIN}")
            return
        self._charges.rest("export")
        self._close("finished", reason)

    def _score(self, plan: Plan, best: TrialState) -> None:
        done = self.history.exported
        # Of a lost checkpoint the exported adapter may be all that is left.
        folder = done.path if done and best.exported and best.exported.name == done.checkpoint else ""
        jobs = score_jobs(plan, best, self.history.next_job, folder, self.history.score)

        def note(outcome: Score) -> None:
            self._append(Scored(outcome, best.trial_id, str(best.best_checkpoint)))
            self._charges.rest("score")

        scoring = Scorer(self._dispatch, note, [*jobs], self._several)
        while scoring.waiting or self._in_flight:
            self._obey_stop()
            limit = 0.0
            if scoring.waiting:
                limit = limit_of(self._score_seconds(plan), self._patience(scoring.waiting[0]))
            if scoring.waiting and limit <= 0:
                scoring.give_up()
            elif scoring.waiting and self._in_flight.free:
                scoring.begin(limit)
            else:
                self._wait()
            for landing in self._in_flight.landings():
                scoring.take(landing)
            scoring.tell()

    def _score_seconds(self, plan: Plan) -> float:
        """What may still go into the scores, so that the export and the exit stay."""
        return plan.budget_seconds - self.clock.now() - (plan.reserve_seconds - plan.score_seconds)

    # ---------------------------------------------------------------- jobs in flight

    @property
    def _several(self) -> bool:
        return self.history.plan is not None and self.history.plan.workers > 1

    def _dispatch(self, job: Job) -> None:
        if isinstance(job, TrainJob):
            for segment in job.segments:
                self._append(SegmentStarted(job.job_id, segment))
        if not self._in_flight:  # else the others have used the time
            self._charges.rest("idle")
        self._in_flight.launch(job)

    def _wait(self) -> None:
        for report in self.engine.poll(POLL_SECONDS):
            if isinstance(report, Beat):
                self._append(Heartbeat(report))
            else:
                self._take(report)
        if self._in_flight and self.clock.now() - self._last_append > SILENCE_SECONDS:
            self._append(Heartbeat(Beat(next(iter(self._in_flight.under_way)), None, "busy")))
        self._in_flight.watch()

    def _grace(self) -> float:
        plan = self.history.plan
        return grace_seconds(plan, self.grace_seconds) if plan else self.grace_seconds

    def _patience(self, job: Job) -> float:
        plan = self.history.plan
        if plan is None:  # half of the time is gone
            return min(self._grace(), (self.request.budget_seconds - self.clock.now()) / 4)
        return watchdog_patience(plan, self._grace(), job)

    def _take(self, report: Report) -> None:
        """Record what is more than a sign of life."""
        if isinstance(report, Notice):
            self._append(Noticed(report.text))
        elif isinstance(report, JobEnded) and report.job_id in self._in_flight.under_way:
            if report.use is not None:
                self._append(CardWatched(report.job_id, report.use))
            self._ended(report)

    def _ended(self, report: JobEnded) -> None:
        ended = self._in_flight.end(report)
        if not isinstance(ended.job, TrainJob):
            self._in_flight.keep(ended, report)
            return
        before = self.history.incumbent
        previous = before.best_checkpoint if before else None
        for result in report.results:
            if isinstance(result, SegmentResult):
                late = result.status == "cancelled" and ended.told is not None
                self._append(SegmentEnded(report.job_id, as_timeout(result) if late else result))
                self._charges.result(result)
        fresh, self._fresh = self._fresh, any(has_crashed(r) for r in report.results)
        if not self._in_flight:  # else it belongs to those that still run
            # A crash costs its job, and the start of the worker that takes the next one.
            well = not fresh and all(is_well(r) for r in report.results)
            self._charges.rest("idle" if well else "crash")
        best = self.history.incumbent
        self._improved |= best is not None and best.best_checkpoint != previous
        self._untidy = True

    def _tidy(self) -> None:
        """Keep the best adapter on disk and remove what nothing needs, if a segment has ended."""
        if not self._untidy:
            return
        start = self.clock.now()
        if self._improved:
            self._incumbent.export_meanwhile()
        self._incumbent.sweep()
        self._improved = self._untidy = False
        if self._in_flight:
            start = max(start, self._charges.until)
            self._charges.charge("export", self.clock.now() - start)
        else:
            self._charges.rest("export")

    # ---------------------------------------------------------------------- stopping

    def _obey_stop(self) -> None:
        if asked := self.stop_requested():
            raise Interrupted(asked)

    def _land(self) -> None:
        """Tell what trains to checkpoint, wait for it as long as the budget allows, end the rest at once."""
        self._in_flight.stop()
        now = self.clock.now()
        until = now + landing_seconds(self.history.plan, self.request.budget_seconds, self._grace(), now)
        while self._in_flight and (left := until - self.clock.now()) > 0:
            for report in self.engine.poll(min(POLL_SECONDS, left)):
                self._take(report)
            self._tidy()
        self._abandon()

    def _abandon(self) -> None:
        """Write down that whatever still runs is lost."""
        self._in_flight.under_way.clear()
        self._append_lost_segments()

    def _close(self, state: str, reason: str, asked: str = "") -> None:
        self._charges.rest("crash" if state == "failed" else "idle")
        self.engine.close()
        self._charges.rest("export")
        self._append(Closed(state, reason, asked))  # type: ignore[arg-type]
        self._incumbent.sweep()

    # ---------------------------------------------------------------------- the ledger

    def _append(self, event: Event) -> None:
        self._last_append = self.ledger.append(event, self.clock).at
