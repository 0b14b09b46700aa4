"""A limit on the time of a stranger's program that runs inside of this one, such as a chat template."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
LOOK_SECONDS = 0.2


class Overlong(Exception):
    """It took longer than it may."""


class _Over(BaseException):
    """What the thread at work is sent: nothing that a library catches."""


class Limit:
    """Calls functions, each of which ends after so many seconds, as long as it is Python that runs in it.

    One thread looks after all calls, for a thread for each would cost more than most of them take.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._watched: tuple[int, float] | None = None
        """The thread that is at work, and since when."""
        self._sent = False
        """Whether an exception is on its way to it."""
        self._watcher = threading.Thread()

    def call(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns.

        Raises:
            Overlong: it did not return in time.
        """
        if not self._watcher.is_alive():
            self._watcher = threading.Thread(target=self._watch, name="limit", daemon=True)
            self._watcher.start()
        try:
            with self._lock:
                self._watched = (threading.get_ident(), time.monotonic())
            try:
                return work()
            except _Over:
                self._sent = False  # it has come
                raise
            finally:
                with self._lock:
                    self._watched = None
                until = time.monotonic() + LOOK_SECONDS  # a destructor may have swallowed it
                while self._sent and time.monotonic() < until:
                    time.sleep(0)
        except _Over:
            raise Overlong(f"it takes more than {self.seconds:g} s") from None
        finally:
            self._watched, self._sent = None, False

    def _watch(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            with self._lock:
                if self._watched is None:
                    continue
                thread, began = self._watched
                if time.monotonic() - began > self.seconds:
                    self._sent = True  # again and again: whatever swallows one does not go on for ever
                    send = ctypes.pythonapi.PyThreadState_SetAsyncExc
                    send(ctypes.c_ulong(thread), ctypes.py_object(_Over))
