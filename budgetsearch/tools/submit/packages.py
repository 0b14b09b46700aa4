"""What a fresh environment installs: the exact versions that are installed here, and this package itself."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from budgetsearch.core.errors import UsageError
from budgetsearch.run.spaces import spaces_folder

OWN = "budgetsearch"
TORCH_INDEX = "https://download.pytorch.org/whl/"
"""Of torch built for a kind of machine, as the label behind its version says: ``+cpu``, ``+cu128``."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every file in the wheel, so that the same code makes the same bytes."""
SKIPPED = ("__pycache__", ".pyc")


def pinned(extras: Sequence[str]) -> dict[str, str]:
    """The installed versions of all that this package needs with these extras, by name.

    Raises:
        UsageError: one of them is not installed.
    """
    known = importlib.metadata.metadata(OWN).get_all("Provides-Extra") or ()
    if unknown := [extra for extra in extras if extra not in known]:
        raise UsageError(
            f"This budgetsearch was installed before it had the extra {unknown[0]}, so what belongs to it "
            f"cannot be told. Install it again: pip install 'budgetsearch[{','.join(extras)}]'."
        )
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    wanted = [(OWN, extra) for extra in ("", *extras)]
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise UsageError(
                f"{name} is not installed, so its version cannot be pinned: "
                f"pip install 'budgetsearch[{','.join(extras)}]'."
            ) from None
        found[name] = distribution.version
        wanted += _needed(distribution, extra)
    del found[OWN]
    return dict(sorted(found.items()))


def _needed(distribution: importlib.metadata.Distribution, extra: str) -> Iterator[tuple[str, str]]:
    """(name, extra) of what a distribution needs on this machine under one of its extras, or under none."""
    for line in distribution.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            for one in ("", *requirement.extras):
                yield canonicalize_name(requirement.name), one


def torch_index(versions: dict[str, str]) -> str | None:
    """Where pip finds this torch if PyPI does not have it."""
    label = versions.get("torch", "").partition("+")[2]
    return f"{TORCH_INDEX}{label}" if label else None


def write_wheel(folder: Path) -> str:
    """This package as it runs here, as a wheel; returns the file's name.

    A checkout may hold code that no release has, so nothing else would be what made the run.
    """
    distribution = importlib.metadata.distribution(OWN)
    stem = f"{OWN}-{distribution.version}"
    files = {name: path.read_bytes() for name, path in _own_files()}
    for name in ("METADATA", "entry_points.txt"):
        files[f"{stem}.dist-info/{name}"] = (distribution.read_text(name) or "").encode()
    tag = "Wheel-Version: 1.0\nGenerator: budgetsearch\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{stem}.dist-info/WHEEL"] = tag.encode()
    record = f"{stem}.dist-info/RECORD"
    lines = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in files.items()]
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    target = folder / f"{stem}-py3-none-any.whl"
    target.write_bytes(_zipped(files))
    return target.name


def _own_files() -> Iterator[tuple[str, Path]]:
    """(name in the wheel, file) of the package; search spaces lie beside it in a checkout."""
    package = Path(__file__).parents[2]
    for root, home in ((package, OWN), (spaces_folder(), f"{OWN}/search_spaces")):
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and not any(part in name for part in SKIPPED):
                yield f"{home}/{name}", path


def _zipped(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), content, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def _digest(content: bytes) -> str:
    """As RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def changed(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """Packages whose versions are others than those of training, one line each."""
    known: dict[str, str] = {canonicalize_name(name): version for name, version in then.items()}
    return [
        f"{name} {known[name]} in training, {version} here"
        for name, version in now.items()
        if name in known and _public(known[name]) != _public(version)
    ]


def _public(version: str) -> str:
    return re.sub(r"\+.*", "", version)
