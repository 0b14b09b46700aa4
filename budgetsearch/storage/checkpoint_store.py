"""Checkpoints behind a URL, each whole or not there.

A checkpoint is a handful of objects below its name, and a marker that is written last and lists them with
their sizes and sums: without its marker it does not exist. Objects are named by their content, so a second
upload of the same checkpoint never spoils the first.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import CheckpointError, DiskError, UnreadableError
from budgetsearch.core.secrets import without_secrets
from budgetsearch.storage.files import fresh_folder, remedy, sha256_of
from budgetsearch.storage.ownership import FORMAT, SIGN

MARKER = "checkpoint.json"
"""In a checkpoint behind a URL: its files with their objects, sizes and sums. It is written last."""
LOOK_SECONDS = 1.0
"""Whoever waits looks so often whether there is still time for it."""
MAX_DOWNLOADS = 2
"""A download with wrong sums is made once more: the connection may have been cut."""
BUCKETS = ("s3://", "s3a://", "gs://", "gcs://", "abfs://", "az://", "oss://")
HOPELESS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ImportError)
"""Another try would end the same way; so would one without credentials."""

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long what may pass by itself is tried again: a lost connection, a busy service."""

    seconds: float = 30.0
    """No try begins later than this."""
    first_wait: float = 0.5
    """Before the second try; each further wait is twice as long."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    hurried: Callable[[], bool] = lambda: False
    """Whether there is no time for another try any more."""

    def insist(self, act: Callable[[], T]) -> T:
        """Act until it works or the time is over; then the last exception is the caller's."""
        until, wait = self.clock() + self.seconds, self.first_wait
        while True:
            try:
                return act()
            except Exception as error:
                if _is_hopeless(error) or self.clock() + wait > until or not self._waited(wait):
                    raise
            wait *= 2

    def _waited(self, seconds: float) -> bool:
        """Wait, but not on for whoever is in a hurry."""
        while seconds > 0 and not self.hurried():
            self.sleep(min(seconds, LOOK_SECONDS))
            seconds -= LOOK_SECONDS
        return not self.hurried()


ONCE = Patience(0.0)


