"""A minute of load on a served model, as JSON: how many answers, no error, and how long they took.

python -m benchmarks.serving.load [RUN] [--clients 16] [--seconds 60]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support.rows import write_rows
from tests.support.serving import running
from tests.support.tiny import make_tiny_model
from tests.support.winners import make_winner

TOKENS = 32
"""Of each answer."""


def ask(url: str, number: int) -> tuple[int, float]:
    """(status, seconds) of one request as the challenge's harness sends it."""
    body = {
        "prompt": f"Question {number}: say it.", "max_new_tokens": TOKENS, "temperature": 0.8, "seed": number
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/process", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            answer.read()
            status = int(answer.status)
    except urllib.error.HTTPError as error:
        status = error.code
    return status, time.perf_counter() - start


def load(url: str, clients: int, seconds: float) -> list[tuple[int, float]]:
    """Ask from so many clients, each anew as soon as it was answered."""
    found: list[tuple[int, float]] = []
    end = time.monotonic() + seconds

    def client(first: int) -> None:
        number = first
        while time.monotonic() < end:
            found.append(ask(url, number))
            number += clients

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def figures(found: list[tuple[int, float]], clients: int, seconds: float) -> dict[str, Any]:
    """What came of it; latencies in seconds, from the request to its whole answer."""
    times = [taken for _, taken in found]
    cuts = statistics.quantiles(times, n=100)
    return {
        "clients": clients,
        "seconds": seconds,
        "tokens": TOKENS,
        "statuses": {str(status): count for status, count in sorted(Counter(s for s, _ in found).items())},
        "answers_per_second": round(len(found) / seconds, 2),
        "latency": {
            "median": round(cuts[49], 3), "p90": round(cuts[89], 3), "p99": round(cuts[98], 3),
            "longest": round(max(times), 3),
        },
    }  # fmt: skip


@contextmanager
def run_of(given: Path | None) -> Iterator[Path]:
    """The run that is named, or one of a tiny model with an adapter that nobody trained."""
    if given is not None:
        yield given
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, BUDGETSEARCH_CACHE=f"{folder}/cache"),
    ):
        place = Path(folder)
        yield make_winner(place / "run", make_tiny_model(place / "tiny"), write_rows(place / "train.jsonl"))


def main() -> None:
    """Serve, load, print; exits with 1 if any request was not answered."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="without one: of a tiny model")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    with run_of(given.run) as run, running(run) as server:
        found = load(server.url, given.clients, given.seconds)
    print(json.dumps(figures(found, given.clients, given.seconds), indent=1))
    sys.exit(any(status != 200 for status, _ in found))


if __name__ == "__main__":
    main()
