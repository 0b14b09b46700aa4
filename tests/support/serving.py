"""A server in a thread, on a port of its own, and clients that know nothing of it but HTTP."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetsearch.tools.serve.command import Serving, serve

START_SECONDS = 60.0


@dataclass
class Running:
    """A server that answers."""

    server: Any
    thread: threading.Thread
    port: int

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        """(status, JSON)."""
        return ask(f"{self.url}{path}", json.dumps(body).encode())

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        """(status, JSON or text)."""
        return ask(f"{self.url}{path}", None, **headers)


def ask(url: str, data: bytes | None, **headers: str) -> tuple[int, Any]:
    """(status, JSON or text) of one request."""
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, content = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    text = content.decode("utf-8")
    return status, json.loads(text) if text.startswith("{") else text


@contextmanager
def running(path: Path, **how: Any) -> Iterator[Running]:
    """Serve what lies there; afterwards it has drained and ended."""
    started: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            serve(path, Serving(port=0, gpu="cpu", **how), lambda line: None, started.append)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="server")
    thread.start()
    deadline = time.monotonic() + START_SECONDS
    while not (started and started[0].started):
        assert not failed, failed
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.02)
    port = started[0].servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(started[0], thread, port)
    finally:
        started[0].should_exit = True
        thread.join(START_SECONDS)
        assert not thread.is_alive()
