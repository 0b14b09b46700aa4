"""How a run stops that did not come to its end: signals, and a process that hangs when its time is over."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from budgetsearch.clock import Timing
from budgetsearch.runfolder import RunFolder

if TYPE_CHECKING:
    from budgetsearch.execution import RunEngine

EXIT_OVERDUE = 3
"""Exit code of a process that hung until its time was over."""
LAST_SECONDS = 1.0
"""So long before the end a process that hangs is ended: what it has earned is on disk."""
WORDS_SECONDS = 0.2
"""Its last words get so long to be written."""
WATCH_SECONDS = 0.5
PREPARATION_SECONDS = 180.0
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is how schedulers announce that a job will be preempted."""


@contextmanager
def ended_in_time(
    timing: Timing, engine: RunEngine, folder: RunFolder, planned: Callable[[], bool]
) -> Iterator[None]:
    """Inside, this process ends before its time is over, whatever hangs in it: a download, a disk, a lock.

    The driver keeps the deadline by itself; this is for what it cannot see. Before the run is ``planned`` it
    gets PREPARATION_SECONDS in any case: a budget that is too small is to be refused with what would do.
    """
    over = threading.Event()

    def watch() -> None:
        while True:
            limit = timing.budget_seconds - LAST_SECONDS
            left = (limit if planned() else max(limit, PREPARATION_SECONDS)) - timing.clock.now()
            if left <= 0:
                break
            if over.wait(min(left, WATCH_SECONDS)):
                return
        engine.end()
        message = (
            f"error: the time is over and the process hangs, so it ends here. What was earned is safe in "
            f"{folder.path}; `budgetsearch status {folder.command_word}` shows it.\n"
        )
        # Perhaps it hangs because nobody reads what it prints.
        words = threading.Thread(target=os.write, args=(2, message.encode()), daemon=True)
        words.start()
        words.join(WORDS_SECONDS)
        os._exit(EXIT_OVERDUE)

    threading.Thread(target=watch, name="last-resort", daemon=True).start()
    try:
        yield
    finally:
        over.set()


class Stopped(KeyboardInterrupt):
    """A signal that ends the work at once, by its name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.signal = name


class Signals:
    """What a signal means: at once while preparing, gently once the driver runs."""

    def __init__(self) -> None:
        self._asked = ""
        self._gentle = False

    def gently(self) -> str:
        """The signal that asked to stop, if any; from the first call on, the first one is only a request."""
        self._gentle = True
        return self._asked

    def at_once(self) -> None:
        """From now on the next one stops at once again: what is left to do can be done at any time."""
        self._gentle = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler; a second signal stops at once as well.

        Raises:
            Stopped: by the first of them.
        """
        name = signal.Signals(number).name
        if self._asked or not self._gentle:
            raise Stopped(self._asked or name)
        self._asked = name


@contextmanager
def stop_signals() -> Iterator[Signals]:
    """Inside, the stopping signals are handled; outside the main thread they are left alone."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.handle) for number in STOPPING}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
