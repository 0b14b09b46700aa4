"""The real policy played in virtual time on what was guessed: what the hours would become."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from budgetsearch.core.events import Calibrated, Entry, Opened, Planned, Scored, SegmentStarted
from budgetsearch.core.history.history import History
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.jobs import MAX_ANSWERS
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.ports import Proposal
from budgetsearch.core.records import CalibrateJob, Calibration, Job, Score, ScoreJob, Segment, SegmentResult
from budgetsearch.core.reports import Report
from budgetsearch.core.resources.memory import problem
from budgetsearch.core.space.space import Space
from budgetsearch.engines.simulator import Result, SimulatorEngine, VirtualClock, usual_loss
from budgetsearch.run.driver import Driver
from budgetsearch.run.foresight import measuring_seconds
from budgetsearch.run.incumbent import NoExport
from budgetsearch.storage.ledger import MemoryLedger

FAILED_SECONDS = 60.0
"""What it takes to find out that a quantization does not fit."""


@dataclass(frozen=True)
class Phase:
    """A part of the run on the clock."""

    name: str
    start: float
    """Seconds from the beginning."""
    seconds: float


@dataclass(frozen=True)
class Rehearsal:
    """What a run would become if every guess were right."""

    plan: Plan
    trials: tuple[int, ...]
    """How many reached each rung, the full run last."""
    phases: tuple[Phase, ...]
    full_tokens: int
    """Of the best trial's full run."""
    spent_seconds: float


class PriorSampler:
    """Configurations from the priors alone; implements the port ``Sampler``."""

    def propose(self, history: History, seed: int, first_number: int, count: int) -> list[Proposal]:
        """``count`` configurations, of what is known to fit."""
        plan = history.plan
        assert plan is not None
        space = Space.parse(plan.space)
        return [self._one(space, plan, history, seed, first_number + k) for k in range(count)]

    def _one(self, space: Space, plan: Plan, history: History, seed: int, number: int) -> Proposal:
        chance = random.Random(f"{seed}/{number}")
        for _ in range(100):
            params = space.from_unit({name: chance.random() for name in space.searched})
            if problem(plan, history.refused, params) is None:
                break
        return Proposal(params, "prior")


class _Leaps(SimulatorEngine):
    """Goes from one end to the next, however far that is: a day has many half seconds."""

    def poll(self, timeout: float) -> Sequence[Report]:
        """See the port."""
        return super().poll(math.inf if self._running else timeout)


@dataclass
class _World:
    """Jobs take what the calibrations say; losses are made up, for some trial must win."""

    calibrations: Mapping[str, Calibration]
    request: PlanRequest

    def perform(self, job: Job) -> tuple[tuple[Result, ...], float]:
        """The results, and the seconds until they are there."""
        found = self.calibrations[job.quantization]
        if isinstance(job, CalibrateJob):
            if found.status != "ok":
                return (found,), FAILED_SECONDS
            return (found,), measuring_seconds(found, self.request, job.limit_seconds)
        if isinstance(job, ScoreJob):
            losses = 2 * job.eval_examples * found.eval_seconds_per_example
            answers = min(2 * MAX_ANSWERS * found.answer_seconds, job.limit_seconds)
            score = Score("ok", job.quantization, 2.0, 1.0)
            return (score,), losses if job.eval_examples else answers
        results = tuple(self._train(segment, found, job.eval_examples) for segment in job.segments)
        return results, sum(sum(result.seconds.values()) for result in results)

    def interrupt(self, job: Job, share: float) -> tuple[Result, ...] | None:
        """Nobody stops anything here: whatever starts, fits."""
        return None

    def _train(self, segment: Segment, found: Calibration, examples: int) -> SegmentResult:
        seconds = {
            "train": (segment.stop_tokens - segment.start_tokens) / found.tokens_per_second,
            "evaluate": examples * found.eval_seconds_per_example if segment.evaluate else 0.0,
            "checkpoint": 0.0 if segment.only_grades else found.checkpoint_seconds,
            "score": segment.answers * found.answer_seconds,
        }
        loss = usual_loss(segment, segment.stop_tokens) if segment.evaluate else None
        return SegmentResult(
            segment.trial_id,
            segment.rung,
            "ok",
            segment.stop_tokens,
            loss=loss,
            example_losses=() if loss is None else (loss,) * min(examples, 16),
            seconds=seconds,
            metric=(0.5,) * segment.answers,
            checkpoint_out=f"{segment.trial_id}-{segment.stop_tokens}",
        )


def rehearse(
    request: PlanRequest,
    calibrations: Mapping[str, Calibration],
    setup_seconds: float,
    workers: int = 1,
) -> Rehearsal:
    """Play the run in virtual time; ``workers`` are alike, one card each.

    Raises:
        BudgetError: the budget is below the minimum that the guesses come to.
        EngineError: no quantization fits.
    """
    clock, ledger = VirtualClock(setup_seconds), MemoryLedger()
    driver = Driver(
        ledger=ledger,
        engine=_Leaps(_World(calibrations, request), clock, workers),
        sampler=PriorSampler(),
        exporter=NoExport(),
        clock=clock,
        request=request,
        opened=Opened(request.budget_seconds, {}),
        quantizations=list(calibrations),
    )
    history = driver.run()
    plan = history.plan
    assert plan is not None
    best = history.incumbent
    return Rehearsal(
        plan=plan,
        trials=tuple(
            sum(1 for t in history.trials.values() if t.goal >= rung) for rung in range(len(plan.ladder))
        ),
        phases=tuple(_phases(ledger.entries, plan, history.spent)),
        full_tokens=best.tokens if best else 0,
        spent_seconds=history.spent,
    )


def _phases(entries: Sequence[Entry], plan: Plan, end: float) -> list[Phase]:
    """When each part begins; one that never does is left out."""
    top = plan.top_rung
    marks: dict[str, float] = {"setup": 0.0}
    for entry in entries:
        event = entry.event
        if isinstance(event, Opened):
            marks.setdefault("calibration", entry.at)
        elif isinstance(event, Planned):
            marks.setdefault("search", entry.at)
        elif isinstance(event, SegmentStarted) and event.segment.rung == top:
            marks.setdefault("full run and finalists", entry.at)
        elif isinstance(event, Scored):
            marks["scores and export"] = min(marks.get("scores and export", entry.at), entry.at)
    if "scores and export" in marks:  # it begins where the last segment ended
        last = max((e.at for e in entries if isinstance(e.event, (SegmentStarted, Calibrated))), default=0.0)
        ended = [e.at for e in entries if e.at >= last and type(e.event).__name__ == "SegmentEnded"]
        marks["scores and export"] = max(ended, default=marks["scores and export"])
    names = list(marks)
    stops = [*list(marks.values())[1:], end]
    return [Phase(name, marks[name], stop - marks[name]) for name, stop in zip(names, stops, strict=True)]
