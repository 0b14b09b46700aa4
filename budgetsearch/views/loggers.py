"""The scalars of a run for TensorBoard, Weights & Biases or Trackio: optional watchers.

>>> from budgetsearch.views.loggers import logger
>>> bs.run(data="train.jsonl", gpu="cpu", hours=0.5, watchers=[logger("tensorboard")])  # doctest: +SKIP

The horizontal axis is the run's own time in whole seconds. A logger that fails is left out from then on;
the run goes on.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from budgetsearch.core.errors import SettingsError, nearest
from budgetsearch.core.events import Entry, Heartbeat, Opened, Scored, SegmentEnded
from budgetsearch.core.history.history import History
from budgetsearch.core.metric import mean_of
from budgetsearch.core.secrets import shown_settings

LOGGER = logging.getLogger("budgetsearch.views.loggers")
HELD = 10_000
"""So many entries may wait; what comes then is left out."""
GIB = 2.0**30
PROJECT = "budgetsearch"
"""Under which Weights & Biases and Trackio file a run."""


class Sink(Protocol):
    """Taker of scalars."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Take values that belong to one second of the run."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class ScalarLogger:
    """Sends losses, the best so far, memory and utilization on; implements the port ``Watcher``.

    A thread of its own does so: a server that does not answer holds neither the search nor its end up.
    """

    def __init__(self, open_sink: Callable[[Opened], Sink], name: str = "log") -> None:
        """``open_sink`` is called at the first event, when the run's folder and settings are known."""
        self._open, self._name = open_sink, name
        self._handed: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(HELD)
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._left_out = 0

    def see(self, entry: Entry, history: History) -> None:
        """Hand over what an event is worth."""
        if history.opened is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, args=(history.opened,), name=self._name, daemon=True
            )
            self._thread.start()
        if values := scalars(entry, history):
            self._hand((values, int(entry.at)))

    def close(self, seconds: float) -> None:
        """No more events will come: wait so long at most until all is taken, and say what is not."""
        if self._thread is None:
            return
        self._hand(None)
        self._ended.wait(seconds)
        missing = self._left_out + self._handed.unfinished_tasks
        if missing:
            LOGGER.warning(
                "--log %s did not take the last %d entries in time; the ledger has them all",
                self._name,
                missing,
            )

    def _hand(self, item: tuple[Mapping[str, float], int] | None) -> None:
        try:
            self._handed.put_nowait(item)
        except queue.Full:
            self._left_out += 1

    def _work(self, opened: Opened) -> None:
        try:
            sink = self._open(opened)
            while (item := self._handed.get()) is not None:
                sink.write(*item)
                self._handed.task_done()
            sink.close()
            self._handed.task_done()
        except Exception:
            LOGGER.exception("--log %s failed and takes no further events; the run goes on", self._name)
        finally:
            self._ended.set()


def scalars(entry: Entry, history: History) -> dict[str, float]:
    """Scalars of an event: losses in nats per completion token, memory in GiB, shares from 0 to 1."""
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
        found[f"metric/trial{result.trial_id}"] = mean_of(result.metric)
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
    return ScalarLogger(lambda opened: sink(package, opened), name)


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
