"""Output that never holds its writer up: a thread writes it, and what nobody reads is left out.

A pipe whose reader stopped reading, or a terminal that was stopped with Ctrl-S, blocks whoever writes to it.
A run has a deadline, so what it prints goes through here.
"""

from __future__ import annotations

import io
import os
import select
import sys
import threading
import time
from typing import TextIO

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

    # ---------------------------------------------------------------------- the thread

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
