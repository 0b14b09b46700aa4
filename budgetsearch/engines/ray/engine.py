"""The engine behind several GPUs: lanes on Ray Tune, reached through the fleet's process."""

from __future__ import annotations

import importlib.util
import queue
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from budgetsearch.core.codec import encode
from budgetsearch.core.errors import EngineError, SettingsError
from budgetsearch.core.records import Job, WorkerSetup
from budgetsearch.core.reports import JobEnded, Notice, Report
from budgetsearch.engines.pipes import Outbox, arrived, listen, start
from budgetsearch.engines.ray.messages import Down, FleetSpec, Hello, Said, ToDriver, Up
from budgetsearch.engines.ray.table import Table
from budgetsearch.machine.detect import Card

MAX_FALLS = 3
"""A fleet that fell so often without a job that ended is not started again. A cluster that was there and
cannot be reached does not count: its head may be starting again, and the table knows how long to wait."""
RETRY_SECONDS = 5.0
"""After a fall the next fleet is started so much later."""
CLOSE_SECONDS = 4.0
"""The fleet gets so long to end its lanes and Ray; then it is killed, and they end with it. That is more than
``ENDING`` has for a worker: where the reserve is at its least, the study is made whole by a resume."""
TICK_SECONDS = 0.5


def check_ray() -> None:
    """Say what to install where Ray is missing; imports nothing.

    Raises:
        SettingsError: Ray Tune is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise SettingsError(
            "--engine ray needs Ray Tune, which is not installed. Install it with "
            '`pip install "budgetsearch[ray]"` on every machine of the cluster, or use --engine local.'
        )


class RayEngine:
    """A slot for each lane that lives; see the port."""

    def __init__(
        self,
        setup: WorkerSetup | None,
        spec: FleetSpec,
        log: Path,
        keep_open: Sequence[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``log`` takes what Ray says; the rest is as with the local engine."""
        self._setup, self._spec, self._keep_open = setup, spec, tuple(keep_open)
        self._table = Table(spec.lanes, clock)
        self._process: subprocess.Popen[str] | None = None
        self._outbox: Outbox | None = None
        self._heard: queue.SimpleQueue[ToDriver | None] = queue.SimpleQueue()
        self._ready: list[Report] = []
        self._falls = 0
        self._started = self._manned = False
        self._fell_at = -RETRY_SECONDS
        self._down = Down("")
        self.card: Card | None = None
        """The card of the first lane that came; None: none has come yet, or there is none."""
        self.log = log
        self.place: Up | None = None
        """Where Ray is; None: it is not reached yet."""

    @property
    def slots(self) -> int:
        """How many lanes live; before the fleet is started, how many there are to be."""
        return self._table.living if self._started else max(1, self._spec.lanes)

    def warm_up(self) -> None:
        """Start the fleet early: Ray and the lanes take seconds that others can use."""
        self._ensure_fleet()

    def prepare(self, setup: WorkerSetup) -> None:
        """Say what the workers are to work on, before the first job."""
        self._setup = setup

    def await_card(self, seconds: float) -> Card | None:
        """The card of the first lane; None: no lane has come within so many seconds, or it has none. What
        arrives meanwhile is kept.

        Raises:
            EngineError: the fleet cannot be started.
        """
        until, early = time.monotonic() + seconds, list[Report]()
        while self.card is None and time.monotonic() < until:
            early += self.poll(TICK_SECONDS)
        self._ready = early + self._ready
        return self.card

    def submit(self, job: Job) -> None:
        """Start a job; see the port. Where no lane is there yet, it waits for one."""
        if self._setup is None:
            raise EngineError("the engine was never told what to work on")
        self._ensure_fleet()
        self._table.place(job, self._setup)
        self._send()

    def poll(self, timeout: float) -> list[Report]:
        """Reports that have arrived; see the port."""
        until = time.monotonic() + timeout
        while True:
            wait = 0.0 if self._ready else min(TICK_SECONDS, until - time.monotonic())
            for message in arrived(self._heard, wait):
                self._digest(message)
            if self._started and not self._ready:
                self._look_after()
            self._send()
            if self._ready or time.monotonic() >= until:
                found, self._ready = self._ready, []
                return found

    def cancel(self, job_id: int) -> None:
        """Ask a job to checkpoint and stop."""
        self._ready += self._table.cancel(job_id)
        self._send()

    def kill(self, job_id: int) -> None:
        """End a job; it is over even where its lane cannot be reached."""
        self._ready += self._table.kill(job_id)
        self._send()

    def end(self) -> None:
        """Kill the fleet, from any thread and without waiting for anything; lanes end with it."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the lanes and a cluster of our own; safe to call twice."""
        process, self._process = self._process, None
        self._heard = queue.SimpleQueue()
        self._started = False
        self._table = Table(self._spec.lanes, self._table.clock)
        self._ready = []
        if process is None:
            return
        self._hang_up()
        try:
            process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # --------------------------------------------------------------------- the fleet

    def _look_after(self) -> None:
        """Find out what is lost, and bring the fleet back.

        Raises:
            EngineError: it cannot be brought back, or no lane comes.
        """
        self._ready += self._table.tick()
        if self._process is None and self._table.clock() - self._fell_at >= RETRY_SECONDS:
            self._ensure_fleet()

    def _ensure_fleet(self) -> None:
        if self._process is not None:
            return  # if it has ended, the reader says so
        if self._gives_up():
            raise EngineError(
                f"Ray cannot be used: {self._down.reason or 'its process ended'}. What it said is in "
                f"{self.log}. Everything so far is kept, and `budgetsearch resume RUN` goes on."
            )
        self._started, self._manned = True, False
        Path(self._spec.folder).mkdir(parents=True, exist_ok=True)
        self._process = start(
            "budgetsearch.engines.ray.fleet",
            self.log,
            keep_open=self._keep_open,
            folder=self._spec.folder,  # Ray adds it to the path of its workers' imports: nothing is in it
            new_session=True,  # Ctrl-C and a scheduler's SIGTERM are for the driver alone
        )
        assert self._process.stdin is not None
        self._outbox = Outbox(self._process.stdin)
        self._outbox.say(encode(self._spec))
        self._heard = listen(self._process, ToDriver, "fleet")

    def _gives_up(self) -> bool:
        return self._down.final or self._falls >= MAX_FALLS

    def _digest(self, message: ToDriver | None) -> None:
        if message is None:
            self._fell()
        elif isinstance(message, Up):
            self.place, self._table.size, self._down = message, message.lanes, Down("")
            if message.dashboard:
                self._ready.append(Notice(0, f"Ray's dashboard is at http://{message.dashboard}"))
        elif isinstance(message, Down):
            self._down = message
        else:
            if isinstance(message, Hello):
                self._manned = True
                self.card = self.card or message.card
            if isinstance(message, Said) and isinstance(message.report, JobEnded):
                self._falls = 0
            self._ready += self._table.hear(message)

    def _fell(self) -> None:
        """The fleet's process has ended: whatever ran is lost, and a new fleet takes over."""
        process, self._process = self._process, None
        self._hang_up()
        if process is not None:
            process.kill()
            process.wait()
        self._fell_at = self._table.clock()
        self._falls += self._manned or self.place is None
        reason = self._down.reason or "Ray's process ended"
        if not self._gives_up():
            self._ready.append(Notice(0, f"Ray is not there ({reason}); it is tried again."))
        self._ready += self._table.lose_all(reason)
        self._table.orders.clear()

    def _send(self) -> None:
        orders, self._table.orders = self._table.orders, []
        if self._outbox is not None:
            for order in orders:
                self._outbox.say(encode(order))

    def _hang_up(self) -> None:
        outbox, self._outbox = self._outbox, None
        if outbox is not None:
            outbox.close()
