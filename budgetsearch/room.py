"""Room on the disks, looked at before a run writes anything.

The need is an upper bound, for it counts every trial at the largest rank. So a run is refused only where not
even the least fits: four checkpoints, the adapter twice, and the records. On a disk in between fewer trials
that wait keep a checkpoint, and that is told.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from budgetsearch.core.disk import DiskNeed
from budgetsearch.core.errors import ModelError, RunFolderError
from budgetsearch.core.ports import Say
from budgetsearch.gpu.shapes import ModelShape, known_models, shape_of
from budgetsearch.needs import cache_need, largest_adapter, run_need
from budgetsearch.planning.configs import find_config
from budgetsearch.planning.guesses import guess_data
from budgetsearch.settings import Settings
from budgetsearch.shared import folder_of
from budgetsearch.spaces import load_space


def amount(size: int) -> str:
    """Bytes as a person reads them: ``39.35 GiB``, ``12.5 MiB``."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def standing(path: Path) -> Path:
    """The nearest folder that exists: it decides on the disk."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if os.path.exists(p))


def free_bytes(path: Path) -> int:
    """What this user may still write there."""
    found = shutil.disk_usage(standing(path))
    return found.free if found.total else sys.maxsize  # /proc is no disk: making a folder there says so


def check_before(settings: Settings, budget_seconds: float, cache: Path, say: Say) -> None:
    """Look at the disks of the run folder and of the cache, as far as the model is known without fetching it.

    Raises:
        RunFolderError: not even the least that a run needs fits.
    """
    assert settings.out is not None
    shape = known_shape(settings, cache)
    if shape is None:
        say("disk: the need is not known before the model is here; it is looked at then")
        return
    data = guess_data(settings.data, settings.max_rows)
    added = cache_need(settings.model, shape, data.rows, data.rows * data.tokens_per_row)
    weights = largest_adapter(settings, load_space(settings.space), shape)
    need = run_need(settings, weights, budget_seconds, _folder(settings.model))
    extra = sum(size or 0 for size in added.values())
    shared = os.stat(standing(settings.out)).st_dev == os.stat(standing(cache)).st_dev
    if not shared and (free := free_bytes(cache)) < extra:
        raise RunFolderError(
            f"The cache {cache} has {amount(free)} free, but {amount(extra)} are needed "
            f"({', '.join(added)}). Make room, or name another folder with BUDGETSEARCH_CACHE."
        )
    check_disks(settings, settings.out, need, say, extra if shared else 0)


def check_disks(
    settings: Settings, out: Path, need: DiskNeed, say: Say = lambda line: None, extra: int = 0
) -> int | None:
    """Insist on the least that a run needs in its folder ``out`` and where its checkpoints lie.

    Returns how many trials that wait may keep a checkpoint; None: behind a URL nobody knows.

    Raises:
        RunFolderError: it does not fit.
    """
    if not settings.shared:
        return check_run_folder(out, need, say, extra)
    folder = folder_of(settings.shared)
    # Behind a URL the run folder holds copies of the best adapter; with a folder, no checkpoints at all.
    here = replace(need, checkpoint=need.adapter if folder is None else 0, held=0, gang=0)
    check_run_folder(out, here, extra=extra)
    return None if folder is None else check_run_folder(folder, need, say, flag="--shared")


def check_run_folder(
    out: Path, need: DiskNeed, say: Say = lambda line: None, extra: int = 0, flag: str = "--out"
) -> int:
    """Insist on the least that a run needs; returns how many trials that wait may keep a checkpoint.

    ``extra``: bytes that go to the same disk beside the run. ``flag``: what names the folder.

    Raises:
        RunFolderError: it does not fit.
    """
    free = free_bytes(out) - extra
    least, most = amount(need.least), amount(need.most)
    if free < need.least:
        raise RunFolderError(
            f"{flag} {out}: its disk has {amount(max(0, free))} free, but a run needs at least {least} there "
            f"and {most} at most (checkpoints of {amount(need.checkpoint)} at the largest rank, the adapter "
            "twice, and the records). Make room, name a folder on another disk, or use a --space with "
            "smaller ranks."
        )
    held = need.affordable(free)
    if free < need.most:
        say(
            f"disk: {amount(free)} are free for {out}, and {most} could be used at most; so {held} trials "
            "that wait keep a checkpoint, and the others are dropped earlier"
        )
    return held


def known_shape(settings: Settings, cache: Path) -> ModelShape | None:
    """The shape of the model, if it is known without asking anybody; None otherwise."""
    model = settings.model
    here = Path(model).expanduser().exists() or model.startswith("pypi:") or model in known_models()
    if not here:
        return None
    try:
        return shape_of(find_config(model, settings.revision, cache)[0], model)
    except ModelError:
        return None


def _folder(model: str) -> Path | None:
    path = Path(model).expanduser()
    return path if path.is_dir() else None
