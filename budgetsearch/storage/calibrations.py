"""Calibrations that are kept for the next run of the same kind on the same machine."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from budgetsearch.core.codec import read_json
from budgetsearch.core.records import Calibration
from budgetsearch.storage.files import local_time, replace_text

MAX_DAYS = 14
"""Older ones are measured anew: drivers, clocks and neighbours change without a trace."""
AGAIN_SHARE = 0.05
"""One that was measured within a smaller budget, which leaves less time for gangs, is measured anew if that
takes at most this share of the budget."""

ROOMIER = 1.25
"""With so many times the memory that it had more may fit, and it is measured anew."""


class _File(BaseModel):
    """What a file holds; nothing else is believed."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1]
    of: dict[str, Any]
    measured: float
    """Seconds since the epoch."""
    budget_seconds: float
    """Of the run that measured it."""
    limit_bytes: int | None
    """Memory of the card that it could use; None on the CPU."""
    calibration: Calibration


class _Seconds(BaseModel):
    """What the file of a preparation holds."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    measured: float
    """Seconds since the epoch."""
    seconds: float = Field(ge=0)


@dataclass(frozen=True)
class KeptSeconds:
    """What it took the last run of its kind to begin."""

    path: Path

    def find(self) -> float | None:
        """Seconds; None where no run of late has told."""
        try:
            kept = _Seconds.model_validate_json(self.path.read_bytes())
        except (OSError, ValidationError):
            return None
        return kept.seconds if 0 <= time.time() - kept.measured <= MAX_DAYS * 86_400 else None

    def keep(self, seconds: float) -> None:
        """Keep what it took now; where that cannot be written, the next run guesses again."""
        with suppress(OSError, ValidationError):
            text = _Seconds(measured=time.time(), seconds=seconds).model_dump_json()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, text)


@dataclass(frozen=True)
class KeptCalibrations:
    """Those that hold for a run, one file each; the last that was measured stands."""

    folder: Path
    of: Mapping[str, Any]
    """All that a measurement depends on, beside the quantization, as plain JSON values."""
    budget_seconds: float
    limit_bytes: int | None = None
    """Memory of the card that the run may use; None on the CPU."""
    fresh: bool = False
    """Measure anew whatever was kept."""

    def find(self, quantization: str) -> Calibration | None:
        """What was measured not too long ago and holds here; None if there is no such thing."""
        if self.fresh:
            return None
        try:
            kept = _File.model_validate_json(self._path(quantization).read_bytes())
        except (OSError, ValidationError):
            return None
        found = kept.calibration
        mine = kept.of == self._whole(quantization) and found.quantization == quantization
        recent = 0 <= time.time() - kept.measured <= MAX_DAYS * 86_400
        room = self.limit_bytes or 0
        fits = found.peak_bytes <= room <= ROOMIER * (kept.limit_bytes or 0) or not room
        if not (mine and recent and fits and found.sound and self._suffices(kept)):
            return None
        return replace(found, measured=local_time(kept.measured))

    def keep(self, found: Calibration) -> None:
        """Keep one that was measured now; where that cannot be written, the next run measures again."""
        if not found.sound:
            return
        whole = self._whole(found.quantization)
        kept = _File(
            format=1,
            of=whole,
            measured=time.time(),
            budget_seconds=self.budget_seconds,
            limit_bytes=self.limit_bytes,
            calibration=found,
        )
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self._path(found.quantization), kept.model_dump_json(indent=1))

    def _suffices(self, kept: _File) -> bool:
        cost = sum(kept.calibration.seconds.values())
        return self.budget_seconds <= kept.budget_seconds or cost > AGAIN_SHARE * self.budget_seconds

    def _whole(self, quantization: str) -> dict[str, Any]:
        return read_json(json.dumps({**self.of, "quantization": quantization}))  # type: ignore[no-any-return]

    def _path(self, quantization: str) -> Path:
        return self.folder / file_of(self._whole(quantization))


def file_of(conditions: Mapping[str, Any]) -> str:
    """The name of the file for what was measured under these conditions."""
    text = json.dumps(conditions, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
