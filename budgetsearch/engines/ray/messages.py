"""What the driver, the fleet and its lanes say to each other: JSON-able records, nothing pickled.

A *lane* is one GPU of the fleet: a Ray Tune trial that lives as long as the run. The *fleet* is the process
beside the driver that owns Ray. A job that was placed on a lane carries a token; whatever comes back with
another one belongs to a job that has been given up, and is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

from budgetsearch.core.records import Job, WorkerSetup
from budgetsearch.core.reports import Report
from budgetsearch.machine.detect import Card


@dataclass(frozen=True)
class FleetSpec:
    """What the fleet's process is to start; the first line on its pipe."""

    lanes: int
    """0: one for each GPU that Ray sees, or one."""
    folder: str
    """Where Ray Tune's results go, on the driver's machine."""
    log: str
    """Log of a lane's worker process, with ``{lane}`` for its number."""
    gpu: str = "cpu"
    """The card profile; ``cpu``: lanes take CPUs alone."""
    address: str = ""
    """A cluster that runs already; empty: a local one is started, and ended with the run."""
    worker: str = "budgetsearch.engines.worker"
    """The module that a lane runs as its worker process."""


# ------------------------------------------------------------- from the driver to a lane


@dataclass(frozen=True)
class Take:
    """Run this job."""

    lane: str
    token: str
    setup: WorkerSetup
    job: Job


@dataclass(frozen=True)
class Halt:
    """Ask the job to checkpoint and stop."""

    lane: str
    token: str


@dataclass(frozen=True)
class Strike:
    """End the job with its worker process."""

    lane: str
    token: str


ToLane = Take | Halt | Strike

# ------------------------------------------------------------- from a lane to the driver


@dataclass(frozen=True)
class Hello:
    """A lane is up; an older one of the same number is gone."""

    lane: str
    """The name of this life of the lane: another one after each restart."""
    number: int
    node: str
    """Address of its machine."""
    card: Card | None = None
    """Its card; None on the CPU."""


@dataclass(frozen=True)
class Alive:
    """The heartbeat of a lane, once a second."""

    lane: str
    token: str
    """Of the job that it runs; empty: it is idle."""


@dataclass(frozen=True)
class Said:
    """What the lane's worker process reported."""

    lane: str
    token: str
    report: Report


@dataclass(frozen=True)
class Gone:
    """The lane ends, and Ray Tune starts it again."""

    lane: str
    reason: str


@dataclass(frozen=True)
class Up:
    """The fleet's process has reached Ray."""

    address: str
    lanes: int
    """How many it keeps alive."""
    dashboard: str = ""
    """Where Ray's dashboard can be seen; empty: there is none."""


@dataclass(frozen=True)
class Down:
    """The fleet's process cannot go on."""

    reason: str
    final: bool = False
    """Whether another start would end the same way."""


ToDriver = Hello | Alive | Said | Gone | Up | Down
