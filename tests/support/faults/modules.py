"""Campaigns in a process of their own: they fork, and a test runner has threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def run_module(name: str, *arguments: str) -> dict[str, Any]:
    """What ``python -m tests.support.faults.NAME`` prints: a process of its own, because it forks."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.support.faults.{name}", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found
