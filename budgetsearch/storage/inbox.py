"""What a person asks of a run that goes: small files in its folder, which its driver reads and removes.

They hold names and numbers; whoever may write into the run's folder may ask. One that is none is removed, and
said.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from budgetsearch.core.codec import decode, encode, read_json
from budgetsearch.core.wishes import Wish
from budgetsearch.storage.files import replace_text

FOLDER = "inbox"
MOST_BYTES = 65_536
"""No wish is as long."""
MOST_WISHES = 100
"""So many are read at once."""


def post(run: Path, wish: Wish) -> None:
    """Ask something of the run in a folder; its driver hears of it within a second.

    Raises:
        OSError: it cannot be written.
    """
    import json

    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    replace_text(folder / f"{time.time_ns():020}-{os.getpid()}.json", json.dumps(encode(wish)))


def read(run: Path) -> Iterator[tuple[Path, Wish | str]]:
    """Each wish, oldest first, or what is wrong with it; remove the file once it is dealt with."""
    folder = run / FOLDER
    try:
        if folder.is_symlink():
            return
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
    except OSError:
        return
    for name in names[:MOST_WISHES]:
        yield folder / name, _wish(folder / name)


def _wish(path: Path) -> Wish | str:
    try:
        if path.is_symlink() or path.stat().st_size > MOST_BYTES:
            raise ValueError("it is no file of a wish")
        found = decode(Wish, read_json(path.read_bytes()))
        kinds = isinstance(found.guess, str) and (found.trial_id is None or type(found.trial_id) is int)
        if not kinds or found.action not in ("try", "drop", "promote"):
            raise ValueError("it asks for nothing that there is")
    except (OSError, ValueError) as error:
        return f"{path.name} in the inbox was left out: {error}"
    return found  # type: ignore[no-any-return]
