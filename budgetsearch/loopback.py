"""A web server for the user of this machine alone: it binds to loopback and knows its own names.

A page anywhere on the net can let its own name point to 127.0.0.1 (DNS rebinding) and then read what a local
server says, for to the browser it is the page's own origin. The browser still sends that name in the Host
header, so a request under any name but this machine's is refused. What a foreign page sends here under the
right name is told by its Origin header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from budgetsearch.core.errors import UsageError

HOST = "127.0.0.1"
NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
"""What this machine is called from itself, with any port: a tunnel may end at another one."""
DEFAULT_PORT = 8080
TRIED_PORTS = 20
"""From the default on, where nobody asked for one."""
REFUSAL = b"Refused: this server answers under localhost, 127.0.0.1 and [::1] only.\n"
Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


def is_ours(authority: str) -> bool:
    """Whether a host, with a port or without, is this machine by one of its own names."""
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


def bind(application: Application, port: int | None) -> WSGIServer:
    """A server that has its port, and serves when it is told to.

    ``port``: without one the first that is free from 8080 on.

    Raises:
        UsageError: the port, or none of those, can be used.
    """
    ports = [port] if port is not None else list(range(DEFAULT_PORT, DEFAULT_PORT + TRIED_PORTS))
    for number in ports:
        try:
            return make_server(HOST, number, guarded(application), handler_class=_Handler)
        except OSError as error:
            trouble = error
    if port is not None:
        raise UsageError(
            f"Port {port} cannot be used ({trouble.strerror or trouble}). Name another one with --port, or "
            "leave it out: then the next free one is taken."
        )
    raise UsageError(
        f"None of the ports {ports[0]} to {ports[-1]} can be used ({trouble.strerror or trouble}). Name "
        "another one with --port."
    )


class _Handler(WSGIRequestHandler):
    """Without a line on the terminal for every request."""

    def log_request(self, *arguments: Any) -> None:
        """Say nothing."""
