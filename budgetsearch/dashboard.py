"""``budgetsearch dashboard``: studies of several runs in one view, made from their ledgers and followed.

The ledger is the truth, wherever a run keeps its study. So the view makes its own studies in memory and
reads nothing but ledgers: a study that was cut short is whole here, runs with different storages stand side
by side, a going run is not slowed down by locks, and what somebody deletes in the browser is gone from the
view only.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from budgetsearch.core.errors import LedgerError
from budgetsearch.core.history import History
from budgetsearch.ledger import read_entries
from budgetsearch.loopback import DEFAULT_PORT, HOST, bind
from budgetsearch.runfolder import RunFolder
from budgetsearch.study.artifacts import MemoryLinks
from budgetsearch.study.distributions import quiet
from budgetsearch.study.mirror import StudyMirror
from budgetsearch.study.showcase import Showcase

LOGGER = logging.getLogger("budgetsearch.dashboard")
EVERY_SECONDS = 2.0
"""Ledgers are read again so often."""


class _Followed:
    """One run and its study in the view."""

    def __init__(self, folder: RunFolder, name: str, storage: Any, links: MemoryLinks) -> None:
        self.folder = folder
        self._history = History()
        self._seq = 0
        self._mirror = StudyMirror(
            storage, name, showcase=Showcase(folder.path.absolute(), links, every_seconds=0.0)
        )

    def refresh(self) -> None:
        """Take what the ledger has gained.

        Raises:
            LedgerError: it cannot be read, or is damaged.
        """
        before = self._seq
        for entry in read_entries(self.folder.ledger, after=before):
            self._history.apply(entry)
            self._seq = entry.seq
        if self._seq > before:
            self._mirror.catch_up(self._history)


class View:
    """The studies of several runs in one storage in memory."""

    def __init__(self, folders: Sequence[RunFolder]) -> None:
        """Read every ledger.

        Raises:
            LedgerError: one cannot be read.
        """
        import optuna

        with quiet():
            self.storage = optuna.storages.InMemoryStorage()
        self.links = MemoryLinks()
        names = _names(folders)
        self._runs = [
            _Followed(folder, name, self.storage, self.links)
            for folder, name in zip(folders, names, strict=True)
        ]
        self._warned: set[str] = set()
        for run in self._runs:
            run.refresh()

    def refresh(self) -> None:
        """Take what the ledgers have gained; a run that cannot be read any more stays as it was."""
        for run in self._runs:
            try:
                run.refresh()
            except LedgerError as error:
                if str(error) not in self._warned:
                    LOGGER.warning("%s is shown as it was: %s", run.folder.path, error)
                self._warned.add(str(error))

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Refresh every two seconds in the meantime."""
        over = threading.Event()

        def follow() -> None:
            while not over.wait(EVERY_SECONDS):
                self.refresh()

        thread = threading.Thread(target=follow, name="dashboard", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(EVERY_SECONDS)


def serve(
    folders: Sequence[RunFolder], port: int | None, say: Callable[[str], None] = lambda line: None
) -> None:
    """Serve the runs on loopback until the process is interrupted.

    ``port``: without one the first that is free from 8080 on. ``say`` hears the address, once the ledgers
    have been read and the port is taken.

    Raises:
        UsageError: the port cannot be used.
        LedgerError: a ledger cannot be read.
    """
    from optuna_dashboard import wsgi

    view = View(folders)
    with bind(wsgi(view.storage, artifact_store=view.links), port) as server, view.followed():
        moved = port is None and server.server_port != DEFAULT_PORT
        other = f"  (port {DEFAULT_PORT} is in use)" if moved else ""
        say(f"http://{HOST}:{server.server_port}  (Ctrl-C ends it){other}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """A name for each run: its folder's, and as much of the path as tells two of one name apart."""
    paths = [os.path.abspath(folder.path) for folder in folders]
    last = Counter(os.path.basename(path) for path in paths)
    return [os.path.basename(path) if last[os.path.basename(path)] == 1 else path for path in paths]
