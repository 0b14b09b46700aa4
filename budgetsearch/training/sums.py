"""The files of a checkpoint and their sums: whether it is whole, without torch.

``state.json`` lists the size and the SHA-256 of every other file. Sizes are looked at when a run goes on,
sums whenever a file is about to be used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import CheckpointError

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
STATE_FILE = "trainer.safetensors"
META_FILE = "state.json"
SUMMED = (ADAPTER_FILE, STATE_FILE, CONFIG_FILE)
"""Whose sums stand in ``state.json``."""
ADAPTER_FILES = (ADAPTER_FILE, CONFIG_FILE)
"""What PEFT reads."""
SUMS_FILE = "SHA256SUMS"
"""In an exported adapter: the sums of all its other files, as ``sha256sum --check`` reads them."""


def sha256(path: Path) -> str:
    """The sum of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(folder: Path) -> dict[str, Any]:
    """What ``state.json`` says of the other files of a checkpoint."""
    return {
        "sha256": {name: sha256(folder / name) for name in SUMMED},
        "bytes": {name: (folder / name).stat().st_size for name in SUMMED},
    }


def read_meta(folder: Path) -> Mapping[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        CheckpointError: it is not there, is no JSON, or lists other files than a checkpoint has.
    """
    try:
        meta: Mapping[str, Any] = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        if set(meta["sha256"]) != set(SUMMED):  # names of a stranger's choice are no files to open
            raise CheckpointError(f"The checkpoint {folder} is damaged: {META_FILE} lists other files.")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The checkpoint {folder} cannot be read: {error}") from error
    return meta


def check(folder: Path, names: Iterable[str] = SUMMED) -> Mapping[str, Any]:
    """Compare files of a checkpoint with their sums; returns what ``state.json`` holds.

    Raises:
        CheckpointError: one is missing, torn or altered.
    """
    meta = read_meta(folder)
    for name in names:
        try:
            same = sha256(folder / name) == meta["sha256"][name]
        except OSError as error:
            raise CheckpointError(f"The checkpoint {folder} cannot be read: {error}") from error
        if not same:
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name} has changed.")
    return meta


def check_sizes(folder: Path) -> None:
    """Whether all files of a checkpoint are there and as long as they were: the cheap look.

    Raises:
        CheckpointError: one is missing or has another length.
    """
    sizes = read_meta(folder).get("bytes") or dict.fromkeys(SUMMED)
    for name in SUMMED:
        try:
            length = (folder / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"The checkpoint {folder} cannot be read: {error}") from error
        if length == 0 or sizes.get(name) not in (None, length):
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name} has {length} bytes.")


def write_sums(folder: Path) -> dict[str, str]:
    """Write the sums of all files of a folder beside them; returns them by name."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS_FILE)
    known = {name: sha256(folder / name) for name in names}
    text = "".join(f"{digits}  {name}\n" for name, digits in known.items())
    (folder / SUMS_FILE).write_text(text, encoding="utf-8")
    return known


def check_sums(folder: Path) -> None:
    """Compare a folder with the sums that ``write_sums`` wrote.

    Raises:
        CheckpointError: a file is missing or has changed, or there are no sums.
    """
    known = read_sums(folder)
    try:
        wrong = [name for name in sorted(known) if sha256(folder / name) != known[name]]
    except OSError as error:
        raise CheckpointError(f"The adapter in {folder} cannot be read: {error}") from error
    if wrong:
        raise CheckpointError(f"The adapter in {folder} is damaged: {', '.join(wrong)} changed.")


def read_sums(folder: Path) -> dict[str, str]:
    """The sums that ``write_sums`` wrote, by name.

    Raises:
        CheckpointError: there are none for an adapter's files, or a name that leads out of the folder.
    """
    known = {}
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The adapter in {folder} cannot be read: {error}") from error
    for line in lines:
        digits, _, name = line.partition("  ")
        if Path(name).name != name:
            raise CheckpointError(f"The adapter in {folder} is damaged: {SUMS_FILE} names {name[:80]!r}.")
        known[name] = digits
    if missing := [name for name in ADAPTER_FILES if name not in known]:
        raise CheckpointError(f"The adapter in {folder} is damaged: {SUMS_FILE} does not list {missing[0]}.")
    return known
