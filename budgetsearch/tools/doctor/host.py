"""The lines about Python, packages, disks and shared memory."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from budgetsearch.core.errors import DiskError
from budgetsearch.machine.host import GIB, gib
from budgetsearch.run.preflight import standing
from budgetsearch.storage.checkpoint_store import ONCE
from budgetsearch.storage.ownership import SIGN
from budgetsearch.storage.shared import check_shared, folder_of, open_store
from budgetsearch.tools.doctor.check import Check, describe, divided, fail, ok, warn

PACKAGE = "budgetsearch"
UNKNOWN_NEED = 10 * GIB
"""Free space that is enough for most runs, where the need is not known."""
FOLDERS = "--out (the run), BUDGETSEARCH_CACHE or HF_HOME (models)"
SHARED = Path("/dev/shm")
SHARED_NEED = 64 * 2**20
"""What Docker gives a container unless told otherwise."""


def python() -> Check:
    """Whether this Python is new enough."""
    from packaging.specifiers import SpecifierSet

    wanted, here = importlib.metadata.metadata(PACKAGE)["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(here, prereleases=True):
        return ok("python", f"{here} ({wanted} is needed)")
    return fail("python", f"{here}, but {wanted} is needed", f"Make a new environment with Python {wanted}.")


def packages() -> Check:
    """Whether everything that the package depends on is installed, and new enough."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or ()]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = {}
    for requirement in wanted:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong[requirement] = f"{requirement.name} is missing"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong[requirement] = f"{requirement.name} is {version}, but {requirement.specifier} is needed"
    if not wrong:
        version = importlib.metadata.version(PACKAGE)
        return ok("packages", f"all {len(wanted)} that {PACKAGE} {version} needs")
    command = shlex.join(["pip", "install", *(f"{r.name}{r.specifier}" for r in wrong)])
    return fail("packages", "; ".join(wrong.values()), command)


@dataclass(frozen=True)
class Place:
    """A folder that a run writes to."""

    what: str
    path: Path
    need: int | None
    """Bytes that a run writes there, more or less; None: unknown."""
    least: int = 0
    """Bytes without which no run gets anywhere."""


def disks(places: Sequence[Place]) -> list[Check]:
    """A line for each disk: whether the folders can be written, and whether there is room for all."""
    by_disk: dict[int, list[Place]] = {}
    for place in places:
        by_disk.setdefault(standing(place.path).stat().st_dev, []).append(place)
    return [_disk(shared) for shared in by_disk.values()]


def _disk(places: Sequence[Place]) -> Check:
    for place in places:
        folder = standing(place.path)
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            cannot = f"{folder} cannot be written to, for {place.what}: {describe(error)}"
            return fail("disk", cannot, f"Name another folder with {FOLDERS}.")
    free = shutil.disk_usage(standing(places[0].path)).free
    known = [place.need for place in places if place.need is not None]
    need = sum(known) if len(known) == len(places) else max(UNKNOWN_NEED, sum(known))
    text = f"{gib(free)} free, about {gib(need)} needed: {', '.join(map(_share, places))}"
    if free >= need:
        return ok("disk", text)
    room = f"Make room, or name folders on a larger disk with {FOLDERS}."
    return (fail if free <= sum(place.least for place in places) else warn)("disk", text, room)


def _share(place: Place) -> str:
    size = "of unknown size " if place.need is None else f"{gib(place.need)} " if place.need else ""
    return f"{place.what} {size}in {place.path}"


def shared_place(shared: str) -> Check:
    """Whether the place of checkpoints that machines share can be asked; nothing is written there."""
    check_shared(shared)
    if (folder := folder_of(shared)) is not None:
        if folder.is_dir():
            return ok("checkpoints", f"in {folder}; whether other machines mount it, only they can say")
        return fail(
            "checkpoints", f"there is no folder {folder}", "Mount it, or let --shared name another one."
        )
    try:
        open_store(shared, ONCE).has(SIGN)
    except DiskError as error:
        return fail("checkpoints", *divided(str(error)))
    return ok("checkpoints", f"{shared} answers this machine; whether it answers others, only they can say")


def shared_memory(path: Path = SHARED) -> Check:
    """Whether processes can share memory; a run on one card hardly does."""
    if not path.is_dir():
        missing = f"there is no {path}, which the processes of `budgetsearch simulate` need"
        return warn("shared memory", missing, f"mount -t tmpfs tmpfs {path}")
    size = shutil.disk_usage(path)
    text = f"{gib(size.free)} of {gib(size.total)} free in {path}"
    if size.free >= SHARED_NEED:
        return ok("shared memory", text)
    small = f"{text}; a run on one card hardly uses it, but more cards (NCCL) and data loaders do"
    return warn("shared memory", small, "Start a container with --shm-size=1g.")