@dataclass
class CheckpointStore:
    """Checkpoints behind a URL, each whole or not there."""

    url: str
    files: Any = field(repr=False)
    """fsspec's file system."""
    root: str
    patience: Patience = Patience()

    # ------------------------------------------------------------------- checkpoints

    def put(self, folder: Path, name: str) -> None:
        """Upload a checkpoint; it is there when this returns, and not before.

        Raises:
            DiskError: it cannot be read here or written there; an older one of that name stays.
        """
        try:
            listed = {path.name: _facts(path) for path in sorted(folder.iterdir()) if path.is_file()}
        except OSError as error:
            raise DiskError(f"The checkpoint {folder} cannot be read ({error}); {remedy(error)}.") from error
        for file, facts in listed.items():
            self._upload(folder / file, f"{name}/{facts['object']}")
        self.write(f"{name}/{MARKER}", json.dumps({"format": FORMAT, "files": listed}, indent=1).encode())

    def get(self, name: str, target: Path, wanted: Iterable[str] = ()) -> None:
        """Download a checkpoint, or only the ``wanted`` files of it, to the folder ``target``.

        Raises:
            CheckpointError: it is not there, or not as it was.
            UnreadableError: nobody can say now, for the store does not answer.
            DiskError: it cannot be written here.
        """
        listed = self._marker(name)
        chosen = {file: listed[file] for file in wanted or listed if file in listed}
        try:
            with fresh_folder(target) as folder:
                for file, facts in chosen.items():
                    self._download(name, facts, folder / file)
        except OSError as error:
            raise DiskError(f"The copy {target} cannot be written ({error}); {remedy(error)}.") from error

    def flaws(self, names: Iterable[str]) -> dict[str, str]:
        """Which of these checkpoints are obviously not whole, and why; sums are not looked at.

        Raises:
            UnreadableError: nobody can say now, for the store does not answer.
        """
        names, found = list(names), {}
        stock = self._stock() if names else {}
        for name in names:
            try:
                for file, facts in self._marker(name).items():
                    if stock.get(f"{name}/{facts['object']}") != facts["bytes"]:
                        raise CheckpointError(f"The checkpoint {self.url}/{name} is damaged: {file}.")
            except CheckpointError as error:
                found[name] = str(error)
        return found

    def names(self) -> set[str]:
        """Of all checkpoints that are there, torn uploads included.

        Raises:
            UnreadableError: the store does not answer.
        """
        return {name for name, inside, _ in (key.partition("/") for key in self._stock()) if inside}

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its marker first; or nothing, if there is none.

        Raises:
            DiskError: it cannot be removed.
        """

        def act() -> None:
            for path in (self._key(name, MARKER), self._key(name)):
                try:
                    self.files.rm(path, recursive=True)
                except FileNotFoundError:
                    pass

        self._insist(f"{self.url}/{name} cannot be removed", act)

    # ----------------------------------------------------------------------- objects

    def write(self, key: str, content: bytes) -> None:
        """Write one small object.

        Raises:
            DiskError: it cannot be written.
        """
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            self._upload(Path(file.name), key)

    def read(self, key: str) -> bytes:
        """Read one small object.

        Raises:
            UnreadableError: it cannot be read.
        """
        try:
            return self.patience.insist(lambda: self._cat(key))
        except Exception as error:
            raise unreadable(f"{self.url}/{key} cannot be read", error, self.url) from error

    def has(self, key: str) -> bool:
        """Whether there is such an object.

        Raises:
            UnreadableError: the store does not answer.
        """
        try:
            self.patience.insist(lambda: self._cat(key))
        except FileNotFoundError:
            return False
        except Exception as error:
            raise unreadable(f"{self.url}/{key} cannot be read", error, self.url) from error
        return True

    def _upload(self, source: Path, key: str) -> None:
        path = self._key(key)

        def act() -> None:
            try:
                self.files.put_file(str(source), path)
            except FileNotFoundError:
                if self.url.startswith(BUCKETS):  # folders need not be made, and a bucket is not ours to make
                    raise
                self.files.makedirs(self.files._parent(path), exist_ok=True)
                self.files.put_file(str(source), path)

        self._insist(f"{self.url}/{key} cannot be written", act)

    def _cat(self, key: str) -> bytes:
        self.files.invalidate_cache()  # others write there as well
        return bytes(self.files.cat_file(self._key(key)))

    def _marker(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        where = f"The checkpoint {self.url}/{name}"
        try:
            text = self.patience.insist(lambda: self._cat(f"{name}/{MARKER}"))
        except FileNotFoundError as error:
            if not self.has(SIGN):  # nothing can be called lost by whoever looks at another place
                raise UnreadableError(f"{where} cannot be read here: {missing_sign(self.url)}") from error
            raise CheckpointError(f"{where} is not there, or its upload never ended.") from error
        except Exception as error:
            raise unreadable(f"{where} cannot be read", error, self.url) from error
        try:
            listed: Mapping[str, Mapping[str, Any]] = read_json(text)["files"]
            for file, facts in listed.items():
                if not (_is_plain(file) and _is_plain(facts["object"]) and len(facts["sha256"]) == 64):
                    raise CheckpointError(f"{where} is damaged: {MARKER} names {file[:80]!r}.")
                int(facts["bytes"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where} is damaged: {MARKER} cannot be read ({error}).") from error
        return listed

    def _download(self, name: str, facts: Mapping[str, Any], target: Path) -> None:
        key = self._key(name, str(facts["object"]))
        for _ in range(MAX_DOWNLOADS):
            try:
                self.patience.insist(lambda: self.files.get_file(key, str(target)))
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"The checkpoint {self.url}/{name} is damaged: {target.name} is missing."
                ) from error
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise  # the disk here
                raise unreadable(f"{self.url}/{name} cannot be read", error, self.url) from error
            if target.stat().st_size == facts["bytes"] and sha256_of(target) == facts["sha256"]:
                return
        raise CheckpointError(f"The checkpoint {self.url}/{name} is damaged: {target.name} has changed.")

    def _stock(self) -> dict[str, int]:
        """Bytes of every object of the run, by its path below the place."""

        def act() -> dict[str, int]:
            self.files.invalidate_cache()
            try:
                found = self.files.find(self.root, detail=True)
            except FileNotFoundError:
                return {}
            skip = len(self.files._strip_protocol(self.root)) + 1
            return {path[skip:]: int(facts["size"] or 0) for path, facts in found.items()}

        try:
            return self.patience.insist(act)
        except Exception as error:
            raise unreadable(f"{self.url} cannot be listed", error, self.url) from error

    def _insist(self, what: str, act: Callable[[], T]) -> T:
        try:
            return self.patience.insist(act)
        except Exception as error:
            raise failure(what, error, self.url) from error

    def _key(self, *parts: str) -> str:
        return "/".join((self.root, *parts))


def _facts(path: Path) -> dict[str, Any]:
    digits = sha256_of(path)
    return {"object": f"{digits[:16]}-{path.name}", "bytes": path.stat().st_size, "sha256": digits}


def _is_plain(name: str) -> bool:
    """Whether it names a file in the folder itself, and no other."""
    return os.path.basename(name) == name and name not in ("", ".", "..")


def _is_hopeless(error: Exception) -> bool:
    return isinstance(error, HOPELESS) or "credential" in f"{type(error).__name__} {error}".lower()


def missing_sign(place: str) -> str:
    """What it means that the sign of a run is not where it should be, and what to do."""
    service = "look at the service that it means on this machine (for S3: AWS_ENDPOINT_URL)"
    do = service if "://" in place else "mount the folder on this machine"
    return f"{SIGN} is missing in {place}; {do}."


def failure(what: str, error: Exception, url: str) -> DiskError:
    """A foreign exception in our words; what a service says may hold a signed URL."""
    said = without_secrets(str(error))[:300]
    if isinstance(error, PermissionError) or "credential" in f"{type(error).__name__} {error}".lower():
        do = f"set the credentials on every machine ({credentials(url)}) and see what they allow"
    elif isinstance(error, FileNotFoundError):
        do = "make the bucket or the folder, or mend its name"
    else:
        do = "look at the network and at the service"
    return DiskError(f"{what} ({type(error).__name__}: {said}); {do}.")


def unreadable(what: str, error: Exception, url: str) -> UnreadableError:
    """The same of what may well be there."""
    return UnreadableError(str(failure(what, error, url)))


def credentials(url: str) -> str:
    """Where the credentials for a URL come from."""
    protocol = url.partition("://")[0]
    if protocol in ("s3", "s3a"):
        return "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials"
    name = protocol.upper() if "://" in url else "PROTOCOL"
    return f"FSSPEC_{name}_PASSWORD or whatever fsspec's {protocol} takes, or ~/.config/fsspec/*.json"
