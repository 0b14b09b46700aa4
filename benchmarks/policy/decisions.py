"""Whether two versions of the code decide alike: two hundred simulated runs, compared event by event.

    python -m benchmarks.policy.decisions --out FILE.jsonl.gz       play them and write every event down
    python -m benchmarks.policy.decisions --against FILE.jsonl.gz   play them again and compare

The runs are those of ``setups.py``, played by ``rough.py``. Whatever stands in an event is compared, floats
to the last bit, and when it happened on the run's own clock; the time on the wall is not even recorded.
Record and compare on one machine and with the same packages: elsewhere the real sampler's Gaussian process
may round differently.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import gzip
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.policy.rough import play
from benchmarks.policy.setups import Setup, setup_of
from budgetsearch.core.codec import encode
from budgetsearch.core.events import Entry, Heartbeat

RUNS = 200
ABSENT = "(absent)"
FLAGS = {"lost": "lost", "unread": "unread", "unwritten": "unwritten", "worker_lost": "stranded"}
"""Fields of a recorded result, and the statuses that stand in their place by now."""


def plain(event: dict[str, Any]) -> dict[str, Any]:
    """An encoded event as it is compared, whether it was recorded or is played now: what two versions write
    differently and mean alike (a renamed field, another wording) becomes the same here."""
    if event["is"] == "SegmentEnded":
        return {**event, "result": _plain_result(event["result"])}
    if event["is"] == "Planned" and not event["plan"].get("single"):
        return {**event, "plan": {key: value for key, value in event["plan"].items() if key != "single"}}
    if event["is"] == "Calibrated":
        found = event["calibration"]
        return {**event, "calibration": {key: value for key, value in found.items() if key != "measured"}}
    if event["is"] == "Closed":
        return {**event, "reason": ""}
    if event["is"] == "Decided" and event["decision"]["is"] == "Finish":
        return {**event, "decision": {"is": "Finish"}}
    if event["is"] == "Decided" and event["decision"]["is"] == "Run":
        return {**event, "decision": {**event["decision"], "reasons": []}}
    return event


def _plain_result(result: dict[str, Any]) -> dict[str, Any]:
    """A result whose flags, if it has any, are statuses."""
    told = [status for flag, status in FLAGS.items() if result.get(flag)]
    rest = {key: value for key, value in result.items() if key not in FLAGS}
    rest["status"] = status = (*told, result["status"])[0]
    if status in FLAGS.values():
        rest |= {"detail": "", "checkpoint_out": None}
    if status in ("crashed", "stranded"):
        rest["gang"] = 1
    return rest


def line_of(run: str, entry: Entry) -> str:
    """An event as it is recorded."""
    event = encode(entry.event)
    row = {"run": run, "seq": entry.seq, "at": entry.at, "type": event["is"], "event": event}
    return json.dumps(row)


def name_of(setup: Setup) -> str:
    """What a run is called in a record."""
    return f"{setup.number:03}"


class Progress:
    """Tells now and then how far it is, and in the end what was played."""

    def __init__(self) -> None:
        self.runs, self.start = 0, time.monotonic()
        self.events: Counter[str] = Counter()
        self.features: Counter[str] = Counter()

    def note(self, setup: Setup, entries: Sequence[Entry]) -> None:
        """One more run has been played."""
        self.runs += 1
        self.features.update(setup.features())
        self.events.update(type(entry.event).__name__ for entry in entries)
        if self.runs % 20 == 0:
            print(self, file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return f"{self.runs} runs, {self.events.total()} events, {time.monotonic() - self.start:.0f} s"

    def summary(self) -> str:
        """How often there was what."""
        counts = [*self.events.most_common(), *sorted(self.features.items())]
        return "\n".join(f"{count:8} {name}" for name, count in counts)


def record(path: Path, runs: Iterable[int], *, heartbeats: bool = True) -> None:
    """Play the runs of these numbers and write their events."""
    progress = Progress()
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for setup in map(setup_of, runs):
            entries = [e for e in play(setup) if heartbeats or not isinstance(e.event, Heartbeat)]
            file.writelines(f"{line_of(name_of(setup), entry)}\n" for entry in entries)
            progress.note(setup, entries)
    print(f"{progress.summary()}\n{path}: {progress}")


def compare(path: Path) -> int:
    """Play the runs of a record again and say where they differ first; returns how many do."""
    progress, differing = Progress(), 0
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for name, recorded in itertools.groupby(map(str.strip, file), lambda line: json.loads(line)["run"]):
            before, setup = list(recorded), setup_of(int(name))
            entries = play(setup)
            progress.note(setup, entries)
            if where := difference(before, [line_of(name, entry) for entry in entries]):
                differing += 1
                print(f"run {name} differs {where}\n    {setup}", flush=True)
    print(f"{progress}: {differing} runs differ")
    return differing


def difference(before: Sequence[str], after: Sequence[str]) -> str:
    """Where two runs differ first, in words; nothing if they are the same."""
    for one, two in itertools.zip_longest(before, after):
        if one is None or two is None:
            return f"in its length: {len(before)} events are recorded, {len(after)} were played"
        if one != two and (found := first_difference(_comparable(one), _comparable(two))):
            return f"at event {json.loads(one)['seq']}, {found}"
    return ""


def _comparable(line: str) -> dict[str, Any]:
    row = json.loads(line)
    return {"at": row["at"], "event": plain(row["event"])}


def first_difference(one: Any, two: Any, path: str = "") -> str:
    """The first place within two JSON values where they differ, in words; nothing if they do not."""
    if isinstance(one, list) and isinstance(two, list):
        one, two = (dict(enumerate(values)) for values in (one, two))
    if not (isinstance(one, dict) and isinstance(two, dict)):
        # As text: 1, 1.0 and True are equal in Python, and NaN is not equal to itself.
        texts = json.dumps(one), json.dumps(two)
        return "" if texts[0] == texts[1] else f"{path}: {texts[0][:300]} -> {texts[1][:300]}"
    pairs = ((key, one.get(key, ABSENT), two.get(key, ABSENT)) for key in {**one, **two})
    found = (first_difference(a, b, f"{path}.{key}" if path else key) for key, a, b in pairs)
    return next(filter(None, found), "")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="Play the runs and write their events here.")
    what.add_argument("--against", type=Path, help="Play the runs of this record again and compare.")
    parser.add_argument("--runs", type=int, default=RUNS, help="How many to record.")
    parser.add_argument("--only", type=int, nargs="+", help="Record these runs, without their heartbeats.")
    given = parser.parse_args()
    if given.out:
        record(given.out, given.only or range(given.runs), heartbeats=not given.only)
    elif compare(given.against):
        sys.exit(1)


if __name__ == "__main__":
    main()
