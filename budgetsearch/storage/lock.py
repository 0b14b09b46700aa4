"""Who has a run: its lock, the owner who signed it, and waiting for one who may be gone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import RunFolderError
from budgetsearch.core.secrets import shown_url
from budgetsearch.storage.files import local_time, open_own, unwritable

QUIET_SECONDS = 120.0
"""A run of another machine counts as ended when nothing in its folder was written for so long: a job writes
to the ledger every 5 s, and network file systems may show it a minute late."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Differs from machine to machine and from boot to boot; the same in all containers of a machine."""
COMMAND_LENGTH = 200
LEFT_SECONDS = 5.0
"""A lock whose process has ended is looked at again after so long."""
STEP_SECONDS = 5.0
MAX_SECONDS = QUIET_SECONDS + 60.0
"""Whoever still writes then is alive; a network file system may show a last write a minute late."""


@dataclass(frozen=True)
class Owner:
    """The process that took a lock."""

    pid: int
    host: str
    boot: str
    started: float
    """When the process began, in seconds since the epoch: numbers are given again."""
    taken: float
    """When it took the lock."""
    command: str

    @classmethod
    def this_process(cls) -> Owner:
        """Of the process that asks, with the passwords of its command hidden."""
        words = [Path(sys.argv[0]).name, *sys.argv[1:]]
        command = shlex.join(map(_shown_argument, words))[:COMMAND_LENGTH]
        began = psutil.Process().create_time()
        return cls(os.getpid(), socket.gethostname(), _boot(), began, time.time(), command)

    def to_json(self) -> str:
        """What the lock file holds."""
        return json.dumps(asdict(self))

    def elsewhere(self) -> bool:
        """Whether it ran on another machine, as far as one can tell."""
        return self.host != socket.gethostname() and self.boot != _boot()

    def lives(self) -> bool:
        """Whether it is a process of this machine that has not ended."""
        if self.elsewhere():
            return False
        try:
            began = psutil.Process(self.pid).create_time()
        except (psutil.Error, ValueError, OverflowError):
            return False
        return abs(began - self.started) < 2.0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command}) since {local_time(self.taken)}"


def _shown_argument(word: str) -> str:
    flag, is_set, value = word.partition("=")
    return f"{flag}={shown_url(value)}" if is_set and flag.startswith("--") else shown_url(word)


def read_owner(text: str) -> Owner | None:
    """Who the content of a lock file names; None if it names nobody."""
    try:
        found = read_json(text)
        return Owner(
            *(int(found["pid"]), str(found["host"]), str(found["boot"])),
            *(float(found["started"]), float(found["taken"]), str(found["command"])),
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def held(lock: Path, folder: Path) -> bool:
    """Whether a process has the lock, as far as one can tell who may only read.

    The kernel's lock tells, and where it tells nothing the record does: a process of this machine by its
    number and its start, one of another machine by the age of what it last wrote.
    """
    try:
        fd = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
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


class InUse(RunFolderError):
    """A run that a process works on, or may."""

    def __init__(self, message: str, who: str, wait_seconds: float) -> None:
        super().__init__(message)
        self.who = who
        self.wait_seconds = wait_seconds
        """After so long it may turn out that nobody does; 0: it will not."""


class RunLock:
    """An exclusive lock on a run folder, held until every process that inherited it is gone."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            RunFolderError: another process holds it, or may hold it on another machine.
        """
        self._path = folder / "lock"
        self._signed = False
        try:
            self.fd = open_own(self._path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise unwritable(folder, error) from error
        try:
            self._take(folder)
        except BaseException:
            self.release()
            raise

    def _take(self, folder: Path) -> None:
        owner = self._owner()
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            # A file server may keep the lock of a machine that went down, and a worker outlive its driver.
            left = owner is not None and not owner.lives()
            raise self._in_use(folder, owner, wait=LEFT_SECONDS if left else 0.0) from error
        except OSError as error:  # a file system without locks: the record is all there is
            if owner is not None and (owner.elsewhere() or owner.lives()):
                raise self._in_use(folder, owner, f" If it has ended, remove {self._path}.") from error
        wait = seconds_to_wait(owner, folder, self._path)
        if wait > 0:
            raise self._in_use(
                folder,
                owner,
                " That is another machine, whose locks may not be seen here, and the folder was written a "
                f"moment ago. If that process has ended, try again in {wait:.0f} s, or remove {self._path}.",
                wait,
            )
        self.left_behind = owner
        """Who had the lock and ended without letting go of it: killed, or its machine went down."""

    def _owner(self) -> Owner | None:
        return read_owner(os.pread(self.fd, 4096, 0).decode("utf-8", "replace"))

    def _in_use(self, folder: Path, owner: Owner | None, more: str = "", wait: float = 0.0) -> InUse:
        if owner is not None and not owner.elsewhere() and not owner.lives():
            more = more or " That process has ended, but its worker has not yet; try again in a moment."
        who = str(owner or "a process that is starting or ending")
        return InUse(
            f"{folder} is in use by {who}. Wait for it, stop it "
            f"with Ctrl-C there, or name another folder.{more}",
            who,
            wait,
        )

    def sign(self) -> None:
        """Write down who has the lock.

        Raises:
            RunFolderError: that cannot be written; the lock is let go of.
        """
        record = Owner.this_process().to_json().encode()
        self._signed = True
        try:
            if os.pwrite(self.fd, record, 0) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(self.fd, len(record))
        except OSError as error:
            self.release()
            raise unwritable(self._path.parent, error) from error

    def release(self) -> None:
        """Let go of this process's share; safe to call twice."""
        if self.fd >= 0:
            try:
                if self._signed:
                    os.ftruncate(self.fd, 0)
            except OSError:
                pass  # a record that stays names a process that has ended
            os.close(self.fd)
            self.fd = -1


def lock_in_time(
    folder: Path, say: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
) -> RunLock:
    """Take the lock of a run whose process was killed on another machine a moment ago, once that is sure.

    Raises:
        RunFolderError: a process of this machine has it, or another machine goes on writing.
    """
    waited = 0.0
    while True:
        try:
            return RunLock(folder)
        except InUse as busy:
            if not busy.wait_seconds or waited >= MAX_SECONDS:
                raise
            if not waited:
                say(
                    f"{folder} was written a moment ago, or its lock is still held: waiting up to "
                    f"{MAX_SECONDS:.0f} s to see whether {busy.who} has ended"
                )
            pause = min(busy.wait_seconds, STEP_SECONDS)
            sleep(pause)
            waited += pause
