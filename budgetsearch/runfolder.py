"""The folder of one run: where everything lies, and the lock that keeps a second process out."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetsearch.backup import backup_of
from budgetsearch.core.errors import LedgerError, RunFolderError
from budgetsearch.core.secrets import shown_settings
from budgetsearch.folders import remedy, replace_file
from budgetsearch.ledger import read_entries
from budgetsearch.owner import Owner, held, read_owner, seconds_to_wait

LEFT_SECONDS = 5.0
"""A lock whose process has ended is looked at again after so long."""
OWN = (
    *("lock", "worker.log", "checkpoints", "settings.json", "versions.lock", "ledger.sqlite", "study.sqlite"),
    *("ledger.jsonl", "traceback.log", "ray", ".settings.json.new", ".versions.lock.new"),
)
"""What a run that was stopped before its first event may have left, and what SQLite keeps beside it."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def ledger(self) -> Path:
        """The append-only record: the truth."""
        return self.path / "ledger.sqlite"

    @property
    def backup(self) -> Path:
        """The same once more, in a file that only grows."""
        return backup_of(self.ledger)

    @property
    def study(self) -> Path:
        """The Optuna study: a view of the ledger."""
        return self.path / "study.sqlite"

    @property
    def settings(self) -> Path:
        """Every setting, defaults included; without passwords."""
        return self.path / "settings.json"

    @property
    def versions(self) -> Path:
        """Every installed package with its version."""
        return self.path / "versions.lock"

    @property
    def checkpoints(self) -> Path:
        """The trials' checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The exported PEFT adapter."""
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.md"

    @property
    def report_html(self) -> Path:
        """The report with figures, one page that needs no network."""
        return self.path / "report.html"

    @property
    def report_json(self) -> Path:
        """The report's numbers, for programs."""
        return self.path / "report.json"

    @property
    def worker_log(self) -> Path:
        """What the worker process and its libraries printed."""
        return self.path / "worker.log"

    @property
    def ray(self) -> Path:
        """What Ray Tune wrote: results, TensorBoard files, logs of the workers."""
        return self.path / "ray"

    @property
    def traceback(self) -> Path:
        """Where errors happened that nobody foresaw."""
        return self.path / "traceback.log"

    @property
    def command_word(self) -> str:
        """The path as a shell takes it: quoted where it must be."""
        return shlex.quote(str(self.path))

    def has_ledger(self) -> bool:
        """Whether the ledger is there, or its backup, from which it can be made again."""
        return self.ledger.is_file() or self.backup.is_file()

    def check_free(self) -> None:
        """Refuse a folder that a new run must not write into.

        Raises:
            RunFolderError: it is in use, holds a run already, or holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"--out {self.path} is a file. Name a folder that does not exist yet.")
        if not self.path.exists():
            self._check_writable()
            return
        self.check_not_in_use()
        if self.has_ledger() and self._has_begun():
            raise RunFolderError(
                f"--out {self.path} already holds a run. Go on with `budgetsearch resume "
                f"{self.command_word}`, or name another folder."
            )
        names = {re.sub(r"(?<=\.sqlite)-(wal|shm|journal)$", "", path.name) for path in self.path.iterdir()}
        if names - set(OWN):
            raise RunFolderError(f"--out {self.path} is not empty and holds no run. Name another folder.")

    def _has_begun(self) -> bool:
        """Whether the ledger holds an event, or may have held one."""
        try:
            return next(read_entries(self.ledger), None) is not None
        except LedgerError:
            return True

    def _check_writable(self) -> None:
        parent = next(p for p in self.path.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise RunFolderError(
                f"--out {self.path} cannot be made: {parent} is not a folder you can write to."
            )

    def check_run(self) -> None:
        """Insist that there is a run in the folder.

        Raises:
            RunFolderError: there is none.
            LedgerError: there was one, but its ledger is gone.
        """
        if self.has_ledger():
            return
        if self.path.is_dir() and self.in_use():
            raise self.being_prepared()
        if self.has_earned():
            raise LedgerError(
                f"The ledger {self.ledger} is gone, and its backup {self.backup.name} too, but there "
                "are checkpoints or an adapter beside them. Restore one of the two files from a copy; the "
                "adapter can be used as it is."
            )
        if self.path.is_file():
            near = RunFolder(self.path.parent)
            hint = f"the run is {near.command_word}" if near.has_ledger() else "name the folder of a run"
            raise RunFolderError(f"{self.path} is a file, not a run: {hint}.")
        what = "has no ledger.sqlite, so it is not a run" if self.path.is_dir() else "does not exist"
        raise RunFolderError(f"{self.path} {what}. `budgetsearch run --out FOLDER` starts one.")

    def has_earned(self) -> bool:
        """Whether there is what only a search can have left."""
        return self.adapter.exists() or any(self.checkpoints.glob("trial*"))

    def forget_study(self) -> None:
        """Remove the study, which may know more than a mended ledger; it is made again from that."""
        for end in ("-wal", "-shm", "-journal", ""):
            Path(f"{self.study}{end}").unlink(missing_ok=True)

    def being_prepared(self) -> RunFolderError:
        """What to say of a run that has not begun yet."""
        return RunFolderError(f"{self.path} is still being prepared. Try again in a moment.")

    def in_use(self) -> bool:
        """Whether a process works on the run; nothing is written to find out."""
        return held(self.path / "lock", self.path)

    def goes(self, closed: bool) -> bool:
        """Whether a process works on the run in it; ``closed``: the ledger says that the run is over."""
        return not closed and self.in_use()

    def check_not_in_use(self) -> None:
        """Refuse a folder whose lock is held.

        Raises:
            RunFolderError: a process works on it.
        """
        if (self.path / "lock").exists():
            RunLock(self).release()

    def prepare(self, settings: dict[str, Any]) -> None:
        """Make what a run needs before its first event: folders, settings, versions.

        Raises:
            RunFolderError: the disk is full, or something else keeps them from being written.
        """
        try:
            self.checkpoints.mkdir(exist_ok=True)
            self.tidy()
            shown = json.dumps(shown_settings(settings), indent=2)
            replace_file(self.settings, f"{shown}\n".encode())
            self._write_versions()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def tidy(self) -> None:
        """Remove what a process left that was killed while it wrote a report or its settings."""
        halves = (self.path / f".{path.name}.new" for path in (self.settings, self.versions))
        for leftover in (*self.path.glob(f".{self.report.stem}.*.tmp"), *halves):
            leftover.unlink(missing_ok=True)

    def _write_versions(self) -> None:
        """Write down the Python and every installed package: what a repetition needs."""
        if self.versions.exists() and self.versions.stat().st_size:
            return  # a resume: what the run began with is what counts
        found = {(d.metadata["Name"] or "?").lower(): d.version for d in importlib.metadata.distributions()}
        lines = [f"# Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
        lines += [f"{name}=={version}" for name, version in sorted(found.items())]
        replace_file(self.versions, ("\n".join(lines) + "\n").encode())

    def clear(self, *, remove: bool) -> None:
        """Take back what was made for a run that never began; ``remove`` the folder as well."""
        if remove:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


class InUse(RunFolderError):
    """A run that a process works on, or may."""

    def __init__(self, message: str, who: str, wait_seconds: float) -> None:
        super().__init__(message)
        self.who = who
        self.wait_seconds = wait_seconds
        """After so long it may turn out that nobody does; 0: it will not."""


class RunLock:
    """An exclusive lock on a run folder, held until every process that inherited it is gone."""

    def __init__(self, folder: RunFolder) -> None:
        """Take the lock.

        Raises:
            RunFolderError: another process holds it, or may hold it on another machine.
        """
        self._path = folder.path / "lock"
        self._signed = False
        try:
            self.fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unwritable(folder.path, error) from error
        try:
            self._take(folder)
        except BaseException:
            self.release()
            raise

    def _take(self, folder: RunFolder) -> None:
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
        wait = seconds_to_wait(owner, folder.path, self._path)
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

    def _in_use(self, folder: RunFolder, owner: Owner | None, more: str = "", wait: float = 0.0) -> InUse:
        if owner is not None and not owner.elsewhere() and not owner.lives():
            more = more or " That process has ended, but its worker has not yet; try again in a moment."
        who = str(owner or "a process that is starting or ending")
        return InUse(
            f"{folder.path} is in use by {who}. Wait for it, stop it "
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
            raise _unwritable(self._path.parent, error) from error

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


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    """What to say of a run folder that cannot be written, and what to do."""
    return RunFolderError(f"{path} cannot be written ({error.strerror}): {remedy(error)}.")
