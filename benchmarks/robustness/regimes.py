"""What goes on beside a run: busy processes that come and go, by a rule that looks at the run's ledger."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from budgetsearch.core.errors import BudgetsearchError
from budgetsearch.core.history.history import History
from budgetsearch.storage.ledger import read_history

SPIN = (
    "import ctypes, signal, sys\n"
    "if sys.platform == 'linux':\n"
    "    ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
    "while True:\n"
    "    pass\n"
)
"""A core that is busy for as long as whoever started this lives."""
BURST_SECONDS = 30.0
LOOK_SECONDS = 1.0

Rule = Callable[[History, float], bool]
"""(what the ledger tells so far, seconds since the run began) -> whether something else is busy now."""


def quiet(history: History, seconds: float) -> bool:
    """Never."""
    return False


def busy(history: History, seconds: float) -> bool:
    """Throughout."""
    return True


def begins_late(history: History, seconds: float) -> bool:
    """From the middle of the full run on, by its tokens, until the end."""
    for number in (*history.full_trials, *history.full_done):
        state = history.trials[number]
        beat = history.last_beat
        here = beat.tokens if beat is not None and beat.trial_id == number else 0
        if state.full_stop_tokens and max(here, state.tokens) >= state.full_stop_tokens / 2:
            return True
    return False


def bursts(history: History, seconds: float) -> bool:
    """Half of the time, half a minute at once."""
    return seconds % (2 * BURST_SECONDS) >= BURST_SECONDS


def leaves_early(history: History, seconds: float) -> bool:
    """Until the calibration is over: from then on the machine is as fast again."""
    return history.plan is None


REGIMES: Mapping[str, Rule] = {
    "quiet": quiet,
    "half": quiet,
    "busy": busy,
    "late": begins_late,
    "bursts": bursts,
    "faster": leaves_early,
}
"""``half`` is quiet with half of the hours: what a run beside one busy process is held against."""
HOURS_SHARE: Mapping[str, float] = {"half": 0.5}
"""Of the hours; of the others all."""


@contextmanager
def beside(ledger: Path, rule: Rule) -> Iterator[None]:
    """Follow the rule while this lasts; nothing of it is left behind."""
    over, began = threading.Event(), time.monotonic()
    spinning: list[subprocess.Popen[bytes]] = []

    def stop() -> None:
        while spinning:
            process = spinning.pop()
            process.kill()
            process.wait()

    def follow() -> None:
        while not over.wait(LOOK_SECONDS):
            wanted = rule(_told(ledger), time.monotonic() - began)
            if wanted and not spinning:
                spinning.append(subprocess.Popen([sys.executable, "-c", SPIN]))
            elif not wanted:
                stop()

    thread = threading.Thread(target=follow, name="beside", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        stop()


def _told(ledger: Path) -> History:
    try:
        return read_history(ledger) if ledger.is_file() else History()
    except BudgetsearchError:  # it is being made
        return History()
