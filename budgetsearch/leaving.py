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


_own: list[int] = []
"""The number of the process that is this command's and ends with it."""


def take_process() -> None:
    """This process belongs to the command line alone."""
    _own.append(os.getpid())


def leave_within(seconds: float, code: int) -> None:
    """End this process with ``code`` after so many seconds at the latest, if it is the command line's."""
    if os.getpid() not in _own:
        return

    def wait() -> None:
        time.sleep(max(0.0, seconds))
        os._exit(code)

    threading.Thread(target=wait, name="leave", daemon=True).start()


def leave(code: int) -> None:
    """End this process now: what is registered for the exit is done, what was printed is written.

    Taking torch and its like apart would take Python seconds, on a slow machine tens of them, and they would
    be seconds of the budget.
    """
    take_process()
    leave_within(EXIT_SECONDS, code)
    atexit._run_exitfuncs()
    drain_output(DRAIN_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # nobody listens any more
    os._exit(code)
