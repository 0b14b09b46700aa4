"""What a study of 200 trials costs: each event while it is followed, and the last lines after the end.

``python -m benchmarks.faults.study [--url postgresql://...]``; without a URL, SQLite in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from budgetsearch.core.events import Closed, Entry
from budgetsearch.core.history.fold import apply
from budgetsearch.core.history.history import History
from budgetsearch.views.study.follower import SILENT
from budgetsearch.views.study.mirror import StudyMirror
from tests.support.factories import Story, params


def search(trials: int) -> list[Entry]:
    """A run of so many trials at the first rung, one in five at the second, and one in full."""
    story = Story.planned()
    for number in range(trials):
        story.train(story.trial(params(8, 1e-3 * (1 + number / (2 * trials)))), 1.0 + number / trials)
        if number % 5 == 4:
            story.train(number // 5, 0.9, 1, "promotion")
    story.train(0, 0.8, 2, "full run starts")
    story.finish()
    return story.entries


def measure(url: str, entries: list[Entry]) -> dict[str, float]:
    """Seconds of following and of the end."""
    mirror, history = StudyMirror(url, f"bench-{time.time_ns()}"), History()
    following, ending = 0.0, 0.0
    for entry in entries:
        apply(history, entry)
        began = time.perf_counter()
        if not isinstance(entry.event, SILENT):
            mirror.catch_up(history)
        took = time.perf_counter() - began
        if isinstance(entry.event, Closed):
            ending = took
        else:
            following += took
    assert mirror.level
    fresh = StudyMirror(url, f"bench-{time.time_ns()}")
    began = time.perf_counter()
    fresh.catch_up(history)
    return {"following": following, "the end": ending, "made again": time.perf_counter() - began}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--url")
    given = parser.parse_args()
    entries = search(given.trials)
    with tempfile.TemporaryDirectory() as folder:
        url = given.url or f"sqlite:///{Path(folder) / 'study.sqlite'}"
        found = measure(url, entries)
    print(json.dumps({name: round(seconds, 2) for name, seconds in found.items()}))


if __name__ == "__main__":
    main()
