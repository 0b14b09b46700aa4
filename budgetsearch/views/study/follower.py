"""A thread of its own for the study: whatever a database does, the search does not wait for it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable

from budgetsearch.core.events import Charged, Decided, Entry, Heartbeat
from budgetsearch.core.history.fold import apply
from budgetsearch.core.history.history import History
from budgetsearch.views.study.mirror import StudyMirror

LOGGER = logging.getLogger("budgetsearch.study")
CLOSING_PAUSE = 0.25
"""Between attempts in the last seconds."""
SILENT = (Heartbeat, Charged, Decided)
"""Events that change nothing in the study."""
INCOMPLETE = "The Optuna study has not taken the last events in time; the ledger has them."


class Follower:
    """Tells a mirror of what has happened, from a thread of its own; implements the port ``Watcher``.

    The driver's history changes while the thread reads. So the follower keeps one for itself: it replays what
    the ledger held before, and applies each entry that it is handed. An entry never changes. Signs of life
    are left out, and however many entries wait, they are written at one go: what waits during an outage is
    no more than what the driver's history holds anyway.
    """

    def __init__(self, mirror: StudyMirror, past: Iterable[Entry] = ()) -> None:
        """Start the thread. ``past``: what the ledger holds, read in the thread; entries that are handed over
        as well count once."""
        self._mirror, self._past = mirror, past
        self._history = History()
        self.seq = 0
        """The number of the last entry that was taken in."""
        self._behind = False
        self._news = threading.Condition()
        self._handed: list[Entry] = []
        self._until = math.inf
        """When the thread gives up, by the monotonic clock; infinite until the end has come."""
        self._ended = False
        mirror.stopped = self._is_late
        self._thread = threading.Thread(target=self._work, name="study", daemon=True)
        self._thread.start()

    def see(self, entry: Entry, history: History) -> None:
        """Hand an entry over."""
        if isinstance(entry.event, Heartbeat):
            return
        with self._news:
            self._handed.append(entry)
            self._news.notify_all()

    def close(self, seconds: float | None = None) -> bool:
        """No more entries will come: wait for the study, so long at most, and say if it lacks any then;
        returns whether it is known to have all.

        None: what is written now is not waited for. Safe to call twice.
        """
        with self._news:
            self._until = min(self._until, time.monotonic() + (seconds or 0.0))
            self._news.notify_all()
            if seconds is None:
                return False
            self._news.wait_for(lambda: self._ended, seconds)
            complete = self._ended and not self._behind
        if not complete:
            LOGGER.warning(INCOMPLETE)
        return complete

    # ---------------------------------------------------------------------- the thread

    def _work(self) -> None:
        try:
            for entry in self._past:
                self._apply(entry)
            while self._await_news():
                if self._behind:
                    self._mirror.catch_up(self._history)
                    self._behind = not self._mirror.level
        except Exception:
            LOGGER.exception("The Optuna study is not followed any more; the search goes on without it")
            self._behind = True
        finally:
            self._mirror.close()
            with self._news:
                self._ended = True
                self._news.notify_all()

    def _await_news(self) -> bool:
        """Wait until something can be written, and take in what was handed over; False: it is over."""
        with self._news:
            while not self._handed:
                if self._is_closing() and (not self._behind or self._is_late()):
                    return False
                if self._behind and not self._mirror.pause:
                    break
                self._news.wait(self._wait_seconds())
            handed, self._handed = self._handed, []
        for entry in handed:
            self._apply(entry)
        if self._is_closing():
            self._mirror.hurry(CLOSING_PAUSE)
        return True

    def _apply(self, entry: Entry) -> None:
        if entry.seq <= self.seq:
            return
        apply(self._history, entry)
        self.seq = entry.seq
        # Before the plan there is no study: a run that is refused leaves none.
        planned = self._history.plan is not None
        self._behind = self._behind or (planned and not isinstance(entry.event, SILENT))

    def _wait_seconds(self) -> float | None:
        """Until the storage is tried again, or the time is over; None: until there is news."""
        pause = self._mirror.pause if self._behind else math.inf
        wait = min(pause, self._until - time.monotonic())
        return max(0.0, wait) if math.isfinite(wait) else None

    def _is_closing(self) -> bool:
        return math.isfinite(self._until)

    def _is_late(self) -> bool:
        return time.monotonic() > self._until
