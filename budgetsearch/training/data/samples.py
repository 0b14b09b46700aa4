"""Samples: the rows of sources in the shape that everything else works on."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import DataError
from budgetsearch.core.ports import Say
from budgetsearch.training.data.conversation import Sample, Skip, Text, from_json
from budgetsearch.training.data.lines import Broken
from budgetsearch.training.data.messages import shown
from budgetsearch.training.data.origins import Located, Origin, locate
from budgetsearch.training.data.shapes import parse_columns, sample_of
from budgetsearch.training.data.tally import Tally

FIRST_ROWS = 10_000
"""One of so many must be usable before anything else is done."""
SHOWN = 8
"""Names of columns that nothing is made of."""
Look = Callable[[int], None]
"""Hears the number of each row before it is looked at."""


@dataclass(frozen=True)
class Source:
    """A source of samples, found on this machine."""

    origin: Origin
    located: Located

    def samples(
        self,
        tally: Tally,
        say: Say = lambda _: None,
        look: Look = lambda _: None,
        most: int | None = None,
    ) -> Iterator[Sample]:
        """Its samples, of so many rows at ``most``; what cannot be one is counted.

        Raises:
            DataError: it cannot be read.
        """
        columns, idle = parse_columns(self.origin.columns), Counter[str]()
        for number, (place, row) in enumerate(itertools.islice(self.located.rows(say), most)):
            look(number)
            if isinstance(row, Broken):
                tally.add(row.why, [place])
                continue
            try:
                sample, used = sample_of(row, place, columns)
            except Skip as skip:
                tally.add(skip.reason, [place])
                continue
            idle.update(str(name) for name in row.keys() - used if row[name] not in (None, ""))
            yield sample if self.located.files else replace(sample, check=row["check"])
        if idle and self.located.files:
            some = ", ".join(f"{shown(name, 40)} ({rows} rows)" for name, rows in idle.most_common(SHOWN))
            more = f" and {len(idle) - SHOWN} more" if len(idle) > SHOWN else ""
            say(f"columns of {self.located.source} that nothing is made of: {some}{more}")


def find(origins: Sequence[Origin], say: Say = lambda _: None) -> list[Source]:
    """All sources on this machine.

    Raises:
        DataError: one is not there, or cannot be reached.
    """
    return [Source(origin, locate(origin.source, say)) for origin in origins]


def load_samples(source: str, say: Say = lambda _: None) -> list[Sample]:
    """All samples of one source, in its order.

    Raises:
        DataError: it cannot be read, or none of its rows can be used.
    """
    tally, found = Tally(), find([Origin(source)], say)[0]
    samples = list(found.samples(tally, say))
    if not samples:
        raise DataError(_nothing(source, tally))
    if tally.total:
        say(f"{source}: {tally.total} rows are skipped: {tally}")
    return samples


def check_rows(origin: Origin) -> None:
    """Look at the first rows of a source that needs no network.

    Raises:
        DataError: none of them can be used, or it cannot be read.
    """
    tally, found = Tally(), find([origin])[0]
    for _ in found.samples(tally, most=FIRST_ROWS):
        return  # how many cannot be used is counted when all are read
    raise DataError(_nothing(origin.source, tally))


def _nothing(source: str, tally: Tally) -> str:
    if not tally.total:
        return f"{source} holds no rows; give a file with rows"
    return f"{source}: no row can be used: {tally}; mend the rows"


def sample_in(line: bytes) -> Sample:
    """The sample of a line: as JSON, a tab, and its place; JSON itself holds no tab."""
    bare, _, place = line.partition(b"\t")
    return replace(from_json(read_json(bare)), place=read_json(place))


def short_hash(text: str) -> int:
    """Sixty-four bits of a text's hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def prompt_key(sample: Sample) -> int:
    """What makes two beginnings the same: whatever comes before the first answer, spaces aside."""
    if isinstance(sample.body, Text):
        return short_hash(" ".join(sample.body.text.split()))
    asked: list[Any] = []
    for turn in sample.body.turns:
        if turn.role == "assistant":
            break
        asked += [turn.role, " ".join(turn.content.split())]
    return short_hash(json.dumps(asked))
