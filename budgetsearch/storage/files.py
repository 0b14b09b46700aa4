"""Files and folders: written whole or not at all, and errors that say what to do."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from budgetsearch.core.errors import RunFolderError

REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or have the quota raised",
    errno.EROFS: "mount its disk for writing",
    errno.EACCES: "mend its permissions",
    errno.EPERM: "mend its permissions",
    errno.ENOENT: "bring the folder back",
    errno.ELOOP: "put the file itself where a link is",
}
"""What to do about a folder that cannot be written."""
UNFINISHED = ".budgetsearch-"
"""In the name of a folder that is still being written."""
AT_FDCWD = -100
RENAME_EXCHANGE = 2
"""Of Linux's renameat2."""


def remedy(error: OSError) -> str:
    """What to do about a write that failed, as the first half of a sentence."""
    return REMEDIES.get(error.errno or 0, "make room or mend the folder")


def open_own(path: Path, flags: int) -> int:
    """Open a file for writing, but none that a link in its place leads to; returns the file descriptor.

    Raises:
        OSError: it cannot be opened; ELOOP: it is a link.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def append_to(path: Path) -> BinaryIO:
    """A file of ours, made where there is none, to write at its end.

    Raises:
        OSError: it cannot be opened; ELOOP: it is a link.
    """
    return os.fdopen(open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` alone among all processes; waits for whoever has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = open_own(path.with_suffix(path.suffix + ".lock"), os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target``, synced and whole, or goes. Call it locked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}{UNFINISHED}"
    for leftover in list(target.parent.iterdir()):
        # Exactly what mkdtemp makes: a neighbour's folder may begin with the same name.
        if re.fullmatch(re.escape(prefix) + "[a-z0-9_]{8}", leftover.name) and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
    folder = target.parent / f"{prefix}{secrets.token_hex(4)}"
    folder.mkdir()  # with what the umask leaves, unlike mkdtemp's
    try:
        yield folder
        for path in [*folder.iterdir(), folder]:
            sync(path)
        folder.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def why_not(target: Path) -> str:
    """Why the folder ``target``, which does not exist, cannot be made with those above it; nothing if it can.

    Found by making something at the nearest folder that is there: permissions do not tell of a full quota, of
    a disk that is mounted read-only, or of a superuser.
    """
    if os.path.lexists(target):
        return "it exists already"
    above = next(path for path in target.absolute().parents if os.path.lexists(path))
    if not above.is_dir():
        return f"{above} is not a folder"
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}{UNFINISHED}", dir=above))
    except OSError as error:
        return f"{above}: {error.strerror}; {remedy(error)}"
    return ""


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system or its file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    done = renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return bool(done == 0)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Let the file hold this, or what it held before, whatever happens meanwhile."""
    _replace(path, path.with_name(f".{path.name}.new"), content)
    sync(path.parent)


def _replace(path: Path, fresh: Path, content: bytes) -> None:
    """By way of a file that is made for it: a link, or what a killed process left there, goes first."""
    fresh.unlink(missing_ok=True)
    with os.fdopen(open_own(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def cache_folder() -> Path:
    """Where converted models and tokenized data are kept: BUDGETSEARCH_CACHE, or the user's cache."""
    given = os.environ.get("BUDGETSEARCH_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).absolute() if base else Path.home() / ".cache") / "budgetsearch"


def replace_text(path: Path, text: str) -> Path:
    """Write ``text`` over an older file; returns ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _replace(path, temporary, text.encode("utf-8", "replace"))
    finally:
        temporary.unlink(missing_ok=True)
    return path


def remove_empty(folder: Path) -> None:
    """Remove a folder, if nothing is in it."""
    with suppress(OSError):
        folder.rmdir()


def unwritable(path: Path, error: OSError) -> RunFolderError:
    """What to say of a run folder that cannot be written, and what to do."""
    return RunFolderError(f"{path} cannot be written ({error.strerror}): {remedy(error)}.")


def local_time(seconds: float) -> str:
    """A moment since the epoch as local time with its offset, to the second."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
