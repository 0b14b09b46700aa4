"""What becomes of other processes."""

from __future__ import annotations

import time

import psutil

GONE_SECONDS = 20.0
"""A process that was killed takes a moment to go, on a busy machine some."""


def check_gone(pid: int, why: str) -> None:
    """It has ended, or does so at once; nobody need have asked for its exit code."""
    deadline = time.monotonic() + GONE_SECONDS
    while True:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        assert time.monotonic() < deadline, why
        time.sleep(0.05)
