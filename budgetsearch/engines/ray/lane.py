"""A lane of the fleet as Ray Tune sees it: a trainable that lives as long as the run.

This module imports Ray, so only the fleet's process and its lanes import it.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util import metrics

from budgetsearch.core.codec import decode, encode
from budgetsearch.core.errors import BudgetsearchError, DeviceError
from budgetsearch.core.records import SegmentResult, WorkerSetup
from budgetsearch.core.reports import Beat, JobEnded, Report
from budgetsearch.engines.local import LocalEngine
from budgetsearch.engines.ray.messages import Alive, Gone, Halt, Hello, Said, Strike, Take, ToDriver, ToLane
from budgetsearch.machine.detect import Card, detect

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
        """Orders that have arrived; waits so many seconds for the first. None: the fleet ends."""
        if self._asked is None:
            self._asked = self._hub.orders.remote(self._lane, ANSWER_SECONDS / 2)
        ready, _ = ray.wait([self._asked], timeout=timeout)
        if not ready:
            return []
        asked, self._asked = self._asked, None
        found: Sequence[Mapping[str, Any]] | None = ray.get(asked)
        return found

    def tell(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Send messages to the driver."""
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


BEAT_SECONDS = 1.0
"""A lane gives a sign of life so often."""
BUSY_SECONDS = 0.1
"""While a job runs, orders are looked for so often."""
Row = Mapping[str, Any]
"""One result for Ray Tune."""


class Hands:
    """Takes jobs off the line, has them run by a worker process, and reports.

    They work in a thread of their own, beside Ray Tune's calls: the next job begins while Tune still writes
    down the results of the last one.
    """

    def __init__(
        self,
        hello: Hello,
        line: HubLine,
        engine: LocalEngine,
        fit: Callable[[WorkerSetup], WorkerSetup] = lambda setup: setup,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``fit`` makes a setup this machine's: its card, what of it may be used."""
        self._hello, self._line, self._engine, self._fit, self._clock = hello, line, engine, fit, clock
        self._token = ""
        self._job_id: int | None = None
        self._beaten = -BEAT_SECONDS
        self._used_bytes = 0
        self.rows: queue.Queue[Row | None] = queue.Queue()
        """Results for Ray Tune; None: nothing comes any more."""
        self.failure = ""
        """Why the lane cannot go on; empty: it was let go."""

    def work(self) -> None:
        """Until the fleet ends, or nothing works here any more."""
        try:
            self._tell(self._hello)
            self._engine.warm_up()  # its imports take seconds that the driver's preparation takes as well
            while (orders := self._line.orders(0.0 if self._token else BEAT_SECONDS)) is not None:
                for order in orders:
                    self._obey(decode(ToLane, order))
                if self._token:
                    self._pass_on(self._engine.poll(BUSY_SECONDS))
                self._beat()
        except BudgetsearchError as error:
            self.failure = str(error)
            self._tell(Gone(self._hello.lane, self.failure))
        except Exception as error:  # the hub is gone, and with it the driver
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self._engine.close()
            self.rows.put(None)

    def _obey(self, order: ToLane) -> None:
        if isinstance(order, Take):
            self._token, self._job_id = order.token, order.job.job_id
            self._engine.prepare(self._fit(order.setup))
            self._engine.submit(order.job)
        elif order.token == self._token and self._job_id is not None:
            if isinstance(order, Halt):
                self._engine.cancel(self._job_id)
            elif isinstance(order, Strike):
                self._engine.kill(self._job_id)

    def _pass_on(self, reports: Sequence[Report]) -> None:
        for report in reports:
            token = self._token
            if isinstance(report, Beat):
                self._used_bytes = report.used_bytes
            if isinstance(report, JobEnded):
                self._token, self._job_id = "", None
            self._tell(Said(self._hello.lane, token, report))
            if isinstance(report, JobEnded):
                for row in rows_of(report, self._used_bytes):
                    self.rows.put(row)

    def _beat(self) -> None:
        now = self._clock()
        if now - self._beaten >= BEAT_SECONDS:
            self._beaten = now
            self._tell(Alive(self._hello.lane, self._token))

    def _tell(self, message: ToDriver) -> None:
        self._line.tell([encode(message)])


def rows_of(ended: JobEnded, used_bytes: int) -> list[Row]:
    """What Ray Tune, and with it TensorBoard, shows of a job: one result for each segment."""
    return [
        {
            "job": ended.job_id,
            "trial": result.trial_id,
            "rung": result.rung,
            "status": result.status,
            "loss": result.loss if result.loss is not None else float("nan"),
            "tokens": result.tokens,
            "seconds": sum(result.seconds.values()),
            "peak_gib": result.peak_bytes / 2**30,
            "used_gib": used_bytes / 2**30,
            "gang": result.gang,
        }
        for result in ended.results
        if isinstance(result, SegmentResult)
    ]
