"""Rows that are left out, by reason: counted, shown with their places, and too many of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from budgetsearch.core.errors import DataError, SettingsError

SHOWN_PLACES = 3
SHOWN_REASONS = 4
BAD_SHARE = 0.05
BAD_ROWS = 100
"""Without --bad-rows: so many, or BAD_SHARE of all rows where that is more."""


@dataclass
class Tally:
    """How many rows are left out, and why."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each reason."""

    def add(self, reason: str, places: Iterable[str], count: int = 1) -> None:
        """One more for this reason."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        known = self.places.setdefault(reason, [])
        known += list(places)[: SHOWN_PLACES - len(known)]

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add what ``to_json`` gave elsewhere."""
        for reason, (count, places) in other.items():
            self.add(reason, places, count)

    def to_json(self) -> dict[str, Any]:
        """By reason: how many, and the first places."""
        return {reason: [count, self.places[reason]] for reason, count in self.counts.items()}

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        """The reasons, the most frequent first, each with its first places."""
        ordered = sorted(self.counts, key=lambda reason: -self.counts[reason])
        parts = [
            f"{self.counts[reason]} {reason} ({', '.join(self.places[reason])}"
            f"{', ...' if self.counts[reason] > len(self.places[reason]) else ''})"
            for reason in ordered[:SHOWN_REASONS]
        ]
        rest = sum(self.counts[reason] for reason in ordered[SHOWN_REASONS:])
        return "; ".join([*parts, *([f"{rest} for other reasons"] if rest else [])])

    def check(self, rows: int, allowed: str | None) -> None:
        """Refuse data of which too much, or everything, is left out.

        Raises:
            DataError: it is.
        """
        if self.total >= rows:
            raise DataError(f"no row can be used: {self}; mend the rows" if rows else "there are no rows")
        if self.total > most_of(allowed, rows):
            raise DataError(
                f"{self.total} of {rows} rows cannot be used, more than --bad-rows {allowed or 'allows'}: "
                f"{self}; mend them, or go on without them with --bad-rows {self.total}"
            )


def most_of(allowed: str | None, rows: int) -> float:
    """How many rows may be left out: ``1%``, a number, or what is usual.

    Raises:
        SettingsError: it is neither.
    """
    if allowed is None:
        return max(BAD_ROWS, BAD_SHARE * rows)
    try:
        share = allowed.endswith("%")
        number = float(allowed.removesuffix("%")) * (rows / 100 if share else 1)
        if not 0 <= number < float("inf") or (not share and number != int(number)):
            raise ValueError
    except ValueError:
        raise SettingsError(
            f"--bad-rows {allowed!r} is neither a number of rows nor a share such as 1%"
        ) from None
    return number
