"""How fast rows become tokens, in how much memory and on how much disk.

    python -m benchmarks.data.prepare --rows 200000 --out benchmarks/data/results/cpu.json

Rows are made up, prepared as a run prepares them, and opened as a worker opens them. Memory is
the most that all processes of the preparation hold together, files that are mapped into memory aside.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from budgetsearch.training.data import supervise
from budgetsearch.training.data.tokens import Sources, open_prepared, prepare

WORDS = (
    "lamp",
    "pier",
    "boat",
    "baker",
    "stone",
    "wheel",
    "tea",
    "fog",
    "door",
    "seven",
    "late",
    "grey",
    "mill",
)


def write_rows(path: Path, rows: int, words: int) -> None:
    """Questions and answers of so many words together."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            said = rng.choices(WORDS, k=words)
            asked, answer = " ".join(said[: words // 2]), " ".join(said[words // 2 :])
            file.write(json.dumps({"prompt": f"{number}: {asked}?", "completion": f"{answer}."}) + "\n")


class Peak(threading.Thread):
    """The most memory that the children of this process hold together, and their processor time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self._seconds: dict[int, float] = {}
        self._over = threading.Event()

    def run(self) -> None:
        """Look twice a second."""
        while not self._over.wait(0.5):
            self.bytes = max(self.bytes, supervise.held_bytes(os.getpid()))
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    self._seconds[child.pid] = sum(child.cpu_times()[:2])

    @property
    def seconds(self) -> float:
        """Processor seconds of all of them."""
        return sum(self._seconds.values())

    def stop(self) -> int:
        """End looking; returns the peak."""
        self._over.set()
        return self.bytes


def measure(model: Path, rows: int, words: int, folder: Path) -> dict[str, Any]:
    """Prepare so many rows and open them."""
    write_rows(folder / "rows.jsonl", rows, words)
    peak, said = Peak(), list[str]()
    peak.start()
    began = time.monotonic()
    sources = Sources(str(folder / "rows.jsonl"))
    data = prepare(model, sources, max_length=1024, cache=folder / "cache", say=said.append)
    seconds = time.monotonic() - began
    again = time.monotonic()
    prepare(model, sources, max_length=1024, cache=folder / "cache")
    cached = time.monotonic() - again
    again = time.monotonic()
    opened = open_prepared(data.folder)
    opened.train.row(len(opened.train) - 1)
    opening = time.monotonic() - again
    size = sum(file.stat().st_size for file in data.folder.iterdir())
    return {
        "rows": rows,
        "tokens_per_row": round(data.train_stats.mean_row_tokens, 1),
        "cores": len(os.sched_getaffinity(0)),
        "source_bytes": (folder / "rows.jsonl").stat().st_size,
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "processor_seconds": round(peak.seconds, 1),
        "rows_per_processor_second": round(rows / max(0.1, peak.seconds)),
        "peak_memory_bytes": peak.stop(),
        "disk_bytes": size,
        "seconds_to_find_in_the_cache": round(cached, 3),
        "seconds_to_open": round(opening, 3),
        "said": said,
    }


def main() -> None:
    """Print the result as JSON, and write it where --out says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a base model")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--words", type=int, default=160, help="of a row")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.model, options.rows, options.words, Path(folder))
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
