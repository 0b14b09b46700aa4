"""Where checkpoints lie that several machines need: in a folder that all of them mount, or behind a URL.

A folder needs nothing but its name: checkpoints are written into it as on one machine. Behind a URL they
are copied by ``checkpoint_store``. Each run has a place of its own there, with a sign in it: whoever does
not find the sign looks at another place, or at a folder that is not mounted.

No password ever stands in the URL: fsspec takes them from its environment or its configuration.
"""

from __future__ import annotations

import importlib
import uuid
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import DiskError, SettingsError
from budgetsearch.core.secrets import shown_url
from budgetsearch.storage.checkpoint_store import (
    ONCE,
    CheckpointStore,
    Patience,
    credentials,
    failure,
    missing_sign,
)
from budgetsearch.storage.files import remedy, replace_file
from budgetsearch.storage.ownership import SIGN, carries_sign, give_back, sign_of, trial_of

LOCAL = ("file", "local")
"""Protocols of what is a folder all the same."""


def folder_of(shared: str | None) -> Path | None:
    """The folder that ``--shared`` names; None: nothing is shared, or behind a URL."""
    if not shared:
        return None
    protocol, there, rest = shared.partition("://")
    if not there:
        return Path(shared).expanduser()
    return Path(rest) if protocol in LOCAL else None


def url_of(shared: str | None) -> str:
    """The URL that ``--shared`` names; nothing: nothing is shared, or in a folder."""
    return shared if shared and folder_of(shared) is None else ""


def check_shared(shared: str) -> None:
    """Check what can be checked without a network.

    Raises:
        SettingsError: a password stands in the URL, or nobody here knows its protocol.
    """
    shown = shown_url(shared)
    if shown != shared:
        raise SettingsError(
            f"--shared {shown} holds a password, and everybody could read it in the list of processes. Leave "
            f"it out, and set it in the environment of every machine: {credentials(shared)}."
        )
    if not (url := url_of(shared)):
        return
    protocol, _, rest = url.partition("://")
    if "::" in url or not rest.strip("/"):
        raise SettingsError(f"--shared {url} is no place: name a folder, or a URL like s3://bucket/folder.")
    try:
        _fsspec().get_filesystem_class(protocol)
    except ImportError as error:
        raise SettingsError(f"--shared {url}: {error} (on every machine), or name a folder.") from error
    except ValueError as error:
        raise SettingsError(
            f"--shared {url}: no package here knows {protocol}://. Name a folder that every machine mounts, "
            "or a URL like s3://bucket/folder."
        ) from error


def own_place(shared: str, run: str) -> str:
    """Where one run keeps its checkpoints: below what was named, for several runs may name the same."""
    name = f"{run}-{uuid.uuid4().hex[:8]}"
    folder = folder_of(shared)
    return f"{shared.rstrip('/')}/{name}" if folder is None else str(folder.absolute() / name)


def place_name(place: str) -> str:
    """What the sign of a run's place says."""
    return place.rstrip("/").rpartition("/")[2]


def begin_place(place: str) -> None:
    """Make the place of a run and sign it: whether it can be written shows before anything is spent.

    Raises:
        SettingsError: it cannot be written or read.
    """
    sign = sign_of(place_name(place))
    try:
        if (folder := folder_of(place)) is not None:
            folder.mkdir(parents=True)
            replace_file(folder / SIGN, sign)
            found = (folder / SIGN).read_bytes()
        else:
            store = open_store(place)
            store.write(SIGN, sign)
            found = store.read(SIGN)
    except OSError as error:
        raise SettingsError(f"--shared {place} cannot be written: {error}; {remedy(error)}.") from error
    except DiskError as error:
        raise SettingsError(f"--shared: {error}") from error
    if found != sign:
        raise SettingsError(
            f"--shared {place} does not give back what was written there. Name another place."
        )


def find_place(place: str) -> None:
    """Insist that a run's place is there before anything in it is called lost: a folder may not be mounted.

    Raises:
        SettingsError: it is not there, or cannot be reached.
    """
    try:
        folder = folder_of(place)
        signed = carries_sign(folder, place_name(place)) if folder is not None else False
        there = signed or (folder is None and open_store(place).has(SIGN))
    except (OSError, DiskError) as error:
        raise SettingsError(f"The checkpoints of this run are in {place}: {error}") from error
    if not there:
        raise SettingsError(
            f"The checkpoints of this run cannot be found: {missing_sign(place)} Then resume again. "
            "If they are gone for good, only a new run helps; the run's adapter can be used as it is."
        )


def leave_place(place: str) -> None:
    """Remove the place of a run that never began; whatever is in the way stays."""
    try:
        if (folder := folder_of(place)) is not None:
            if carries_sign(folder, place_name(place)):
                give_back(folder)
        else:
            store = open_store(place, ONCE)
            for name in filter(trial_of, store.names()):
                store.remove(name)
            store.remove(SIGN)
    except (OSError, DiskError, SettingsError):
        pass


def open_store(url: str, patience: Patience | None = None) -> CheckpointStore:
    """What is behind a URL; nothing is asked yet.

    Raises:
        SettingsError: no package here knows its protocol.
        DiskError: what is behind it refuses even to be asked: credentials, a configuration.
    """
    check_shared(url)
    try:
        files, root = _fsspec().core.url_to_fs(url)
    except Exception as error:
        raise failure(f"{url} cannot be opened", error, url) from error
    return CheckpointStore(url, files, root.rstrip("/"), patience or Patience())


def _fsspec() -> Any:
    try:
        importlib.import_module("fsspec.core")
        return importlib.import_module("fsspec")
    except ImportError as error:
        raise SettingsError(
            "--shared with a URL needs fsspec: pip install 'budgetsearch[ray]', or name a folder."
        ) from error
