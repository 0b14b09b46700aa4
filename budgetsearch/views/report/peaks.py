"""Peak memory has two definitions, and each has one name wherever it is shown.

Two kinds of measurement stand in a ledger. A job's own counter is exact: on a card the allocator's highest
mark with the context beside it, on the CPU the process's largest resident set. The watcher looks five times a
second at what all processes on the card hold together; without a card it can only look at the process.
"""

from __future__ import annotations

from dataclasses import dataclass

from budgetsearch.core.history.history import History
from budgetsearch.views.card import device_of
from budgetsearch.views.tables import card_row

PROCESS_PEAK = "peak of the process"
CARD_PEAK = "peak of the card"
MEANING = (
    f"The {PROCESS_PEAK} is the most that the worker held while it measured or trained, with everything "
    f"that trained at once: by its own counter, so it misses nothing. The {CARD_PEAK} is the most that all "
    "processes together held at a look of NVML, five times a second; without a card there is none."
)


@dataclass(frozen=True)
class Peaks:
    """Of the whole run; None: not measured."""

    process_bytes: int | None
    """The most that the worker process held in any job."""
    card_bytes: int | None
    """The most that all processes together held on the card; None without a card."""


def peaks_of(history: History) -> Peaks:
    """Both peaks, each from what measures it and from nothing else."""
    own = [result.peak_bytes for _, result in history.results]
    own += [trial.peak_bytes for trial in history.trials.values()]
    own += [calibration.peak_bytes for calibration in history.calibrations.values()]
    row = card_row(history)
    watched = row.peak_bytes if row else 0
    if device_of(history) == "cpu":  # there the watcher looks at the same process, only less often
        return Peaks(max([*own, watched], default=0) or None, None)
    return Peaks(max(own, default=0) or None, watched or None)
