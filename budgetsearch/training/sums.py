"""The files of a checkpoint and their sums: whether it is whole, without torch.

``state.json`` lists the size and the SHA-256 of every other file. Sizes are looked at when a run goes on,
sums whenever a file is about to be used. Only what is missing, of another size or of another sum is damaged:
a file that the system cannot read now may be whole.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import CheckpointError, UnreadableError
from budgetsearch.storage.files import sha256_of

T = TypeVar("T")

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
STATE_FILE = "trainer.safetensors"
META_FILE = "state.json"
SUMMED = (ADAPTER_FILE, STATE_FILE, CONFIG_FILE)
"""Whose sums stand in ``state.json``; a recipe's checkpoint lists files of its own choice."""
RECIPE = "recipe"
"""In ``state.json`` of a recipe's checkpoint: its name."""
ADAPTER_FILES = (ADAPTER_FILE, CONFIG_FILE)
"""What PEFT reads."""
SUMS_FILE = "SHA256SUMS"
"""In an exported adapter: the sums of all its other files, as ``sha256sum --check`` reads them."""

GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})
"""What the system says of a file that is not there; all else says that it could not look."""
PAUSES = (0.1, 0.4, 1.0)
"""Seconds between the attempts at a file that cannot be read: a network disk may be back in a moment."""


def patiently(read: Callable[[], T], what: str) -> T:
    """The result of ``read``, which is tried again while the system cannot read a file.

    Raises:
        CheckpointError: a file is missing of ``what`` it belongs to, or all of that.
        UnreadableError: a file cannot be read now.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            if error.errno in GONE:
                raise CheckpointError(f"{what} is missing: {error}") from error
            if pause is None:
                raise UnreadableError(
                    f"{what} cannot be read now ({error}). It may be whole, so it stays as it is. Mend its "
                    "disk or its permissions, then resume the run."
                ) from error
            time.sleep(pause)
    raise AssertionError


def describe(folder: Path, names: Sequence[str] = SUMMED) -> dict[str, Any]:
    """What ``state.json`` says of the other files of a checkpoint."""
    return {
        "sha256": {name: sha256_of(folder / name) for name in names},
        "bytes": {name: (folder / name).stat().st_size for name in names},
    }


def read_meta(folder: Path) -> Mapping[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        CheckpointError: it is not there, is no JSON, or lists other files than a checkpoint has.
        UnreadableError: it cannot be read now.
    """
    content = patiently((folder / META_FILE).read_bytes, f"The checkpoint {folder}")
    try:
        meta: Mapping[str, Any] = read_json(content.decode("utf-8"))
        names = set(meta["sha256"])
        known = all(map(is_plain, names)) if meta.get(RECIPE) else names == set(SUMMED)
        if not known or names != set(meta["bytes"]):  # what a stranger chose may lead anywhere
            raise CheckpointError(f"The checkpoint {folder} is damaged: {META_FILE} lists other files.")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The checkpoint {folder} cannot be read: {error}") from error
    return meta


def is_plain(name: str) -> bool:
    """Whether it is the name of a file in a folder, and leads nowhere else."""
    return bool(name) and Path(name).name == name and name not in (".", "..", META_FILE) and "\0" not in name


def check(folder: Path, names: Iterable[str] = ()) -> Mapping[str, Any]:
    """Compare files of a checkpoint, or all of them, with their sums; returns what ``state.json`` holds.

    Raises:
        CheckpointError: one is missing, torn or altered.
        UnreadableError: one cannot be read now.
    """
    meta = read_meta(folder)
    for name in names or meta["sha256"]:
        if patiently(partial(sha256_of, folder / name), f"The checkpoint {folder}") != meta["sha256"][name]:
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name} has changed.")
    return meta


def check_sizes(folder: Path) -> None:
    """Whether all files of a checkpoint are there and as long as they were: the cheap look.

    Raises:
        CheckpointError: one is missing or has another length.
        UnreadableError: the system does not say.
    """
    for name, size in read_meta(folder)["bytes"].items():
        length = patiently((folder / name).stat, f"The checkpoint {folder}").st_size
        if length != size:
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name} has {length} bytes.")


def write_sums(folder: Path) -> dict[str, str]:
    """Write the sums of all files of a folder beside them; returns them by name."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS_FILE)
    known = {name: sha256_of(folder / name) for name in names}
    text = "".join(f"{digits}  {name}\n" for name, digits in known.items())
    (folder / SUMS_FILE).write_text(text, encoding="utf-8")
    return known


def check_sums(folder: Path, needed: Iterable[str] = ADAPTER_FILES) -> None:
    """Compare a folder with the sums that ``write_sums`` wrote.

    Raises:
        CheckpointError: a file is missing or has changed, or there are no sums.
        UnreadableError: one cannot be read now.
    """
    known = read_sums(folder, needed)

    def altered() -> list[str]:
        return [name for name in sorted(known) if sha256_of(folder / name) != known[name]]

    wrong = patiently(altered, f"The adapter in {folder}")
    if wrong:
        raise CheckpointError(f"The adapter in {folder} is damaged: {', '.join(wrong)} changed.")


def read_sums(folder: Path, needed: Iterable[str] = ADAPTER_FILES) -> dict[str, str]:
    """The sums that ``write_sums`` wrote, by name.

    Raises:
        CheckpointError: there are none for a ``needed`` file, or a name leads out of the folder.
        UnreadableError: they cannot be read now.
    """
    known = {}
    content = patiently((folder / SUMS_FILE).read_bytes, f"The adapter in {folder}")
    try:
        lines = content.decode("utf-8").removesuffix("\n").split("\n")
    except ValueError as error:
        raise CheckpointError(f"The adapter in {folder} cannot be read: {error}") from error
    for line in lines:
        digits, _, name = line.partition("  ")
        if Path(name).name != name:
            raise CheckpointError(f"The adapter in {folder} is damaged: {SUMS_FILE} names {name[:80]!r}.")
        known[name] = digits
    if missing := [name for name in needed if name not in known]:
        raise CheckpointError(f"The adapter in {folder} is damaged: {SUMS_FILE} does not list {missing[0]}.")
    return known
