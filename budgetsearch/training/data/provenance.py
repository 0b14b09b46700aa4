"""What a run was fed with, as names and hashes: so that a changed byte can be named later."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.storage.files import sha256_of
from budgetsearch.training.data.gym import GYM
from budgetsearch.training.data.models import ORIGIN, BaseModel, stated_licence
from budgetsearch.training.data.origins import locate, origins_of
from budgetsearch.training.data.tokens import PreparedData


def input_facts(base: BaseModel, prepared: PreparedData, sources: Mapping[str, str | None]) -> dict[str, Any]:
    """Files of the base and the data, rows in their order, and the machine; ``sources`` by their role.

    Raises:
        DataError: a source has gone.
    """
    return {
        "base": {
            "files": [
                {"name": name, "bytes": (base.path / name).stat().st_size, "sha256": sha256}
                for name, sha256 in sorted(base.files.items())
            ],
            "origin": _origin(base.path),
        },
        "sources": [
            {"role": role, "source": origin.source, "file": source_facts(origin.source)}
            for role, data in sources.items()
            for origin in origins_of(data or "")
        ],
        "rows": {
            "train_sha256": prepared.train.sha256(),
            "valid_sha256": prepared.valid.sha256(),
        },
        "machine": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "driver": driver_version(),
        },
    }


def source_facts(source: str) -> dict[str, Any] | None:
    """Name, size and hash of the file or folder behind a data source; None if its rows are generated."""
    found = locate(source)
    files = [{**file_facts(file), "name": name} for name, file in found.names().items()]
    if len(files) < 2:
        return files[0] if files else None
    sha256 = hashlib.sha256("".join(f"{one['name']} {one['sha256']}\n" for one in files).encode())
    size = sum(one["bytes"] for one in files)
    return {"name": Path(source).name, "bytes": size, "sha256": sha256.hexdigest()}


def licences(*data: str | None) -> dict[str, str | None]:
    """The licence of each source as far as its own card says; a local one by the last part of its path."""
    found: dict[str, str | None] = {}
    for origin in (one for some in data for one in origins_of(some or "")):
        path = Path(origin.source)
        name = path.name if path.is_absolute() else origin.source
        if origin.source.startswith(GYM):
            about = importlib.metadata.metadata("reasoning-gym").json
            found[name] = str(about.get("license_expression") or about.get("license") or "") or None
        else:
            found[name] = stated_licence(path if path.is_dir() else locate(origin.source).folder)
    return found


def file_facts(path: Path) -> dict[str, Any]:
    """Name, size and hash of a file as it is now, whatever a cache remembers of it."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def driver_version() -> str | None:
    """Of the NVIDIA driver, where there is one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = str(pynvml.nvmlSystemGetDriverVersion())
        pynvml.nvmlShutdown()
    except Exception:  # NVML's own exceptions have no name before its package is imported
        return None
    return version


def _origin(path: Path) -> dict[str, Any] | None:
    """What a converted model was made of."""
    note = path / ORIGIN
    return read_json(note.read_text(encoding="utf-8")) if note.exists() else None
