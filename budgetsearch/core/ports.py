"""What the driver knows of the world: small protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from budgetsearch.core.events import Entry
from budgetsearch.core.records import Calibration, Job, Params
from budgetsearch.core.reports import Report

if TYPE_CHECKING:
    from budgetsearch.core.history.history import History
    from budgetsearch.core.history.trial import TrialState


class Clock(Protocol):
    """Active seconds of the run."""

    def now(self) -> float:
        """Seconds since the run began, monotonic, summed over its processes."""
        ...


class Engine(Protocol):
    """What executes jobs: a local worker process, the simulator, or Ray."""

    @property
    def slots(self) -> int:
        """How many jobs can run at once."""
        ...

    def submit(self, job: Job) -> None:
        """Start a job on a free slot.

        Raises:
            EngineError: the engine cannot execute jobs any more.
        """
        ...

    def poll(self, timeout: float) -> Sequence[Report]:
        """Reports that have arrived; waits up to ``timeout`` seconds for the first one."""
        ...

    def cancel(self, job_id: int) -> None:
        """Ask a running job to checkpoint and stop; its ``JobEnded`` still comes."""
        ...

    def kill(self, job_id: int) -> None:
        """End a job that does not answer; its ``JobEnded`` comes with status crashed."""
        ...

    def close(self) -> None:
        """End every process; safe to call twice."""
        ...


@dataclass(frozen=True)
class Proposal:
    """A configuration that a sampler suggests, and the rule that found it."""

    params: Params
    origin: str
    max_tokens: int | None = None
    """Length of its own full run, where the configuration decides it (a recorded run of fewer epochs)."""
    entry: int = 0
    """The rung at which it enters at the earliest: a sampler knows that it would not be promoted below, and
    thinks it worth its seconds all the same."""


class Sampler(Protocol):
    """A pure function of its arguments: the same history and seed give the same proposals."""

    def propose(self, history: History, seed: int, first_number: int, count: int) -> list[Proposal]:
        """``count`` configurations for the trials ``first_number`` and following."""
        ...


Say = Callable[[str], None]
"""Takes one line about what is going on."""


class Watcher(Protocol):
    """Whoever wants to see the ledger grow: the progress display, the Optuna mirror."""

    def see(self, entry: Entry, history: History) -> None:
        """Called after every event, with the history that includes it."""
        ...


class Calibrations(Protocol):
    """What earlier runs measured on this machine."""

    def find(self, quantization: str) -> Calibration | None:
        """What holds for this run too; None if it must be measured."""
        ...

    def keep(self, found: Calibration) -> None:
        """Keep what this run has measured, if that can be."""
        ...


class Exporter(Protocol):
    """Writes adapters where the user finds them."""

    def export(self, history: History, state: TrialState, *, final: bool) -> str:
        """Put the trial's best checkpoint on disk as a PEFT adapter; returns its path.

        Raises:
            CheckpointError: what it would be made from is missing or damaged.
            UnreadableError: that cannot be read now.
            DiskError: it cannot be written.
        """
        ...

    def damage(self, state: TrialState) -> str:
        """What is wrong with that from which the trial's adapter would be made; nothing if it is whole.

        Raises:
            UnreadableError: it cannot be read now.
        """
        ...

    def stands(self, checkpoint: str) -> bool:
        """Whether the exported adapter is whole and was made from this checkpoint.

        Raises:
            UnreadableError: it cannot be read now.
        """
        ...

    def missing(self, names: Iterable[str]) -> Mapping[str, str]:
        """Which of these checkpoints are obviously not whole, and why; sums are not looked at. One that
        cannot be read now is not among them."""
        ...

    def sweep(self, history: History) -> None:
        """Remove the checkpoints that nothing needs any more."""
        ...
