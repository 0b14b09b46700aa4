"""What a lane does: it runs jobs in a worker process of its own, as the local engine does."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from budgetsearch.core.codec import decode, encode
from budgetsearch.core.errors import BudgetsearchError
from budgetsearch.core.records import Beat, JobEnded, Report, SegmentResult, WorkerSetup
from budgetsearch.engines.local import LocalEngine
from budgetsearch.engines.messages import Alive, Gone, Halt, Hello, Said, Strike, Take, ToDriver, ToLane

BEAT_SECONDS = 1.0
"""A lane gives a sign of life so often."""
BUSY_SECONDS = 0.1
"""While a job runs, orders are looked for so often."""
Row = Mapping[str, Any]
"""One result for Ray Tune."""


class Line(Protocol):
    """A lane's connection to the hub."""

    def orders(self, timeout: float) -> Sequence[Mapping[str, Any]] | None:
        """Orders that have arrived; waits so many seconds for the first. None: the fleet ends."""
        ...

    def tell(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Send messages to the driver."""
        ...


class Hands:
    """Takes jobs off the line, has them run by a worker process, and reports.

    They work in a thread of their own, beside Ray Tune's calls: the next job begins while Tune still writes
    down the results of the last one.
    """

    def __init__(
        self,
        hello: Hello,
        line: Line,
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
