"""The memory of this machine, or of the container that holds this process; its processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 2**30
MIB = 2**20
CGROUP = Path("/sys/fs/cgroup")
HIERARCHIES = (
    # Version 2, then version 1: limit, use, and what of the use is only cached files.
    ("memory.max", "memory.current", "memory.stat", ("active_file", "inactive_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_active_file", "total_inactive_file"),
    ),
)


@dataclass(frozen=True)
class HostMemory:
    """Memory of the machine in bytes, where a container has a limit of the container."""

    total_bytes: int
    available_bytes: int
    """What can be had without swapping; cached files count, because they give way."""


def host_memory(cgroup: Path = CGROUP) -> HostMemory:
    """How much memory there is and how much is left; ``cgroup`` is where the kernel shows limits."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for limit_name, use_name, stat_name, cached in HIERARCHIES:
        try:
            limit = int((cgroup / limit_name).read_text())
            used = int((cgroup / use_name).read_text())
            lines = (cgroup / stat_name).read_text().splitlines()
        except (OSError, ValueError):  # no such hierarchy, or "max"
            continue
        stat = dict(line.split(maxsplit=1) for line in lines)
        left = limit - used + sum(int(stat.get(name, 0)) for name in cached)
        return HostMemory(min(total, limit), max(0, min(available, limit, left)))
    return HostMemory(total, available)


def gib(size: int) -> str:
    """Bytes as a person reads them: ``39.35 GiB``."""
    return f"{size / GIB:.2f} GiB"


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as Linux knows it."""
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else "unknown"
