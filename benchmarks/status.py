"""What it costs to look at a long run: ``status`` with the snapshot that a run writes and without one, the
fold alone, and ``resume`` of the run, which is over.

python -m benchmarks.status [--seconds 4000 16000 64000] [--trials 1000 5000] [--workers 20]

``--seconds``: runs of so many virtual seconds; ``--trials``: runs that end with so many trials, on so few
data that most of their events are of trials. Some 5,000 trials take minutes to be simulated.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from budgetsearch import api
from budgetsearch.core.codec import encode
from budgetsearch.core.events import Entry, Opened
from budgetsearch.core.history.fold import apply, fold
from budgetsearch.core.history.history import History
from budgetsearch.run.export import AdapterExporter
from budgetsearch.storage.backup import backup_of, write_copy
from budgetsearch.storage.ledger import MemoryLedger, read_entries
from budgetsearch.storage.repair import mend
from budgetsearch.storage.seals import Row, last_seal, sealed
from budgetsearch.storage.snapshot import Snapshot, is_due, snapshot_of, write_snapshot
from tests.support.factories import FACTS
from tests.support.simulation import make_driver

LEDGER = "ledger.sqlite"
OPENED = Opened(0.0, {"model": "none", "data": "none"}, {**FACTS, "study": "run"})
"""What a run says of itself."""


def lasting(seconds: float, workers: int) -> list[Entry]:
    """The events of a run of so many virtual seconds, most of them heartbeats."""
    return _simulated(seconds, workers, train_rows=200_000, train_tokens=16_000_000, max_trials=100_000)


def trying(trials: float, workers: int) -> list[Entry]:
    """The events of a run with so many trials."""
    each = -(-int(trials) // workers)
    return _simulated(4.0 * trials, workers, train_rows=400, train_tokens=32_000, max_trials=each)


def _simulated(seconds: float, workers: int, **changes: int) -> list[Entry]:
    driver = make_driver(None, budget=seconds, slots=workers, **changes)  # type: ignore[arg-type]
    driver.run()
    assert isinstance(driver.ledger, MemoryLedger)
    entries = driver.ledger.entries
    return [replace(entries[0], event=Opened(seconds, OPENED.settings, OPENED.facts)), *entries[1:]]


def write(folder: Path, entries: Sequence[Entry]) -> None:
    """A run folder with these events: the backup, the ledger that is made from it, and the snapshot."""
    rows: list[Row] = []
    for entry in entries:
        body = json.dumps(encode(entry.event), allow_nan=False)
        kind = type(entry.event).__name__
        rows.append(sealed(last_seal(rows), entry.seq, entry.at, entry.wall, kind, body))
    write_copy(backup_of(folder / LEDGER), rows)
    mend(folder / LEDGER)
    known, history = 0, History()
    for number in range(1, len(entries) + 1):
        known = number if is_due(number, known) else known
    for entry in entries[:known]:
        apply(history, entry)
    if known:
        write_snapshot(folder / LEDGER, Snapshot(known, rows[known - 1].seal, history))


def measure(folder: Path) -> dict[str, Any]:
    """Processor seconds of each look at the run."""
    found: dict[str, Any] = {}

    def timed(name: str, what: Callable[[], Any]) -> Any:
        start = time.process_time()
        done = what()
        found[f"{name}_seconds"] = round(time.process_time() - start, 3)
        return done

    entries = timed("read", lambda: list(read_entries(folder / LEDGER)))
    history = timed("fold", lambda: fold(entries))
    timed("status", lambda: api.status(folder))
    with patch.object(AdapterExporter, "stands", return_value=True):  # there are no weights here
        timed(
            "first_resume", lambda: api.resume(folder, model="none", data="none")
        )  # makes study and reports
        timed("resume", lambda: api.resume(folder, model="none", data="none"))
    snapshot_of(folder / LEDGER).unlink(missing_ok=True)
    timed("status_without_snapshot", lambda: api.status(folder))
    return {"events": history.seq, "trials": len(history.trials), **found}


def main() -> None:
    """Print one line of JSON for each length of run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="*", default=[4000.0, 16_000.0, 64_000.0])
    parser.add_argument("--trials", type=float, nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=20)
    asked = parser.parse_args()
    print(f"processor seconds, {os.cpu_count()} CPU cores", flush=True)
    for make, length in [
        *((lasting, one) for one in asked.seconds),
        *((trying, one) for one in asked.trials),
    ]:
        with tempfile.TemporaryDirectory(prefix="budgetsearch-") as folder:
            write(Path(folder), make(length, asked.workers))
            print(json.dumps(measure(Path(folder))), flush=True)


if __name__ == "__main__":
    main()
