"""Counts for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from budgetsearch.training.inference.engine import Engine

KNOWN = ("/process", "/tokenize", "/decode", "/v1/completions", "/v1/chat/completions", "/v1/models")
"""Other paths are counted together: whoever asks chooses them."""
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Requests by route and status, how long they took, and what the engine has done."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "budgetsearch_requests", "Requests.", ["path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "budgetsearch_request_seconds", "Until the response began.", ["path"],
            registry=self._registry, buckets=BUCKETS,
        )  # fmt: skip
        self._gauge("waiting", "Answers that wait.", lambda: engine.waiting)
        self._gauge("active", "Answers that are being written.", lambda: engine.active)
        for name in vars(engine.counts):
            what = name.replace("_", " ")
            self._gauge(name, f"Since the start: {what}.", partial(getattr, engine.counts, name))

    def _gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        Gauge(f"budgetsearch_{name}", what, registry=self._registry).set_function(read)

    def note(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        path = path if path in KNOWN else "other"
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return bytes(generate_latest(self._registry))
