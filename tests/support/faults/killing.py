"""Where a process can be killed: before and after everything that it does to a file, a pipe or the clock.

A timed kill rarely hits the narrow windows, such as the one between two renames. So these points are
counted in a run that lives, and a later one ends itself with signal 9 at a chosen one.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from budgetsearch.engines import local, worker
from budgetsearch.storage import ledger
from tests.support.faults import fastrun

Victim = Literal["driver", "worker", "both"]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
AUDITED = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.chmod", "sqlite3.connect")


@dataclass(frozen=True)
class Shot:
    """End ``victim`` at the ``nth`` time that its process comes by ``site``."""

    victim: Victim
    process: Literal["driver", "worker"]
    """Whose points are counted; with ``both`` the other one dies with it."""
    site: str
    nth: int
    generation: int = 1
    """Which worker process of the driver, from 1."""


@dataclass
class _State:
    shot: Shot | None = None
    role: Literal["driver", "worker"] = "driver"
    generation: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    out: int = -1
    """Where points are written down; -1: nowhere."""
    armed: bool = False
    busy: threading.local = field(default_factory=threading.local)
    """Whether a thread is at a point already; the study has a thread of its own."""


STATE = _State()


def arm(shot: Shot | None, out: int = -1) -> None:
    """In a fork that will be a driver: count its points and its workers', and shoot."""
    STATE.shot, STATE.out = shot, out
    _patch()
    sys.addaudithook(_audited)
    fastrun.ForkedProcess.before_work = staticmethod(_in_worker)
    STATE.armed = True


def _in_worker() -> None:
    STATE.role, STATE.counts = "worker", {}


def _audited(event: str, arguments: tuple[Any, ...]) -> None:
    if not STATE.armed or getattr(STATE.busy, "here", False):
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITING and not str(path).startswith("/proc"):
            point("open")
    elif event in AUDITED:
        point(event)


def point(what: str) -> None:
    """The process may be killed here."""
    if not STATE.armed or getattr(STATE.busy, "here", False):
        return
    STATE.busy.here = True
    try:
        site = f"{STATE.role}: {what} in {_caller()}"
        STATE.counts[site] = STATE.counts.get(site, 0) + 1
        if STATE.out >= 0:
            os.write(STATE.out, (site + "\n").encode())
        shot = STATE.shot
        if shot is None or shot.process != STATE.role or shot.site != site:
            return
        if shot.process == "worker" and shot.generation != STATE.generation:
            return
        if STATE.counts[site] == shot.nth:
            _shoot(shot)
    finally:
        STATE.busy.here = False


MARKER = ""
"""A file that says that somebody was shot."""


def _shoot(shot: Shot) -> None:
    if MARKER:
        os.close(os.open(MARKER, os.O_WRONLY | os.O_CREAT))
    if shot.victim == "both":
        other = os.getppid() if STATE.role == "worker" else _worker()
        with suppress(ProcessLookupError):
            if other:
                os.kill(other, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # the signal may take a moment


_WORKERS: list[int] = []


def _worker() -> int:
    return _WORKERS[-1] if _WORKERS else 0


SERVANTS = (
    *("storage.ledger.append", "run.driver._append", "run.jobs.charge", "run.jobs.rest"),
    *("run.driver._append_export", "storage.backup.append"),
    *(
        "storage.files.sync",
        "storage.files.fresh_folder",
        "storage.files.replace_file",
        "storage.files._replace",
    ),
    *("engines.local._write", "engines.local._ensure_process"),
)
"""Functions that many others call: a point in one of them is also told apart by who called it."""


def _caller() -> str:
    """The innermost function of budgetsearch on the stack, and whom it works for."""
    frame = sys._getframe(2)
    served = ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("budgetsearch."):
            name = f"{module.removeprefix('budgetsearch.')}.{frame.f_code.co_name}"
            if name not in SERVANTS:
                return f"{served} for {name}" if served else name
            served = served or name
        frame = frame.f_back  # type: ignore[assignment]
    return served or "a library"


def _around(owner: Any, name: str, label: str, before: bool = True, after: bool = True) -> None:
    old: Callable[..., Any] = getattr(owner, name)

    def wrapped(*arguments: Any, **more: Any) -> Any:
        if before:
            point(f"before {label}")
        result = old(*arguments, **more)
        if after:
            point(f"after {label}")
        return result

    setattr(owner, name, wrapped)


class _Connection(sqlite3.Connection):
    """Points around each statement of the ledger."""

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        """A statement."""
        point("before a statement")
        result = super().execute(*arguments)
        point("after a statement")
        return result


def _patch() -> None:
    _around(os, "fsync", "fsync")
    _around(os, "replace", "rename", before=False)
    _around(os, "rename", "rename", before=False)
    _around(fastrun.LeapClock, "now", "the clock", before=False)
    _around(local.LocalEngine, "_write", "an order")
    _around(worker.Pipe, "send", "a report")
    connect = sqlite3.connect

    def with_points(*arguments: Any, **more: Any) -> sqlite3.Connection:
        return connect(*arguments, **{"factory": _Connection, **more})

    ledger.sqlite3 = _Module(sqlite3, connect=with_points)  # type: ignore[attr-defined]
    start = fastrun.ForkedProcess.__init__

    def counted(self: Any, *arguments: Any, **more: Any) -> None:
        STATE.generation += 1
        start(self, *arguments, **more)
        _WORKERS.append(self.pid)

    fastrun.ForkedProcess.__init__ = counted  # type: ignore[method-assign]


class _Module:
    """A module with some names replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module, self.__dict__["_replaced"] = module, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(self._module, name)
