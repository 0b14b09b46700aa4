"""Which engine runs the jobs, and on which card: a worker process here, or lanes on Ray Tune."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from budgetsearch.core.errors import EngineError, SettingsError
from budgetsearch.core.ports import Engine
from budgetsearch.core.records import WorkerSetup
from budgetsearch.machine.detect import Card, detect

if TYPE_CHECKING:
    from budgetsearch.engines.ray.engine import RayEngine
    from budgetsearch.run.settings import Settings
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


def check_execution(settings: Settings) -> None:
    """Check engine and card, without starting anything.

    Raises:
        UsageError: the card cannot be used, or the settings contradict each other.
    """
    if settings.engine == "local":
        _check_local(settings)
    else:
        _check_ray(settings)
    if not _is_elsewhere(settings):
        detect(settings.gpu, settings.device)


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


def _is_elsewhere(settings: Settings) -> bool:
    """Whether the card is on other machines, so that only a lane can say what it is."""
    return bool(settings.address) and settings.gpu != "cpu"


def moved(settings: Settings, engine: str | None, gpus: int | None, address: str | None) -> Settings:
    """The settings of a run that goes on elsewhere; None: as before.

    Raises:
        UsageError: the engine cannot be used here.
    """
    from budgetsearch.run.settings import revised

    if engine == "local" and settings.engine == "ray":
        settings = settings.model_copy(update={"gpus": None, "address": None})
    found = revised(settings, {"engine": engine, "gpus": gpus, "address": address})
    check_execution(found)
    return found


def choose(
    settings: Settings, folder: RunFolder, keep_open: Sequence[int], say: Callable[[str], None]
) -> Execution:
    """Make the engine that the settings ask for; nothing is started yet."""
    if _is_elsewhere(settings):
        return _on_ray(settings, folder, keep_open, None)
    card = detect(settings.gpu, settings.device)
    if card.note:
        say(card.note)
    if settings.engine == "ray":
        return _on_ray(settings, folder, keep_open, card)
    from budgetsearch.engines.local import LocalEngine

    engine = LocalEngine(None, folder.worker_log, keep_open=keep_open, environment=card.environment)
    return Execution(engine, lambda: card)


def _on_ray(settings: Settings, folder: RunFolder, keep_open: Sequence[int], card: Card | None) -> Execution:
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
    engine = RayEngine(None, spec, place / "ray.log", keep_open)
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
