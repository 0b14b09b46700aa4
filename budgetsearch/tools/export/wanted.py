"""What ``budgetsearch export`` is asked for, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from budgetsearch.core.errors import UsageError

FLOOR_NATS = 1e-3
"""Losses that lie this close are equal, however small they are: 16 bits round as much."""
TOLERANCES = {
    "merged": 0.001,
    "f32": 0.001,
    "f16": 0.001,
    "bf16": 0.001,
    "q8_0": 0.01,
    "q5_1": 0.05,
    "q5_0": 0.05,
    "q4_1": 0.10,
    "q4_0": 0.10,
}
"""By the form of an export: how far its loss may lie from the adapter's own, as a share of it. What 16 and 8
bits must hold is promised; what 5 and 4 bits may cost is a limit beyond which the file is of no use."""


@dataclass(frozen=True)
class Wanted:
    """The forms that are wanted, and where they go."""

    merged: bool = False
    gguf: str | None = None
    """One of the types that package gguf can quantize to."""
    ollama: bool = False
    hub: str | None = None
    """The repository to push to."""
    dry_run: bool = False
    out: Path | None = None
    """Where the new folders go; None: ``exports/`` in the run."""

    def check(self) -> None:
        """Insist on something to do.

        Raises:
            UsageError: nothing is asked for, or what does not go together.
        """
        if not (self.merged or self.gguf or self.ollama or self.hub):
            raise UsageError(
                "Name what to make: --merged, --gguf TYPE, --ollama or --hub NAME. The adapter itself is in "
                "RUN/adapter and needs no export."
            )
        if self.dry_run and not self.hub:
            raise UsageError("--dry-run belongs to --hub NAME: it names what would be uploaded.")

    @property
    def kind(self) -> str | None:
        """The type of the GGUF file, if one is to be made; Ollama's is q8_0 unless told."""
        return self.gguf or ("q8_0" if self.ollama else None)

    def folders(self, run: Path) -> dict[str, Path]:
        """The new folders by what goes into them."""
        home = self.out or run / "exports"
        found = {"merged": home / "merged"} if self.merged else {}
        if self.kind is not None:
            found["gguf"] = home / (f"ollama-{self.kind}" if self.ollama else f"gguf-{self.kind}")
        return found


@dataclass(frozen=True)
class Compared:
    """The loss of an export on validation rows beside the adapter's own."""

    form: str
    quantization: str
    """Of the base that the adapter was trained on."""
    rows: int
    adapter: float
    """Nats per trained token."""
    export: float

    @property
    def share(self) -> float:
        """The difference as a share of the adapter's loss."""
        return (self.export - self.adapter) / self.adapter if self.adapter else 0.0

    @property
    def well(self) -> bool:
        """Whether the export computes what the adapter does."""
        gap = abs(self.export - self.adapter)
        return gap <= max(TOLERANCES[self.form] * abs(self.adapter), FLOOR_NATS)

    @property
    def line(self) -> str:
        """For people, with its limit."""
        return (
            f"loss on {self.rows} validation rows: {self.adapter:.5f} adapter on its {self.quantization} "
            f"base, {self.export:.5f} {self.form} ({self.share:+.3%}; allowed {TOLERANCES[self.form]:.1%} "
            f"or {FLOOR_NATS:g})"
        )


@dataclass(frozen=True)
class Made:
    """A folder that was made, or a repository that was pushed to."""

    form: str
    place: str
    compared: Compared | None = None
    files: tuple[tuple[str, int], ...] = ()
    """(name, bytes) of what is there, or would be uploaded."""
