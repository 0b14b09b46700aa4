"""The Optuna study that dashboards show: a view of the ledger, never read back by the search.

Each configuration is one Optuna trial. Whatever happens, the mirror asks of a trial what the history
says of it now and writes the difference, so that catching up after a crash and following along are
the same thing.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from budgetsearch.core.events import Opened
from budgetsearch.core.history.history import History
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.study.content import Stopped, StudyContent
from budgetsearch.views.study.distributions import quiet
from budgetsearch.views.study.showcase import Showcase
from budgetsearch.views.study.storage import (
    check_url,
    close_storage,
    connectable,
    fresh_file,
    hidden,
    open_storage,
    reason,
    storage_url,
)
from budgetsearch.views.study.storage import shown as shown_url

LOGGER = logging.getLogger("budgetsearch.study")
RETRY_SECONDS = 60.0
"""A storage that failed is left alone for so long at most: each attempt may take seconds."""
FIRST_RETRY_SECONDS = 1.0
"""After the first failure; each further one doubles it."""
MOST_MENDS = 3
"""So often a process makes the study anew; a fault that comes again and again is not the file's."""


class StudyMirror:
    """Brings a persisted Optuna study level with a history.

    A storage that fails is no reason to stop a search: there is one warning, and the mirror catches
    up later. The run's own file is made anew from the ledger, whatever is wrong with it. The mirror writes
    when it is called, which takes as long as the storage takes: in a search a ``Follower`` calls it, from a
    thread of its own.
    """

    def __init__(
        self,
        storage: Any,
        study_name: str,
        own: Path | None = None,
        stopped: Callable[[], bool] = lambda: False,
        showcase: Showcase | None = None,
    ) -> None:
        """Nothing is opened yet.

        ``storage``: a URL, or a storage of Optuna's, which stays open. ``own``: the study's file, if it is
        the run's and nobody else's. ``stopped``: whether to give up between two transactions. ``showcase``:
        what is shown beside the trials.

        Raises:
            SettingsError: the URL is none that Optuna understands.
        """
        self._url, self._shown = "", "in memory"
        self._lent = None if isinstance(storage, str) else storage
        if isinstance(storage, str):
            check_url(storage)
            self._url, self._shown = connectable(storage), shown_url(storage)
        self._name, self._own = study_name, own
        self._showcase = showcase or Showcase(None)
        self.stopped = stopped
        self.level = False
        """Whether the study has all of the last history that it was given."""
        self._storage: Any = None
        self._content: StudyContent | None = None
        self._file: tuple[int, int] | None = None
        self._mends = self._failures = 0
        self._warned = False
        self._longest_pause = RETRY_SECONDS
        self._retry_at = 0.0

    def catch_up(self, history: History) -> None:
        """Bring the study level with all of the history; does nothing where it is level already, or where
        the storage failed a moment ago."""
        if self.pause > 0:
            return
        try:
            with quiet():
                self._attempt(history)
        except Stopped:
            self.close()
        except Exception as error:
            # Any database, driver or network can stand behind the URL, so any error can come.
            self.close()
            self._postpone(error)

    @property
    def pause(self) -> float:
        """Seconds until the storage is tried again; 0: now."""
        return max(0.0, self._retry_at - time.monotonic())

    def hurry(self, longest_pause: float) -> None:
        """Try again now, and then often: little time is left."""
        self._retry_at, self._longest_pause = 0.0, longest_pause

    def close(self) -> None:
        """Close every connection; ``catch_up`` opens them again and looks anew at what is there."""
        self.level = False
        storage, self._storage, self._content = self._storage, None, None
        if storage is not None and self._lent is None:
            close_storage(storage)

    def _attempt(self, history: History) -> None:
        try:
            self._write(history)
        except Stopped:
            raise
        except Exception as error:
            self.close()
            if self._own is None or self._mends == MOST_MENDS:
                raise
            self._make_again(history)
            self._mends += 1
            LOGGER.warning("The Optuna study %s is made again from the ledger: %s.", self._own, reason(error))
            self._write(history)
        if self._warned:
            LOGGER.warning("The Optuna study %s is level with the ledger again.", self._shown)
        self.level, self._warned, self._failures = True, False, 0

    def _write(self, history: History) -> None:
        if self._own is not None and self._file != _identity(self._own):
            self.close()  # the file was deleted, or another one put in its place
        if self._own is not None and not _identity(self._own):
            self._make_again(history)
        if self._content is None:
            self._file = _identity(self._own) if self._own else None
            self._storage = open_storage(self._url) if self._lent is None else self._lent
            self._content = StudyContent(self._storage, self._name, history)
            self._showcase.forget()
        self._content.follow(history, self.stopped)
        self._showcase.show(self._content.study, self._content.numbers, history)

    def _make_again(self, history: History) -> None:
        """Put a new file in the place of the run's own."""
        assert self._own is not None
        with fresh_file(self._own) as storage:
            StudyContent(storage, self._name, history).follow(history, self.stopped)

    def _postpone(self, error: Exception) -> None:
        pause = FIRST_RETRY_SECONDS * 2.0 ** min(self._failures, 10)
        self._failures += 1
        self._retry_at = time.monotonic() + min(pause, self._longest_pause, RETRY_SECONDS)
        if not self._warned:
            why = hidden(reason(error), self._url)
            LOGGER.warning(
                "Optuna study %s: %s. The search goes on without it; the study is brought level when that "
                "works again.",
                self._shown,
                why,
            )
        self._warned = True


def _identity(file: Path) -> tuple[int, int] | None:
    """Tell a file from another one in its place; None where there is none, or an empty one."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if found.st_size else None


def mirror_of(storage: str | None, folder: RunFolder, opened: Opened) -> StudyMirror:
    """The mirror of a run. ``storage``: a URL with its password; None: the file in the run's folder."""
    own = None if storage else folder.study
    showcase = Showcase(folder.path.absolute())
    return StudyMirror(storage_url(storage, folder), str(opened.facts["study"]), own, showcase=showcase)
