"""How a process of the command line ends: in time, with its code, whatever hangs in it."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time

from budgetsearch.outlet import drain_output

DRAIN_SECONDS = 1.0
"""What was printed gets so long to be read."""
EXIT_SECONDS = 3.0
"""Whatever libraries do at the exit, and all else that remains, is over by then."""


def leave_within(seconds: float, code: int) -> None:
    """End this process with ``code`` after so many seconds at the latest."""

    def wait() -> None:
        time.sleep(max(0.0, seconds))
        os._exit(code)

    threading.Thread(target=wait, name="leave", daemon=True).start()


def leave(code: int) -> None:
    """End this process now: what is registered for the exit is done, what was printed is written.

    Taking torch and its like apart would take Python seconds, on a slow machine tens of them, and they would
    be seconds of the budget.
    """
    leave_within(EXIT_SECONDS, code)
    atexit._run_exitfuncs()
    drain_output(DRAIN_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # nobody listens any more
    os._exit(code)
