"""The process of a run: signals that stop it, output that never blocks it, and how it ends in time."""

from __future__ import annotations

import atexit
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

from budgetsearch.core.policy.deadline import ENDING
from budgetsearch.machine.clock import Timing
from budgetsearch.storage.runfolder import RunFolder

if TYPE_CHECKING:
    from budgetsearch.run.choose_engine import RunEngine

# ---------------------------------------------------------------------------------- signals

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is how schedulers announce that a job will be preempted."""


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


# -------------------------------------------------------------------------- the last resort

EXIT_OVERDUE = 3
"""Exit code of a process that hung until its time was over."""
WORDS_SECONDS = 0.2
"""Its last words get so long to be written."""
WATCH_SECONDS = 0.5
PREPARATION_SECONDS = 180.0
"""Before a run has a plan it gets so long in any case: a budget that is too small is to be refused with what
would do."""


@contextmanager
def ended_in_time(
    timing: Timing,
    engine: RunEngine,
    folder: RunFolder,
    planned: Callable[[], bool],
    patience: float = PREPARATION_SECONDS,
) -> Iterator[None]:
    """End this process before its time is over, whatever hangs inside: a download, a disk, a lock.

    The driver keeps the deadline by itself; this is for what it cannot see. ``planned``: whether the run has
    a plan; before that the process gets so much ``patience`` in any case.
    """
    resumed = folder.has_ledger()
    over = threading.Event()

    def watch() -> None:
        while True:
            left = timing.seconds_left() - ENDING["exit"]
            if not planned():
                left = max(left, patience - timing.clock.now())
            if left <= 0:
                break
            if over.wait(min(left, WATCH_SECONDS)):
                return
        engine.end()
        _give_up(folder, resumed or planned())

    threading.Thread(target=watch, name="last-resort", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _give_up(folder: RunFolder, begun: bool) -> NoReturn:
    """Say where the run lies if it has begun, and end this process."""
    if begun:
        left = (
            f"What was earned is safe in {folder.path}; `budgetsearch status {folder.command_word}` shows it."
        )
    else:
        left = (
            "It was still preparing model and data, so nothing was earned; the folder "
            f"{folder.path} may be used again."
        )
    message = f"error: the time is over and this process is not at its end, so it is ended here. {left}\n"
    # Perhaps it hangs because nobody reads what it prints.
    words = threading.Thread(target=os.write, args=(2, message.encode()), daemon=True)
    words.start()
    words.join(WORDS_SECONDS)
    os._exit(EXIT_OVERDUE)


# ----------------------------------------------------------------------------------- output

HELD_CHARACTERS = 1 << 20
"""So much may wait for a reader; what comes then is left out until there is room."""
PRECEDENCE_SECONDS = 0.1
"""So long an error waits for the output before it, which may go to the same place."""


class Outlet(io.TextIOBase):
    """Looks like the text stream that it stands for; ``write`` and ``flush`` return at once."""

    def __init__(self, stream: TextIO, after: Outlet | None = None, limit: int = HELD_CHARACTERS) -> None:
        """``after``: what was written there before comes first, as long as it is read."""
        self._stream, self._fd, self._after, self._limit = stream, stream.fileno(), after, limit
        self._news = threading.Condition()
        self._waiting: list[str] = []
        self._held = self._left_out = 0
        self._full = False
        self._busy = self._gone = False
        self._stuck = False
        """Nobody reads: it was waited for in vain, and nothing has been written since."""
        threading.Thread(target=self._work, name="output", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """As of the stream."""
        return self._stream.encoding or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """What cannot be encoded is no reason to end a run."""
        return "backslashreplace"

    def isatty(self) -> bool:
        """As of the stream."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """As of the stream."""
        return self._fd

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Hand a text over; returns its length."""
        if not isinstance(text, str):
            raise TypeError(f"write() needs a str, not {type(text).__name__}")
        if self._after is not None and not self._after._stuck:
            self._after.drain(PRECEDENCE_SECONDS)
        with self._news:
            if self._gone or not text:
                pass
            elif self._full or (self._held + len(text) > self._limit and text != "\n"):
                self._full = True
                self._left_out += text.count("\n")
            else:
                self._waiting.append(text)
                self._held += len(text)
                self._news.notify_all()
        return len(text)

    def drain(self, seconds: float) -> bool:
        """Wait until all is written, so long at most; returns whether it is."""
        with self._news:
            done = self._news.wait_for(lambda: not (self._waiting or self._busy), max(0.0, seconds))
            self._stuck = not done
        return done

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting)
                text, self._waiting, self._busy = "".join(self._waiting), [], True
            whole = self._put(text)
            with self._news:
                self._held -= len(text)
                self._busy, self._gone, self._stuck = False, not whole, False
                if self._full and whole:
                    self._waiting.append(f"[{self._left_out} lines are left out: nobody read them]\n")
                    self._held += len(self._waiting[-1])
                    self._left_out, self._full = 0, False
                self._news.notify_all()

    def _put(self, text: str) -> bool:
        """Write all of it, however long that takes; False: whoever read it has gone."""
        data = memoryview(text.encode(self.encoding, self.errors))
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # somebody else made it non-blocking
                select.select([], [self._fd], [])
            except OSError:
                return False
        return True


def free_output() -> None:
    """From now on printing does not wait for whoever reads. Streams without a file stay as they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            stream.fileno()
        except (AttributeError, OSError, ValueError):
            continue
        if not isinstance(stream, Outlet):
            stream.flush()
            before = sys.stdout if name == "stderr" and isinstance(sys.stdout, Outlet) else None
            setattr(sys, name, Outlet(stream, before))


def drain_output(seconds: float) -> None:
    """Give what was printed so long to be read, in all."""
    until = time.monotonic() + seconds
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Outlet):
            stream.drain(until - time.monotonic())


# --------------------------------------------------------------------------------- the exit

LEAVING_SECONDS = 3.0
"""Of any command: whatever libraries do at the exit, and all else that remains, is over by then."""
_own: list[int] = []
"""The number of the process that is this command's and ends with it."""


def take_process() -> None:
    """This process belongs to the command line alone."""
    _own.append(os.getpid())


def leave_within(seconds: float, code: int) -> None:
    """End this process with ``code`` after so many seconds at the latest, if it is the command line's."""
    if os.getpid() not in _own:
        return

    def wait() -> None:
        time.sleep(max(0.0, seconds))
        os._exit(code)

    threading.Thread(target=wait, name="leave", daemon=True).start()


def leave(code: int) -> NoReturn:
    """End this process now: what is registered for the exit is done, what was printed is written.

    Taking torch and its like apart would take Python seconds, on a slow machine tens of them, and they would
    be seconds of the budget.
    """
    take_process()
    leave_within(LEAVING_SECONDS, code)
    atexit._run_exitfuncs()
    drain_output(ENDING["lines"])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # nobody listens any more
    os._exit(code)
