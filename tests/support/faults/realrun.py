"""Whole runs of the command line on a tiny model: real worker, real training, real seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from budgetsearch.storage.runfolder import RunFolder
from tests.support.rows import write_rows

SPACE = """\
dimensions:
  quantization: {kind: choice, values: [fp32, nf4]}
  rank: {kind: choice, values: [2, 4, 8], ordered: true}
  learning_rate: {kind: float, low: 1.0e-3, high: 3.0e-2, log: true}
"""


@dataclass(frozen=True)
class Workplace:
    """A folder with a tiny model, data, settings and a cache."""

    path: Path

    def make(self) -> Workplace:
        """Write what runs need."""
        from tests.support.tiny import make_tiny_model

        self.path.mkdir(parents=True, exist_ok=True)
        make_tiny_model(self.path / "model")
        write_rows(self.path / "train.jsonl", 200)
        (self.path / "space.yaml").write_text(SPACE, encoding="utf-8")
        (self.path / "budgetsearch.yaml").write_text(
            "model: model\ndata: train.jsonl\ngpu: cpu\nspace: space.yaml\n"
            "task_examples: 8\nmax_length: 128\n",
            encoding="utf-8",
        )
        return self

    def start(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """Start ``budgetsearch`` with these arguments; what it prints goes to ``log``."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "budgetsearch", *arguments],
                cwd=self.path,
                env={**os.environ, "BUDGETSEARCH_CACHE": str(self.path / "cache"), "OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
            )


def await_free(run: Path) -> None:
    """A worker whose driver was killed is soon gone, and with it the run's lock."""
    until = time.monotonic() + 30
    while run.is_dir() and RunFolder(run).in_use():
        assert time.monotonic() < until, "the worker outlived its driver"
        time.sleep(0.05)


@contextmanager
def competitors(count: int) -> Iterator[None]:
    """So many processes that compute for nothing."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()
