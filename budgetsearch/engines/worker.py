"""The worker process: ``python -m budgetsearch.engines.worker``, JSON lines on its pipes.

It reads orders (``WorkerSetup`` first) from its input and writes reports to its output. This is the
one place where a foreign exception becomes a status. It ends when its input ends: an orphan does not
outlive its driver.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from budgetsearch.core.codec import decode, encode, read_json
from budgetsearch.core.errors import BudgetsearchError
from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Cancel,
    Job,
    Order,
    Score,
    SegmentResult,
    Status,
    TrainJob,
    WorkerSetup,
)
from budgetsearch.core.reports import JobEnded, Report
from budgetsearch.core.results import failed_results
from budgetsearch.machine.child import die_with_parent

EXIT_DEVICE = 3
"""The process ended itself because its card is lost: no fault of what it was doing."""
EXIT_BROKEN = 4
"""... because its device answers nothing any more in this process, after an illegal access or the like; or
because what stands on its input is no order, so that nobody knows what was asked for."""
LOST = (
    "gpu is lost",
    "no cuda-capable device",
    "no cuda gpus are available",
    "busy or unavailable",
    "uncorrectable",
    "fallen off the bus",
)
"""What CUDA and torch say of a card that is gone."""


class Pipe:
    """The way back to the driver. Libraries that print must not get between the lines, so the real
    output is kept here and file descriptor 1 becomes the error stream, which is the worker's log."""

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def send(self, report: Report) -> None:
        """Write one report as one line."""
        self.write(encode(report))

    def write(self, value: object) -> None:
        """Write JSON values as one line."""
        line = json.dumps(value, allow_nan=False)
        with self._lock:
            self._out.write(line + "\n")
            self._out.flush()


class Log:
    """The error stream, which is the worker's log. On a full disk lines are lost, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what there is room for."""
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        """Flush what there is room for."""
        try:
            self._stream.flush()
        except OSError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Inbox:
    """Orders, read by a thread of their own so that a cancel arrives while a job runs."""

    def __init__(self) -> None:
        self.orders: queue.Queue[WorkerSetup | Job] = queue.Queue()
        self._cancelled: set[int] = set()
        self.closing: Callable[[], None] = lambda: None
        """Called before the process ends."""
        threading.Thread(target=self._read, daemon=True, name="inbox").start()

    def is_cancelled(self, job_id: int) -> bool:
        """Whether the driver asked for this job to stop."""
        return job_id in self._cancelled

    def _read(self) -> None:
        for line in sys.stdin:
            try:
                order = decode(Order, read_json(line))
                if not isinstance(order, Order):
                    raise ValueError("it is no record")
            except ValueError as error:  # a job would wait forever for what it was
                print(f"an order cannot be understood ({error}): {line[:200]!r}", file=sys.stderr, flush=True)
                self.closing()
                os._exit(EXIT_BROKEN)
            if isinstance(order, Cancel):
                self._cancelled.add(order.job_id)
            else:
                self.orders.put(order)
        # The driver is gone, or closed the pipe on purpose. Checkpoints appear whole or not at all,
        # so there is nothing to tidy up but the watcher.
        self.closing()
        os._exit(0)


def main() -> None:
    """Read the setup, then jobs, until the input ends."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGUSR1,
    ):  # sent to the whole group, but the driver's to handle
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    sys.stderr = Log(sys.stderr)
    pipe, inbox = Pipe(), Inbox()
    _quiet_libraries()
    from budgetsearch.engines.shared import with_shared
    from budgetsearch.training.entry import trainer_of

    setup = inbox.orders.get()
    if not isinstance(setup, WorkerSetup):
        raise SystemExit("the first order must be the setup")
    try:
        workshop = with_shared(
            setup, lambda setup: trainer_of(setup, pipe.send, inbox.is_cancelled), inbox.is_cancelled
        )
    except Exception as error:
        traceback.print_exc()
        os._exit(EXIT_DEVICE if is_lost(error) else EXIT_BROKEN)
    inbox.closing = workshop.close
    gc.freeze()  # the libraries stay: to look for garbage among their objects takes half a second each time
    while True:
        job = inbox.orders.get()
        if not isinstance(job, WorkerSetup):
            results = execute(workshop, job)
            pipe.send(JobEnded(job.job_id, results, workshop.use()))


def execute(workshop: Any, job: Job) -> tuple[SegmentResult | Calibration | Score, ...]:
    """Do the job; whatever goes wrong in it becomes a status.

    After an error that leaves the device unusable the process ends: the engine reports the job as crashed
    and starts another process for the next one.
    """
    try:
        if isinstance(job, TrainJob):
            results: tuple[SegmentResult, ...] = workshop.train(job)
            return results
        return (workshop.calibrate(job) if isinstance(job, CalibrateJob) else workshop.score(job),)
    except Exception as error:
        status, detail = _translate(error)
        if status == "crashed" and is_lost(error):
            os._exit(EXIT_DEVICE)
        if status == "crashed" and _is_final(error):
            os._exit(EXIT_BROKEN)
        if status == "crashed" and isinstance(job, CalibrateJob) and not isinstance(error, OSError):
            status, detail = "refused", _in_a_line(error)
        workshop.forget(job.quantization)
        return failed_results(job, status, detail, workshop.peak_bytes())


def _translate(error: Exception) -> tuple[Status, str]:
    from budgetsearch.training.memory import is_memory_error

    traceback.print_exc()
    status: Status = "out_of_memory" if is_memory_error(error) else "crashed"
    return status, f"{type(error).__name__}: {error}"[:2000]


def _in_a_line(error: Exception) -> str:
    """Why a base model cannot be trained so: the next try would come to the same. The log has the rest."""
    from budgetsearch.training.classes import short

    if isinstance(error, BudgetsearchError):
        return str(error)
    return f"{type(error).__name__}: {short(error)}"


def is_lost(error: Exception) -> bool:
    """Whether an exception says that the card is gone."""
    return any(word in str(error).lower() for word in LOST)


def _is_final(error: Exception) -> bool:
    """Whether the device answers nothing any more in this process: an illegal access, a lost card."""
    signs = ("CUDA error:", "CUDA driver error:")
    return type(error).__name__ == "AcceleratorError" or any(sign in str(error) for sign in signs)


def _quiet_libraries() -> None:
    """Progress bars and per-layer notices would bury what matters in the log."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="bitsandbytes")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


if __name__ == "__main__":
    main()
