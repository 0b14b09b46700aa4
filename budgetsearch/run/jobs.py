"""The jobs of a run: those in flight, calibrations, final scores, and what each second is charged to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from budgetsearch.core.errors import DeviceError, EngineError, ModelError
from budgetsearch.core.events import (
    Charged,
    Event,
)
from budgetsearch.core.policy.deadline import (
    EXIT_SECONDS,
)
from budgetsearch.core.policy.jobs import calibration_job
from budgetsearch.core.policy.minimum import too_small
from budgetsearch.core.policy.planning import another_pays
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.ports import Calibrations, Clock, Engine
from budgetsearch.core.records import Calibration, Job, Phase, Score, SegmentResult, TrainJob
from budgetsearch.core.reports import JobEnded

# -------------------------------------------------------------------------------- in flight


@dataclass
class JobInFlight:
    """A job under way."""

    job: Job
    started: float
    told: float | None = None
    """When it was told to stop."""


@dataclass(frozen=True)
class Landing:
    """The end of a job that is no training."""

    job: Job
    report: JobEnded
    seconds: float
    """How long it took."""


class Interrupted(Exception):
    """Somebody asked the run to stop; everything is recorded."""


@dataclass
class JobsInFlight:
    """Every job that the engine was given and that has not ended."""

    engine: Engine
    clock: Clock
    patience: Callable[[Job], float]
    """How long a job that was told to stop may take to do so, in seconds."""
    under_way: dict[int, JobInFlight] = field(default_factory=dict)
    _landings: list[Landing] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.under_way)

    @property
    def free(self) -> int:
        """How many more jobs can run now; none where workers went away faster than their jobs."""
        return max(0, self.engine.slots - len(self.under_way))

    def launch(self, job: Job) -> None:
        """Give a job to the engine."""
        self.under_way[job.job_id] = JobInFlight(job, self.clock.now())
        self.engine.submit(job)

    def end(self, report: JobEnded) -> JobInFlight:
        """A job has ended."""
        return self.under_way.pop(report.job_id)

    def keep(self, ended: JobInFlight, report: JobEnded) -> None:
        """Keep the answer of a job until somebody asks for it."""
        self._landings.append(Landing(ended.job, report, self.clock.now() - ended.started))

    def landings(self) -> Iterator[Landing]:
        """The answers since the last call."""
        found, self._landings = self._landings, []
        yield from found

    def watch(self) -> None:
        """A job beyond its limit is told to stop, then killed."""
        now = self.clock.now()
        for running in self.under_way.values():
            if now - running.started <= running.job.limit_seconds:
                continue
            if running.told is None:
                running.told = now
                self.engine.cancel(running.job.job_id)
            elif now - running.told > self.patience(running.job):
                self.engine.kill(running.job.job_id)

    def stop(self) -> None:
        """Tell what trains to checkpoint and stop, and end the rest at once: half a measurement is worth
        nothing, and there is no answer to wait for."""
        for running in list(self.under_way.values()):
            if isinstance(running.job, TrainJob):
                self.engine.cancel(running.job.job_id)
            else:
                self.engine.kill(running.job.job_id)
                del self.under_way[running.job.job_id]


# ----------------------------------------------------------------------------- calibrations

ATTEMPTS = 2
"""A calibration whose process died is tried again: a card may be busy for a moment."""
FALLBACK_LIMIT = 0.5
"""Before there is a plan, one calibration may take this share of what is left at most, ..."""
FIRST_LIMIT = 0.8
"""... and the first one this: without it there is nothing, and what it took is known to the next run."""
LATE_FACTOR = 2.0
"""A measurement that was not done in its time is taken to need so many times the budget, or so many times
what has passed where that is more."""
ONE_IS_ENOUGH = "there is too little time for a search, so it was not measured"


def to_measure(quantizations: Iterable[str], known: Mapping[str, Calibration]) -> list[str]:
    """Those of which nothing is known yet, or only that the process died."""
    return [name for name in quantizations if name not in known or known[name].status == "crashed"]


def check_usable(known: Mapping[str, Calibration], budget_seconds: float, now: float) -> None:
    """Insist that there is anything to train; ``now``: seconds since the run began.

    Raises:
        BudgetError: the base model takes most of the budget to load and measure.
        DeviceError: the base model does not fit into memory.
        EngineError: no quantization of the base model works here.
        ModelError: nor will any at another try.
    """
    if any(found.status == "ok" for found in known.values()):
        return
    if any(found.status == "timeout" for found in known.values()):
        longer = LATE_FACTOR * max(now, budget_seconds)
        raise too_small(budget_seconds, longer, guessed="measuring came to no end")
    why = "; ".join(f"{found.quantization}: {found.status} {found.detail}" for found in known.values())
    if all(found.status == "refused" for found in known.values()):
        reasons: dict[str, list[str]] = {}
        for found in known.values():
            reasons.setdefault(found.detail, []).append(found.quantization)
        told = "\n".join(f"  {', '.join(names)}: {detail[:400]}" for detail, names in reasons.items())
        raise ModelError(
            f"This base model cannot be trained here, and another try would end the same:\n{told}"
        )
    if all(found.status == "out_of_memory" for found in known.values()):
        raise DeviceError(
            f"The base model does not fit. {why}. Use a smaller --model, a shorter --max-length, a "
            "--space with nf4, or a larger card; `budgetsearch plan` shows what fits."
        )
    raise EngineError(f"No quantization of the base model can be trained here. {why}")


class NothingKept:
    """Every run measures anew; see the port ``Calibrations``."""

    def find(self, quantization: str) -> Calibration | None:
        """Nothing was kept."""
        return None

    def keep(self, found: Calibration) -> None:
        """It is gone with the run."""


@dataclass
class Calibrator:
    """Measures one quantization after the other, on as many workers as there are."""

    request: PlanRequest
    clock: Clock
    dispatch: Callable[[Job], None]
    """Gives a job to a free worker."""
    note: Callable[[Calibration], None]
    """Writes down what was found."""
    waiting: list[str]
    """Quantizations still to be measured, in this order."""
    known: Callable[[], Mapping[str, Calibration]]
    """What was found up to now."""
    kept: Calibrations
    """What earlier runs found."""
    _attempts: Counter[str] = field(init=False)
    _jobs: int = 0
    _last: float = 0.0
    """Seconds that the last measurement took."""

    def __post_init__(self) -> None:
        self._attempts = Counter(self.waiting)

    def begin(self) -> None:
        """Begin with the next quantization, unless an earlier run measured it, or it is foreseen that nothing
        of it fits, or what is known leaves no time to compare it with anything."""
        measured = any(found.status == "ok" for found in self.known().values())
        left = self.request.budget_seconds - self.clock.now()
        limit = (FALLBACK_LIMIT if measured else FIRST_LIMIT) * left
        name = self.waiting.pop(0)
        job = calibration_job(self.request, name, -1 - self._jobs, limit)
        if isinstance(job, Calibration):
            self.note(job)
        elif (kept := self.kept.find(name)) is not None:
            self.note(kept)
        elif limit <= 0 or not another_pays(self.request, self.known(), self.clock.now(), self._last):
            self.note(Calibration(name, "timeout", detail=ONE_IS_ENOUGH))
        else:
            self._jobs += 1
            self.dispatch(job)

    def take(self, landing: Landing) -> None:
        """A measurement has ended; one whose process died waits once more, unless it was ended for being
        slow."""
        (found,) = landing.report.results
        assert isinstance(found, Calibration)
        limit, self._last = landing.job.limit_seconds, landing.seconds
        if landing.seconds > limit and not found.sound:
            why = f"measuring it took more than {limit:.0f} s"
            found = Calibration(found.quantization, "timeout", detail=why)
        self.note(found)
        self.kept.keep(found)
        if found.status == "crashed" and self._attempts[found.quantization] < ATTEMPTS:
            self._attempts[found.quantization] += 1
            self.waiting.insert(0, found.quantization)

    def await_worker(self) -> None:
        """Nobody is there to measure anything: somebody may come (back) as long as there is time.

        Raises:
            EngineError: there is none left.
        """
        if self.clock.now() >= self.request.budget_seconds - EXIT_SECONDS:
            raise EngineError(
                f"No worker was there to measure {self.waiting[0]}, and none came until the deadline. "
                "`ray status` shows which machines the cluster has; start the run again when it has some."
            )


# ----------------------------------------------------------------------------- final scores


def limit_of(seconds: float, patience: float) -> float:
    """How long a score may take where ``seconds`` are left for scores; one that then does not hear that it
    is to stop is killed after ``patience`` seconds more.

    The kill falls within the scores' own time. Where that is little, a third of it is kept for the kill: the
    rest of the patience, itself a third of what export and exit have at most, is theirs.
    """
    return seconds - min(patience, max(0.0, seconds) / 3)


@dataclass
class Scorer:
    """Takes every score, on as many workers as there are, and tells them in the order of the jobs."""

    dispatch: Callable[[Job], None]
    """Gives a job to a free worker."""
    note: Callable[[Score], None]
    """Writes down what was found."""
    waiting: list[Job]
    """What is still to be scored, the losses first."""
    several: bool
    """Whether there are several workers: then one that crashed may have gone away with its node."""
    _order: list[int] = field(init=False)
    _found: dict[int, Score] = field(default_factory=dict)
    _again: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._order = [job.job_id for job in self.waiting]

    def begin(self, limit_seconds: float) -> None:
        """Begin with the next score, which may take so many seconds."""
        self.dispatch(replace(self.waiting.pop(0), limit_seconds=limit_seconds))

    def give_up(self) -> None:
        """There is no time for what has not begun."""
        late = {job.job_id for job in self.waiting}
        self._order = [number for number in self._order if number not in late]
        self.waiting.clear()

    def take(self, landing: Landing) -> None:
        """A score has ended; on several workers one that crashed is taken once more."""
        number = landing.job.job_id
        (outcome,) = landing.report.results
        assert isinstance(outcome, Score)
        if outcome.status == "crashed" and self.several and number not in self._again:
            self._again.add(number)
            self.waiting.insert(0, landing.job)
        else:
            self._found[number] = outcome

    def tell(self) -> None:
        """Write down what has ended, as far as all before it has."""
        while self._order and self._order[0] in self._found:
            self.note(self._found[self._order.pop(0)])


# -------------------------------------------------------------------------- what is charged


@dataclass
class Charges:
    """Charges the time that passes; the events add up to the time of the last of them."""

    clock: Clock
    append: Callable[[Event], None]
    """Writes an event to the ledger."""
    until: float = 0.0
    """Up to here all is charged, in active seconds of the run."""

    def result(self, result: SegmentResult) -> None:
        """Charge what the worker measured, never more than what has passed."""
        passed = max(0.0, self.clock.now() - self.until)
        measured = sum(result.seconds.values())
        scale = min(1.0, passed / measured) if measured > 0 else 0.0
        for phase, seconds in result.seconds.items():
            self.charge(phase, seconds * scale, result.trial_id)  # type: ignore[arg-type]

    def rest(self, phase: Phase) -> None:
        """Charge everything since the last charge to one phase."""
        self.charge(phase, self.clock.now() - self.until)

    def charge(self, phase: Phase, seconds: float, trial_id: int | None = None) -> None:
        """Charge so many seconds, to a trial where they are one's."""
        if seconds > 0:
            self.until += seconds
            self.append(Charged(phase, seconds, trial_id))


def as_timeout(result: SegmentResult) -> SegmentResult:
    """The result of a segment that the watchdog stopped."""
    return replace(result, status="timeout", detail=result.detail or "stopped at its time limit")


def has_crashed(result: object) -> bool:
    """Its worker died with it."""
    return getattr(result, "status", "") == "crashed"


def is_well(result: object) -> bool:
    """It ended as it should."""
    return getattr(result, "status", "") == "ok"
