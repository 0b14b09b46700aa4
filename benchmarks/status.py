"""What it costs to look at a long run: ``status``, and the fold alone, by the number of events.

python -m benchmarks.status [--seconds 4000 16000 64000] [--workers 20]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from budgetsearch import api
from budgetsearch.core.codec import encode
from budgetsearch.core.events import Entry
from budgetsearch.core.history.fold import fold
from budgetsearch.storage.backup import backup_of, write_copy
from budgetsearch.storage.ledger import MemoryLedger, read_entries
from budgetsearch.storage.repair import mend
from budgetsearch.storage.seals import Row, last_seal, sealed
from tests.support.simulation import make_driver

LEDGER = "ledger.sqlite"


def simulated(seconds: float, workers: int) -> list[Entry]:
    """The events of a run on virtual time."""
    driver = make_driver(
        None, budget=seconds, slots=workers, train_rows=200_000, train_tokens=16_000_000, max_trials=100_000
    )
    driver.run()
    assert isinstance(driver.ledger, MemoryLedger)
    return driver.ledger.entries


def write(folder: Path, entries: Sequence[Entry]) -> None:
    """A run folder with these events: the backup, and the ledger that is made from it."""
    rows: list[Row] = []
    for entry in entries:
        body = json.dumps(encode(entry.event), allow_nan=False)
        kind = type(entry.event).__name__
        rows.append(sealed(last_seal(rows), entry.seq, entry.at, entry.wall, kind, body))
    write_copy(backup_of(folder / LEDGER), rows)
    mend(folder / LEDGER)


def measure(folder: Path) -> dict[str, Any]:
    """Processor seconds of each look at the run."""
    start = time.process_time()
    entries = list(read_entries(folder / LEDGER))
    read = time.process_time()
    history = fold(entries)
    folded = time.process_time()
    api.status(folder)
    return {
        "events": len(entries),
        "trials": len(history.trials),
        "read_seconds": round(read - start, 3),
        "fold_seconds": round(folded - read, 3),
        "status_seconds": round(time.process_time() - folded, 3),
    }


def main() -> None:
    """Print one line of JSON for each length of run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="+", default=[4000.0, 16_000.0, 64_000.0])
    parser.add_argument("--workers", type=int, default=20)
    asked = parser.parse_args()
    print(f"processor seconds, {os.cpu_count()} CPU cores", flush=True)
    for seconds in asked.seconds:
        with tempfile.TemporaryDirectory(prefix="budgetsearch-") as folder:
            write(Path(folder), simulated(seconds, asked.workers))
            print(json.dumps(measure(Path(folder))), flush=True)


if __name__ == "__main__":
    main()
