"""A lock that another machine may still have is waited for, where nobody is there to try again."""

from __future__ import annotations

import time
from collections.abc import Callable

from budgetsearch.owner import QUIET_SECONDS
from budgetsearch.runfolder import InUse, RunFolder, RunLock

STEP_SECONDS = 5.0
MAX_SECONDS = QUIET_SECONDS + 60.0
"""Whoever still writes then is alive; a network file system may show a last write a minute late."""


def lock_in_time(
    folder: RunFolder, say: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
) -> RunLock:
    """Take the lock of a run whose process was killed on another machine a moment ago, once that is sure.

    Raises:
        RunFolderError: a process of this machine has it, or another machine goes on writing.
    """
    waited = 0.0
    while True:
        try:
            return RunLock(folder)
        except InUse as busy:
            if not busy.wait_seconds or waited >= MAX_SECONDS:
                raise
            if not waited:
                say(
                    f"{folder.path} was written a moment ago, or its lock is still held: waiting up to "
                    f"{MAX_SECONDS:.0f} s to see whether {busy.who} has ended"
                )
            pause = min(busy.wait_seconds, STEP_SECONDS)
            sleep(pause)
            waited += pause
