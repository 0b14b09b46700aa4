"""What ``budgetsearch serve`` does: load as trained, take a port, answer until it is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetsearch.core.errors import UsageError
from budgetsearch.core.ports import Say
from budgetsearch.machine.detect import detect
from budgetsearch.run.winner import Winner, winner_of

if TYPE_CHECKING:
    from budgetsearch.tools.serve.asking import Served

EXTRA = "serve needs the packages of an extra: pip install 'budgetsearch[serve]'."
HOST, PORT, TRIED_PORTS = "127.0.0.1", 8000, 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DRAIN_SECONDS = 30
"""After a signal what was taken on gets so long to be written."""
USUAL_CONTEXT = 2048
"""Of a model that does not say how many tokens it holds."""


@dataclass(frozen=True)
class Serving:
    """How a model is served."""

    host: str = HOST
    port: int | None = None
    """None: 8000, or the next free one."""
    rows: int = 8
    """Answers that are written at once."""
    queue: int = 64
    """Answers that may wait beside those."""
    gpu: str = "auto"
    model: str | None = None
    """Where the base lies, or that it may be fetched."""
    trust_remote_code: bool = False


def serve(run: Path, how: Serving, say: Say, ready: Callable[[Any], None] = lambda server: None) -> None:
    """Serve a finished run, its adapter's folder or a merged model until SIGTERM or Ctrl-C.

    ``say`` hears the address once it answers; ``ready`` gets the server, which ``should_exit`` ends.

    Raises:
        UsageError: the folder, the base or the port cannot be used, or the extra is not installed.
    """
    try:
        import uvicorn

        from budgetsearch.tools.serve.app import make_app
    except ImportError as error:
        raise UsageError(f"{EXTRA} ({error})") from error
    winner = winner_of(run)
    with bind(how.host, how.port) as listening:
        served = loaded(winner, how, say)
        try:
            app = make_app(served, loopback=how.host in LOOPBACK)
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=DRAIN_SECONDS)
            server = _server(config)
            served.engine.start()
            number = listening.getsockname()[1]
            asked = "" if how.host in LOOPBACK else "  (open to the network, and asks nobody who they are)"
            say(f"{served.name} answers on http://{how.host}:{number}{asked}")
            ready(server)
            server.run(sockets=[listening])
        finally:
            served.engine.close(DRAIN_SECONDS)
            served.encoder.close()
    say("every answer that was taken on is written; goodbye")


def loaded(winner: Winner, how: Serving, say: Say) -> Served:
    """The model on its card, with its engine, which does not run yet.

    Raises:
        UsageError: base or card cannot be used.
    """
    from budgetsearch.tools.serve.asking import Served
    from budgetsearch.training.data.apart import EncoderApart
    from budgetsearch.training.inference.batch import Batch
    from budgetsearch.training.inference.engine import Engine
    from budgetsearch.training.quiet import quiet

    card = detect(how.gpu)
    os.environ.update(card.environment)
    base = winner.base(how.model, how.trust_remote_code, say)
    encoder = EncoderApart(winner.folder)
    encoder.begin()  # while the base is loaded
    try:
        say(f"loading {winner.name} on {card.name}, the base in {winner.quantization}")
        with quiet():
            model = winner.load(base, card, how.trust_remote_code)
        context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or USUAL_CONTEXT)
        batch = Batch(model, card.device, encoder.tokenizer.pad_token_id or 0)
        engine = Engine(batch, card.device, rows=how.rows, most_waiting=how.queue)
        encoder.reader  # noqa: B018  # a chat template that cannot be used is told before the first question
    except BaseException:
        encoder.close()
        raise
    return Served(winner.name, engine, encoder, context)


def bind(host: str, port: int | None) -> socket.socket:
    """Take a port, before minutes are spent on loading.

    Raises:
        UsageError: it, or none of those that are tried, can be used.
    """
    ports = [port] if port is not None else list(range(PORT, PORT + TRIED_PORTS))
    for number in ports:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, number), family=family)
        except OSError as error:
            trouble = error
    which = f"None of the ports {ports[0]} to {ports[-1]} can" if port is None else f"Port {port} cannot"
    raise UsageError(
        f"{which} be used on {host} ({trouble.strerror or trouble}). Name another one with --port."
    )


def _server(config: Any) -> Any:
    """A server that returns after a signal instead of dying of it: what it took on is written first."""
    import uvicorn

    class Draining(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            stops = (signal.SIGTERM, signal.SIGINT)
            before = {number: signal.signal(number, self.handle_exit) for number in stops}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    return Draining(config)
