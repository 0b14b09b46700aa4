"""How many rows and tokens some data hold, guessed without preparing them."""

from __future__ import annotations

import itertools
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from budgetsearch.core.errors import DataError
from budgetsearch.training.data.gym import GYM
from budgetsearch.training.data.lines import PACKED, lines_of
from budgetsearch.training.data.origins import locate, on_hub, origins_of
from budgetsearch.training.data.rows import kind_of, read_rows

CHARACTERS_PER_TOKEN = 4.0
SAMPLED_LINES = 1000
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


def guess_data(source: str, max_rows: int | None) -> DataGuess:
    """Rows and tokens of a data source, from its size or from what is known of it."""
    parts = [_guess(origin.source) for origin in origins_of(source)]
    rows = sum(part.rows for part in parts)
    tokens = sum(part.rows * part.tokens_per_row for part in parts) / max(1, rows)
    why = "; ".join(dict.fromkeys(part.source for part in parts))
    return DataGuess(min(rows, max_rows or rows), tokens, why)


def _guess(source: str) -> DataGuess:
    found = KNOWN_DATA.get(source.partition("@")[0]) or _local(source) or _gym(source)
    return found or DataGuess(UNKNOWN_ROWS, UNKNOWN_TOKENS, "a guess: what is not here cannot be counted")


def _local(source: str) -> DataGuess | None:
    if source.startswith(GYM) or on_hub(source):
        return None
    found = locate(source)
    counts = [_count(file) for file in found.files]
    rows, size = sum(rows for rows, _ in counts), sum(size for _, size in counts)
    per_row = size / max(1, rows)
    tokens = per_row / CHARACTERS_PER_TOKEN
    return DataGuess(rows, max(1.0, tokens), f"size of {Path(source).name}, at 4 characters a token")


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
    head = [len(line) for line in itertools.islice(lines_of(path), SAMPLED_LINES) if line.strip()]
    per_row = sum(head) / max(1, len(head))
    return max(1, round(size / max(1.0, per_row))), float(size)


def _gym(source: str) -> DataGuess | None:
    if not source.startswith(GYM):
        return None
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(source).query)
    size = query.get("size", ["500"])[0]
    rows = int(size) if size.isdigit() else 500
    return DataGuess(rows, 100, "its size; the length of a row is a guess")
