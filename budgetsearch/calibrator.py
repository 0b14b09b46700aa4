"""Before there is a plan: which quantizations are still to be measured, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from budgetsearch.core.budget import EXIT_SECONDS, PlanRequest, calibration_job
from budgetsearch.core.errors import BudgetError, DeviceError, EngineError
from budgetsearch.core.ports import Clock
from budgetsearch.core.records import Calibration, Job
from budgetsearch.flights import Landing

ATTEMPTS = 2
"""A calibration whose process died is tried again: a card may be busy for a moment."""
FALLBACK_LIMIT = 0.5
"""Before there is a plan, one calibration may take this share of the budget at most."""


def to_measure(quantizations: Iterable[str], known: Mapping[str, Calibration]) -> list[str]:
    """Those of which nothing is known yet, or only that the process died."""
    return [name for name in quantizations if name not in known or known[name].status == "crashed"]


def check_usable(known: Mapping[str, Calibration]) -> None:
    """Whether there is anything to train.

    Raises:
        DeviceError: the base model does not fit into memory.
        EngineError: no quantization of the base model works here.
    """
    if any(found.status == "ok" for found in known.values()):
        return
    why = "; ".join(f"{found.quantization}: {found.status} {found.detail}" for found in known.values())
    if all(found.status == "out_of_memory" for found in known.values()):
        raise DeviceError(
            f"The base model does not fit. {why}. Use a smaller --model, a shorter --max-length, a "
            "--space with nf4, or a larger card; `budgetsearch plan` shows what fits."
        )
    raise EngineError(f"No quantization of the base model can be trained here. {why}")


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
    _attempts: Counter[str] = field(init=False)
    _jobs: int = 0

    def __post_init__(self) -> None:
        self._attempts = Counter(self.waiting)

    def begin(self) -> None:
        """Begin with the next quantization, unless it is foreseen that nothing of it fits.

        Raises:
            BudgetError: there is no time for it.
        """
        limit = FALLBACK_LIMIT * (self.request.budget_seconds - self.clock.now())
        job = calibration_job(self.request, self.waiting.pop(0), -1 - self._jobs, limit)
        if isinstance(job, Calibration):
            self.note(job)
            return
        self._jobs += 1
        if limit <= 0:
            raise self._too_small()
        self.dispatch(job)

    def take(self, landing: Landing) -> None:
        """A measurement has ended; one whose process died waits once more.

        Raises:
            BudgetError: it took more than half of what was left.
        """
        if landing.seconds > landing.job.limit_seconds:
            raise self._too_small()
        (found,) = landing.report.results
        assert isinstance(found, Calibration)
        self.note(found)
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

    def _too_small(self) -> BudgetError:
        minimum = 4 * self.clock.now()
        return BudgetError(
            f"A budget of {self.request.budget_seconds:.0f} s is too small here: loading and measuring "
            f"the base model takes more than half of it. Use --hours {minimum / 3600:.3f} or more.",
            minimum,
        )
