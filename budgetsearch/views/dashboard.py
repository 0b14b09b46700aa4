"""``budgetsearch dashboard``: studies of several runs in one view, made from their ledgers and followed.

The ledger is the truth, wherever a run keeps its study. So the view makes its own studies in memory and
reads nothing but ledgers: a study that was cut short is whole here, runs with different storages stand side
by side, a going run is not slowed down by locks, and what somebody deletes in the browser is gone from the
view only.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from budgetsearch.core.errors import LedgerError, UsageError
from budgetsearch.core.history.fold import apply
from budgetsearch.core.history.history import History
from budgetsearch.storage.ledger import read_entries
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.study.artifacts import MemoryLinks
from budgetsearch.views.study.distributions import quiet
from budgetsearch.views.study.mirror import StudyMirror
from budgetsearch.views.study.showcase import Showcase

LOGGER = logging.getLogger("budgetsearch.views.dashboard")
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
            apply(self._history, entry)
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
    from waitress.server import create_server

    view = View(folders)
    with bind(port) as listening, view.followed():
        number = listening.getsockname()[1]
        application = guarded(wsgi(view.storage, artifact_store=view.links))
        server = create_server(
            application, sockets=[listening], threads=THREADS, channel_timeout=IDLE_SECONDS
        )
        other = f"  (port {DEFAULT_PORT} is in use)" if port is None and number != DEFAULT_PORT else ""
        say(f"http://{HOST}:{number}  (Ctrl-C ends it){other}")
        server.run()  # returns when it is interrupted


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """A name for each run: its folder's, and as much of the path as tells two of one name apart."""
    paths = [os.path.abspath(folder.path) for folder in folders]
    last = Counter(os.path.basename(path) for path in paths)
    return [os.path.basename(path) if last[os.path.basename(path)] == 1 else path for path in paths]


HOST = "127.0.0.1"
NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
"""What this machine is called from itself, with any port: a tunnel may end at another one."""
DEFAULT_PORT = 8080
THREADS = 8
"""So many requests are answered at once; connections that ask nothing take none."""
IDLE_SECONDS = 60
"""A connection that asks nothing is closed after so long."""
TRIED_PORTS = 20
"""From the default on, where nobody asked for one."""
REFUSAL = b"Refused: this server answers under localhost, 127.0.0.1 and [::1] only.\n"
Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


def is_ours(authority: str) -> bool:
    """Tell whether a host, with a port or without, is this machine by one of its own names."""
    try:
        parts = urlsplit(f"//{authority}")
        parts.port  # noqa: B018 - reading it checks it
    except ValueError:
        return False
    return parts.hostname in NAMES and parts.username is None and parts.netloc == authority


def guarded(application: Application) -> Application:
    """The same application, for requests that name this machine and come from no foreign page."""

    def answer(environment: dict[str, Any], start: Any) -> Iterable[bytes]:
        origin = environment.get("HTTP_ORIGIN")
        foreign = origin is not None and not is_ours(urlsplit(origin).netloc)
        if foreign or not is_ours(environment.get("HTTP_HOST", "")):
            start("403 Forbidden", [("Content-Type", "text/plain"), ("Content-Length", str(len(REFUSAL)))])
            return [REFUSAL]
        return application(environment, start)

    return answer


def bind(port: int | None) -> socket.socket:
    """Take a port on loopback.

    ``port``: without one the first that is free from 8080 on.

    Raises:
        UsageError: the port, or none of those, can be used.
    """
    ports = [port] if port is not None else list(range(DEFAULT_PORT, DEFAULT_PORT + TRIED_PORTS))
    for number in ports:
        try:
            return socket.create_server((HOST, number))
        except OSError as error:
            trouble = error
    which = f"None of the ports {ports[0]} to {ports[-1]} can" if port is None else f"Port {port} cannot"
    advice = "" if port is None else ", or leave it out: then the next free one is taken"
    raise UsageError(
        f"{which} be used ({trouble.strerror or trouble}). Name another one with --port{advice}."
    )
