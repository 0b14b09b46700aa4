"""What belongs to a run: folders that carry its sign, and checkpoints whose names are of the tool's own form.

Nothing else is ever removed, whatever lies in a run folder or a link in it leads to.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Container
from pathlib import Path

from budgetsearch.core.errors import CheckpointError, RunFolderError
from budgetsearch.storage.files import UNFINISHED, remove_empty, replace_file

SIGN = "budgetsearch.json"
"""In the folder or behind the URL of a run's checkpoints: whoever does not find it looks at another place."""
FORMAT = 1
CHECKPOINT = re.compile(r"trial(?P<trial>\d{4,9})-rung\d{1,4}-tokens\d{1,18}-attempt\d{1,9}")
TORN = re.compile(rf"\.{CHECKPOINT.pattern}{re.escape(UNFINISHED)}[a-z0-9_]{{8}}")
"""What a process leaves that is killed while it writes a checkpoint."""
PROBE_TRIAL = 9000
"""From this number on: the checkpoints that a calibration writes to measure how long that takes."""


def sign_of(owner: str) -> bytes:
    """What the sign of a run says."""
    return json.dumps({"format": FORMAT, "place": owner}).encode()


def carries_sign(folder: Path, owner: str) -> bool:
    """Whether the folder is this run's; a link to a folder that is counts as the folder."""
    try:
        return bool(owner) and (folder / SIGN).read_bytes() == sign_of(owner)
    except OSError:
        return False


def claim(folder: Path, owner: str) -> None:
    """Make the folder this run's, unless it is already.

    Raises:
        RunFolderError: it is a link to a folder of somebody else's, or holds something else.
        OSError: it cannot be made or signed.
    """
    if not folder.is_symlink():
        folder.mkdir(exist_ok=True)
    if carries_sign(folder, owner):
        return
    if folder.is_symlink() or not is_unused(folder):
        raise RunFolderError(
            f"{folder} does not carry this run's sign ({SIGN}), so nothing is written or removed there. "
            "Bring the run's own folder back. To keep checkpoints elsewhere, start with --shared FOLDER."
        )
    replace_file(folder / SIGN, sign_of(owner))


def is_unused(folder: Path) -> bool:
    """Whether there is nothing in it but what a run has that never began."""
    return {path.name for path in folder.iterdir()} <= {SIGN, f".{SIGN}.new"}


def trial_of(name: str, pattern: re.Pattern[str] = CHECKPOINT) -> int | None:
    """The trial that a checkpoint of this name is of; None: no checkpoint has such a name."""
    found = pattern.fullmatch(name)
    return int(found["trial"]) if found else None


def is_known(name: str, trials: Container[int], pattern: re.Pattern[str] = CHECKPOINT) -> bool:
    """Whether it is the name of a checkpoint of one of these trials, or of a calibration."""
    trial = trial_of(name, pattern)
    return trial is not None and (trial in trials or trial >= PROBE_TRIAL)


def checkpoint_in(folder: Path, name: str | None) -> Path:
    """The folder of a checkpoint that a ledger names.

    Raises:
        CheckpointError: it is no checkpoint's name; it might lead anywhere.
    """
    if trial_of(str(name)) is None:
        raise CheckpointError(f"{str(name)[:100]!r} is not the name of a checkpoint.")
    return folder / str(name)


def remove_checkpoints(folder: Path, owner: str, useless: Callable[[str], bool]) -> None:
    """Remove those of its checkpoints, and of what is left of torn ones; whatever is in the way stays."""
    if not carries_sign(folder, owner):
        return
    for path in folder.iterdir():
        if useless(path.name):
            shutil.rmtree(path, ignore_errors=True)  # which leaves a link alone


def give_back(folder: Path) -> None:
    """Remove what a run that never began has written into a folder that it made, or found unused."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if trial_of(path.name) is not None or trial_of(path.name, TORN) is not None:
            shutil.rmtree(path, ignore_errors=True)
    (folder / SIGN).unlink(missing_ok=True)
    remove_empty(folder)
