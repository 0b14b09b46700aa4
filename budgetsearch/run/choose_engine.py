"""Which engine runs the jobs, and on which card: a worker process here, or lanes on Ray Tune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from budgetsearch.core.errors import EngineError, SettingsError
from budgetsearch.core.ports import Engine
from budgetsearch.core.records import WorkerSetup

if TYPE_CHECKING:
    from budgetsearch.engines.ray.engine import RayEngine
    from budgetsearch.machine.detect import Card
    from budgetsearch.run.settings import Changes, Settings
    from budgetsearch.storage.runfolder import RunFolder

CARD_SECONDS = 180.0
"""So long the first lane gets to say which card it has."""


class RunEngine(Engine, Protocol):
    """An engine with processes of its own, which take a while to start."""

    def warm_up(self) -> None:
        """Start what takes seconds, while others use them."""
        ...

    def prepare(self, setup: WorkerSetup) -> None:
        """Say what the workers are to work on, before the first job."""
        ...

    def end(self) -> None:
        """Kill every process, from any thread and without waiting for anything."""
        ...


@dataclass(frozen=True)
class Execution:
    """The engine of a run."""

    engine: RunEngine
    card: Callable[[], Card]
    """The card that the plan reckons with; may wait until a machine of the cluster has said which."""


def check_engine(settings: Settings) -> None:
    """Check that the engine can be used with these settings, without starting anything.

    Raises:
        SettingsError: the settings contradict each other, or a package is missing.
    """
    if settings.engine == "local":
        _check_local(settings)
    else:
        _check_ray(settings)


def _check_local(settings: Settings) -> None:
    if (settings.gpus or 1) > 1:
        raise SettingsError(
            f"--gpus {settings.gpus} needs --engine ray; the local engine uses one card, the one that --gpu "
            "or --device names."
        )
    if settings.address is not None:
        raise SettingsError(f"--address {settings.address} is of a Ray cluster; it needs --engine ray.")


def _check_ray(settings: Settings) -> None:
    from budgetsearch.engines.ray.engine import check_ray

    check_ray()
    if settings.device is not None:
        raise SettingsError(
            f"--device {settings.device} names one card, but --engine ray takes those that Ray sees; drop "
            "it, and hide cards with CUDA_VISIBLE_DEVICES."
        )
    if (settings.address or "").startswith("ray://"):
        raise SettingsError(
            f"--address {settings.address}: Ray's client cannot run a search. Start budgetsearch on a "
            "machine of the cluster with --address auto, by hand or with `ray job submit`."
        )
    if settings.address and settings.gpu == "auto":
        raise SettingsError(
            "--address needs --gpu: the card of the cluster's machines, such as --gpu a100, or --gpu cpu."
        )


def is_elsewhere(settings: Settings) -> bool:
    """Whether the card is on other machines, so that only a worker there can say what it is."""
    return bool(settings.address) and settings.gpu != "cpu"


def moved(settings: Settings, changes: Changes) -> Settings:
    """The settings of a run that goes on with another engine, gpus or address, where they are given.

    Raises:
        SettingsError: a value that a setting does not take.
    """
    from budgetsearch.run.configuration import revised

    if changes.get("engine") == "local" and settings.engine == "ray":
        settings = settings.model_copy(update={"gpus": None, "address": None})
    return revised(settings, {name: changes.get(name) for name in ("engine", "gpus", "address")})


def choose(settings: Settings, card: Card | None, folder: RunFolder, lock_fd: int) -> Execution:
    """Make the engine that the settings ask for; nothing is started yet.

    ``card``: None where only a worker can say which it is. ``lock_fd``: the lock of the run, which a worker
    keeps until it has ended.
    """
    if settings.engine == "ray" or card is None:
        return _on_ray(settings, card, folder, lock_fd)
    from budgetsearch.engines.local import LocalEngine

    engine = LocalEngine(None, folder.worker_log, keep_open=(lock_fd,), environment=card.environment)
    return Execution(engine, lambda: card)


def _on_ray(settings: Settings, card: Card | None, folder: RunFolder, lock_fd: int) -> Execution:
    from budgetsearch.engines.ray.engine import RayEngine
    from budgetsearch.engines.ray.messages import FleetSpec

    place = folder.ray.absolute()
    spec = FleetSpec(
        lanes=settings.gpus or 0,
        folder=str(place),
        log=str(place / "worker-{lane}.log"),
        gpu="cpu" if card is not None and card.device == "cpu" else settings.gpu,
        address=settings.address or "",
    )
    engine = RayEngine(None, spec, place / "ray.log", (lock_fd,))
    return Execution(engine, lambda: card or _first_card(engine))


def _first_card(engine: RayEngine) -> Card:
    """The card of the first lane.

    Raises:
        EngineError: no lane comes.
    """
    card = engine.await_card(CARD_SECONDS)
    if card is None:
        raise EngineError(
            f"No worker of the cluster has come within {CARD_SECONDS:.0f} s; `ray status` shows whether "
            f"it has GPUs that are free. What Ray said is in {engine.log}."
        )
    return card
