"""What the long forms share: where they ran, and where their results go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.training.common import device_name, write

FOLDER = Path(__file__).parent / "results"


def record(name: str, work: Callable[[], Mapping[str, Any]]) -> None:
    """Do it, print its summary and write ``results/NAME.json``."""
    start = time.monotonic()
    found = dict(work())
    found = {"machine": device_name("cpu"), "seconds in all": round(time.monotonic() - start, 1), **found}
    path = write(name, found, FOLDER)
    summary = {key: value for key, value in found.items() if key not in ("each", "by kill point")}
    print(json.dumps(summary, indent=1))
    print(path)
