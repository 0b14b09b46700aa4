"""A lane of the fleet as Ray Tune sees it: a trainable that lives as long as the run.

This module imports Ray, so only the fleet's process and its lanes import it.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util import metrics

from budgetsearch.core.codec import encode
from budgetsearch.core.errors import DeviceError
from budgetsearch.core.records import WorkerSetup
from budgetsearch.engines.hands import Hands, Row
from budgetsearch.engines.local import LocalEngine
from budgetsearch.engines.messages import Gone, Hello
from budgetsearch.gpu.detect import Card, detect

ANSWER_SECONDS = 30.0
"""A hub that does not answer for so long is gone."""
UNFIT_SECONDS = 5.0
"""A machine without the card waits so long before Ray Tune tries again, at once and perhaps there."""
SHOWN = ("rung", "loss", "tokens", "peak_gib", "used_gib")
"""Of a result, what Ray's own metrics carry."""


class HubLine:
    """The connection of a lane to the hub."""

    def __init__(self, hub: Any, lane: str) -> None:
        self._hub, self._lane = hub, lane
        self._asked: Any = None

    def orders(self, timeout: float) -> Sequence[Mapping[str, Any]] | None:
        """See ``hands.Line``."""
        if self._asked is None:
            self._asked = self._hub.orders.remote(self._lane, ANSWER_SECONDS / 2)
        ready, _ = ray.wait([self._asked], timeout=timeout)
        if not ready:
            return []
        asked, self._asked = self._asked, None
        found: Sequence[Mapping[str, Any]] | None = ray.get(asked)
        return found

    def tell(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """See ``hands.Line``."""
        ray.get(self._hub.tell.remote(messages), timeout=ANSWER_SECONDS)


class Lane(tune.Trainable):  # type: ignore[misc]
    """One GPU. Its results are the segments that its worker process has ended."""

    def setup(self, config: dict[str, Any]) -> None:
        """Say hello to the hub, and wait for jobs."""
        number = int(config["lane"])
        name = f"{number}-{uuid.uuid4().hex[:8]}"
        node = ray.util.get_node_ip_address()
        line = HubLine(ray.get_actor(config["hub"], namespace=config["namespace"]), name)
        try:
            card = None if config["gpu"] == "cpu" else detect(config["gpu"])
        except DeviceError as error:
            line.tell([encode(Gone(name, f"{error} (on {node})"))])
            time.sleep(UNFIT_SECONDS)
            raise
        engine = LocalEngine(
            None,
            _log(config["log"], number),
            environment=card.environment if card else None,
            worker=config["worker"],
        )
        hello = Hello(name, number, node, card)
        self._gauges = {
            key: metrics.Gauge(f"budgetsearch_{key}", tag_keys=("lane", "trial")) for key in SHOWN
        }
        self._number = number
        self._hands = Hands(hello, line, engine, lambda setup: _fitted(setup, card))
        self._thread = threading.Thread(target=self._hands.work, daemon=True, name="hands")
        self._thread.start()

    def step(self) -> dict[str, Any]:
        """The next segment that has ended; waits for it."""
        row = self._hands.rows.get()
        if row is None:
            if self._hands.failure:
                raise RuntimeError(self._hands.failure)
            return {"done": True}
        self._show(row)
        return dict(row)

    def cleanup(self) -> None:
        """The worker process ends with the lane."""
        self._thread.join(ANSWER_SECONDS)

    def _show(self, row: Row) -> None:
        tags = {"lane": str(self._number), "trial": str(row["trial"])}
        for key, gauge in self._gauges.items():
            gauge.set(float(row[key]), tags=tags)


def _fitted(setup: WorkerSetup, card: Card | None) -> WorkerSetup:
    """The setup on this machine: its own card, and no more of it than the plan reckons with."""
    if card is None or setup.device == "cpu":
        return setup
    limit = min(setup.limit_bytes or card.usable_bytes, card.usable_bytes)
    return replace(setup, device=card.device, card_uuid=card.uuid, limit_bytes=limit)


def _log(pattern: str, number: int) -> Path:
    """The log of the worker process: in the run folder where this machine sees it, else a temporary file, of
    this user and this run."""
    path = Path(pattern.format(lane=number))
    if path.parent.is_dir():
        return path
    run = path.parent.parent.name
    return Path(tempfile.gettempdir()) / f"budgetsearch-{os.getuid()}-{run}-{path.name}"
