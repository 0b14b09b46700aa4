"""What ``budgetsearch submit`` is asked for, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Submitting:
    """How an entry is made."""

    gpu: str | None = None
    """The card that it is judged on; None: that of the run."""
    copy_base: bool = False
    """Whether the base model's files go into the folder."""
    licences_checked: bool = False
    """Whether the user has looked at the licences that are not known to be open."""
    check: bool = False
    """Whether the steps are run in a fresh virtual environment before the folder counts."""


@dataclass(frozen=True)
class Fit:
    """The memory that answering takes, and what the card has."""

    card: str
    usable_bytes: int | None
    """None: it depends on the machine."""
    rows: int
    """Answers at once."""
    length: int
    """Tokens of prompt and answer together."""
    parts: Mapping[str, float]
    """Bytes by what holds them; none where the base's shape cannot be foreseen."""

    @property
    def bytes(self) -> float:
        """In all."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against it."""
        return self.usable_bytes is None or self.bytes <= self.usable_bytes


@dataclass(frozen=True)
class Entry:
    """A submission, whole on disk."""

    folder: str
    base: str
    """Where the base comes from."""
    revision: str | None
    sha256: str
    """Of the base's files."""
    copied: bool
    """Whether the base lies in the folder."""
    quantization: str
    fit: Fit
    budget_seconds: float
    """That the search had, and that the training image has."""
    winner_seconds: float
    """That the winner took of it, with those that trained beside it."""
    licences: tuple[str, ...]
    checked: bool
    """Whether the user says to have looked at licences that are not known to be open."""
    changed: tuple[str, ...]
    """Packages of other versions than in training."""
    answer: str | None
    """What the server of a fresh virtual environment said; None: it was not tried."""
