"""How many rows and tokens some data hold, guessed without preparing them and without torch."""

from __future__ import annotations

import itertools
import json
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from budgetsearch.core.errors import DataError
from budgetsearch.training.data.conversation import Sample, Text
from budgetsearch.training.data.frame import CHARACTERS_PER_TOKEN, Frame
from budgetsearch.training.data.gym import GYM
from budgetsearch.training.data.lines import PACKED, lines_of
from budgetsearch.training.data.origins import Origin, locate, on_hub, origins_of
from budgetsearch.training.data.rows import kind_of, read_rows
from budgetsearch.training.data.samples import Source
from budgetsearch.training.data.tally import Tally

SAMPLED = 1000
"""Rows that the length of a row is taken from."""
WHOLE_BYTES = 64 * 2**20
"""Files up to this size are counted from end to end."""
PACKED_FACTOR = 4
"""So many times as large is text that was packed: a guess."""
UNKNOWN_ROWS, UNKNOWN_TOKENS = 10_000, 250


@dataclass(frozen=True)
class DataGuess:
    """How much data there is."""

    rows: int
    tokens_per_row: float
    source: str


KNOWN_DATA: Mapping[str, DataGuess] = {
    "hub:databricks/databricks-dolly-15k/databricks-dolly-15k.jsonl": DataGuess(
        15_011, 200, "its page: 15,011 rows in 13.1 MB, at 4 characters a token"
    ),
    "reasoning-gym:family_relationships?size=2000&seed=0": DataGuess(
        2000, 81, "measured with the tokenizer of SmolLM2"
    ),
}


@dataclass(frozen=True)
class Reading:
    """How rows become tokens, as far as it decides how many."""

    frame: Frame = field(default_factory=Frame)
    columns: str | None = None
    system: str = ""
    max_length: int | None = None
    """In tokens: conversations are cut there, texts are split."""

    def tokens(self, sample: Sample) -> float:
        """About so many of one row."""
        if isinstance(sample.body, Text):
            return 1 + len(sample.body.text) / CHARACTERS_PER_TOKEN
        turns, tools = sample.body.turns, sample.body.tools
        texts = [turn.content + turn.reasoning for turn in turns]
        texts += [json.dumps(each) for turn in turns for each in turn.tool_calls] + [*map(json.dumps, tools)]
        count = len(turns)
        if self.system and turns[0].role not in ("system", "developer"):
            texts.append(self.system)
            count += 1
        said = sum(map(len, texts)) / CHARACTERS_PER_TOKEN
        whole = said + self.frame.row + self.frame.exchange * count / 2
        return min(whole, self.max_length or whole)


def guess_data(source: str, max_rows: int | None, reading: Reading | None = None) -> DataGuess:
    """Rows and tokens of a data source, from its first rows and its size or from what is known of it."""
    reading = reading or Reading()
    parts = [_guess(origin, reading) for origin in origins_of(source, reading.columns)]
    rows = sum(part.rows for part in parts)
    tokens = sum(part.rows * part.tokens_per_row for part in parts) / max(1, rows)
    why = "; ".join(dict.fromkeys(part.source for part in parts))
    return DataGuess(min(rows, max_rows or rows), tokens, why)


def _guess(origin: Origin, reading: Reading) -> DataGuess:
    source = origin.source
    found = KNOWN_DATA.get(source.partition("@")[0]) or _local(origin, reading) or _gym(source)
    return found or DataGuess(UNKNOWN_ROWS, UNKNOWN_TOKENS, "a guess: what is not here cannot be counted")


def _local(origin: Origin, reading: Reading) -> DataGuess | None:
    source = origin.source
    if source.startswith(GYM) or on_hub(source):
        return None
    found = locate(source)
    counts = [_count(file) for file in found.files]
    rows, size = sum(rows for rows, _ in counts), sum(size for _, size in counts)
    first = [reading.tokens(one) for one in Source(origin, found).samples(Tally(), most=SAMPLED)]
    if not first:  # whoever looks at the rows says what is wrong with them
        tokens = size / max(1, rows) / CHARACTERS_PER_TOKEN
        return DataGuess(rows, max(1.0, tokens), f"size of {Path(source).name}, at 4 characters a token")
    what = f"first rows of {Path(source).name}, at 4 characters a token, and what the template adds"
    return DataGuess(rows, sum(first) / len(first), what)


def _count(path: Path) -> tuple[int, float]:
    """(rows, bytes of all of them) of a data file; large ones are extrapolated from their beginning.

    Raises:
        DataError: the file is damaged.
    """
    size, kind = path.stat().st_size * (PACKED_FACTOR if path.suffix.lower() in PACKED else 1), kind_of(path)
    if kind == "Parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_metadata(path)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise DataError(f"{path} cannot be read: {error}. Mend the file.") from error
        groups = (table.row_group(k).total_byte_size for k in range(table.num_row_groups))
        return max(1, table.num_rows), float(sum(groups))
    if kind in ("JSON", "CSV", "Arrow") and size <= WHOLE_BYTES:
        return max(1, sum(1 for _ in read_rows(path))), float(size)
    head = [len(line) for line in itertools.islice(lines_of(path), SAMPLED) if line.strip()]
    per_row = sum(head) / max(1, len(head))
    return max(1, round(size / max(1.0, per_row))), float(size)


def _gym(source: str) -> DataGuess | None:
    if not source.startswith(GYM):
        return None
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(source).query)
    size = query.get("size", ["500"])[0]
    rows = int(size) if size.isdigit() else 500
    return DataGuess(rows, 100, "its size; the length of a row is a guess")
