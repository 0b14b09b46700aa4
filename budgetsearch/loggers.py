"""The scalars of a run for TensorBoard, Weights & Biases or Trackio: optional watchers.

>>> from budgetsearch.loggers import logger
>>> bs.run(data="train.jsonl", gpu="cpu", hours=0.5, watchers=[logger("tensorboard")])  # doctest: +SKIP

The horizontal axis is the run's own time in whole seconds. A logger that fails is left out from then on;
the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from budgetsearch.core.errors import SettingsError, nearest
from budgetsearch.core.events import Closed, Entry, Heartbeat, Opened, Scored, SegmentEnded
from budgetsearch.core.history import History
from budgetsearch.core.secrets import shown_settings

GIB = 2.0**30
PROJECT = "budgetsearch"
"""Under which Weights & Biases and Trackio file a run."""


class Sink(Protocol):
    """Where scalars go."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Take values that belong to one second of the run."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class ScalarLogger:
    """Sends losses, the best so far, memory and utilization on; implements the port ``Watcher``."""

    def __init__(self, open_sink: Callable[[Opened], Sink]) -> None:
        """``open_sink`` is called at the first event, when the run's folder and settings are known."""
        self._open = open_sink
        self._sink: Sink | None = None

    def see(self, entry: Entry, history: History) -> None:
        """Send what an event is worth."""
        if history.opened is None:
            return
        if self._sink is None:
            self._sink = self._open(history.opened)
        values = scalars(entry, history)
        if values:
            self._sink.write(values, int(entry.at))
        if isinstance(entry.event, Closed):
            self._sink.close()
            self._sink = None


def scalars(entry: Entry, history: History) -> dict[str, float]:
    """What an event adds: losses in nats per completion token, memory in GiB, shares from 0 to 1."""
    event = entry.event
    found: dict[str, float | None] = {}
    if isinstance(event, Heartbeat):
        beat = event.beat
        if beat.trial_id is not None:
            found[f"train_loss/trial{beat.trial_id}"] = beat.loss
        found["card/used_gib"] = beat.used_bytes / GIB if beat.used_bytes else None
        found["card/utilization"] = beat.utilization
        found["card/watts"] = beat.watts
    elif isinstance(event, SegmentEnded):
        result, best = event.result, history.incumbent
        found[f"validation_loss/trial{result.trial_id}"] = result.loss
        found[f"tokens/trial{result.trial_id}"] = float(result.tokens)
        found["best_loss"] = best.best_loss if best else None
        found["trials"] = float(sum(state.started for state in history.trials.values()))
    elif isinstance(event, Scored) and history.score is not None:
        names = ("base_loss", "adapter_loss", "base_accuracy", "adapter_accuracy")
        found = {f"score/{name}": getattr(history.score, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def logger(name: str) -> ScalarLogger:
    """A watcher that logs to ``tensorboard`` (into the run's folder), ``wandb`` or ``trackio``.

    Raises:
        SettingsError: there is no such logger, or its package is not installed.
    """
    if name not in LOGGERS:
        raise SettingsError(
            f"--log {name}: unknown logger{nearest(name, LOGGERS)}; use {', '.join(LOGGERS)}."
        )
    module, sink = LOGGERS[name]
    package = _import(name, module)
    return ScalarLogger(lambda opened: sink(package, opened))


def _import(name: str, module: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(
            f"--log {name} needs the package {name} ({error}). Install it with `pip install {name}`."
        ) from error


class _TensorBoard:
    def __init__(self, package: ModuleType, opened: Opened) -> None:
        folder = Path(str(opened.settings.get("out") or ".")) / "tensorboard"
        self._writer = package.SummaryWriter(log_dir=str(folder))

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """Weights & Biases, and Trackio, which has the same three calls."""

    def __init__(self, package: ModuleType, opened: Opened) -> None:
        self._package = package
        name = str(opened.facts.get("study", ""))
        package.init(project=PROJECT, name=name, config=shown_settings(opened.settings))

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._package.log(dict(values), step=step)

    def close(self) -> None:
        self._package.finish()


LOGGERS: Mapping[str, tuple[str, Callable[[Any, Opened], Sink]]] = {
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
    "wandb": ("wandb", _Tracker),
    "trackio": ("trackio", _Tracker),
}
"""Module and sink by name."""
