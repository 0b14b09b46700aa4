"""Who has a run: what its lock file says, and what to make of it.

The kernel's lock is what excludes, and it goes with its process. The record beside it is for people, and for
the cases in which the kernel of this machine cannot know: a file system without locks, and another machine.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from budgetsearch.core.secrets import without_secrets

QUIET_SECONDS = 120.0
"""A run of another machine counts as ended when nothing in its folder was written for so long: a job writes
to the ledger every 5 s, and network file systems may show it a minute late."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Differs from machine to machine and from boot to boot; the same in all containers of a machine."""
COMMAND_LENGTH = 200


@dataclass(frozen=True)
class Owner:
    """The process that took a lock."""

    pid: int
    host: str = ""
    """Empty in the locks of earlier versions, which held the number alone."""
    boot: str = ""
    started: float = 0.0
    """When the process began, in seconds since the epoch: numbers are given again."""
    taken: float = 0.0
    """When it took the lock."""
    command: str = ""

    @classmethod
    def this_process(cls) -> Owner:
        """Of the process that asks, with the passwords of its command hidden."""
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        shown = without_secrets(command)[:COMMAND_LENGTH]
        began = psutil.Process().create_time()
        return cls(os.getpid(), socket.gethostname(), _boot(), began, time.time(), shown)

    def to_json(self) -> str:
        """What the lock file holds."""
        return json.dumps(asdict(self))

    def elsewhere(self) -> bool:
        """Whether it ran on another machine, as far as one can tell."""
        return bool(self.host) and self.host != socket.gethostname() and self.boot != _boot()

    def lives(self) -> bool:
        """Whether it is a process of this machine that has not ended."""
        if self.elsewhere():
            return False
        try:
            began = psutil.Process(self.pid).create_time()
        except (psutil.Error, ValueError, OverflowError):
            return False
        return not self.started or abs(began - self.started) < 2.0

    def __str__(self) -> str:
        about = [f"on {self.host}" if self.host else "", f"({self.command})" if self.command else ""]
        since = f"since {_moment(self.taken)}" if self.taken else ""
        return " ".join(filter(None, (f"process {self.pid}", *about, since)))


def read_owner(text: str) -> Owner | None:
    """Who the content of a lock file names; None if it names nobody."""
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            return Owner(
                *(int(found["pid"]), str(found["host"]), str(found["boot"])),
                *(float(found["started"]), float(found["taken"]), str(found["command"])),
            )
        return Owner(int(found)) if isinstance(found, int) and found > 0 else None
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def held(lock: Path, folder: Path) -> bool:
    """Whether a process has the lock, as far as one can tell who may only read.

    The kernel's lock tells, and where it tells nothing the record does: a process of this machine by its
    number and its start, one of another machine by the age of what it last wrote.
    """
    try:
        fd = os.open(lock, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return _written_lately(folder)
    try:
        owner = read_owner(os.pread(fd, 4096, 0).decode("utf-8", "replace"))
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:  # a file system without locks
            if owner is not None and owner.lives():
                return True
        return seconds_to_wait(owner, folder, lock) > 0
    finally:
        os.close(fd)


def _written_lately(folder: Path) -> bool:
    """Whether the ledger was written to a moment ago: where nobody lets us look at the lock."""
    written = [path.stat().st_mtime for path in folder.glob("ledger.*") if path.is_file()]
    return bool(written) and max(written) + QUIET_SECONDS > _server_time(folder)


def seconds_to_wait(owner: Owner | None, folder: Path, lock: Path) -> float:
    """How long the folder must still be quiet before a lock of another machine counts as left behind.

    Ages are told by the file server's clock: this machine's may be another.
    """
    if owner is None or not owner.elsewhere():
        return 0.0
    written = [path.stat().st_mtime for path in folder.glob("ledger.*") if path.is_file()]
    return max(0.0, max([*written, lock.stat().st_mtime]) + QUIET_SECONDS - _server_time(folder))


def _server_time(folder: Path) -> float:
    """The clock of the folder's file system, or this machine's where nothing can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"?")
            probe.flush()
            return os.fstat(probe.fileno()).st_mtime
    except OSError:
        return time.time()


def _boot() -> str:
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _moment(seconds: float) -> str:
    """A moment with its age, like ``2026-11-24 18:00:05 (12 minutes ago)``."""
    shown = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    return f"{shown} ({_age(max(0.0, time.time() - seconds))} ago)"


def _age(seconds: float) -> str:
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= size or size == 1:
            number = int(seconds // size)
            return f"{number} {name}{'' if number == 1 else 's'}"
    raise AssertionError
