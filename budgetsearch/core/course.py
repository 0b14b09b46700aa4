"""How a gang trained: the passes of its members side by side, so that a job can be repeated exactly."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stint:
    """So many passes of the same trials side by side: a gang from one change of its members to the next."""

    trial_ids: tuple[int, ...]
    """In their order in the batch."""
    micro_batches: tuple[int, ...]
    """Those of each, in the steps that begin here; 0: one row after the other."""
    passes: int
    cut: bool = False
    """Whether memory ran out, or nearly, after these passes: steps that were not complete were given up."""
    plain: bool = True
    """Whether some passes could still go without the gradient checkpointing of the others."""
