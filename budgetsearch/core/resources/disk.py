"""Bytes on disk: what a run may need at most, what it cannot do without, and what to keep on a small disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from budgetsearch.core.ladders import FINALISTS_SHARE
from budgetsearch.core.plan import Plan

CHECKPOINT_BYTES = 16
"""Of one adapter weight in a checkpoint, at most: fp32 for PEFT (the average), for training and for the
optimizer's two states."""
EXPORT_BYTES = 4
"""Of one adapter weight in the exported adapter."""
FILES_BYTES = 64 * 2**10
"""Of a checkpoint beside its tensors: configuration, sums, headers, what a file system rounds up."""
SPARES = 4
"""Beside the checkpoints to go on from: the best adapter, what takes its place if it breaks (of the same
trial and of another one), and the full run's last but one."""
RUNNERS_UP = 2
"""So many trials behind the promoted ones keep their checkpoint at the least."""
RECORDS_BYTES = 4 * 2**20
"""Ledger, study, logs and report of a run that has just begun: an allowance, not measured."""
RECORDS_BYTES_PER_SECOND = 1024
"""What they grow by: an allowance that is several times a heartbeat every two seconds."""
USUAL_CHECKPOINTS = 8
"""What most runs come to, and what is recommended."""
LEAST_CHECKPOINTS = 4
"""Without room for these no run gets anywhere: the best, the one that a trial starts from, the one that it
writes, and one to choose from."""


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of a run folder, as if every trial had the largest rank."""

    checkpoint: int
    """One checkpoint."""
    adapter: int
    """The exported adapter with its tokenizer; while it is replaced it is there twice."""
    records: int
    """Ledger, study, logs, report."""
    held: int
    """Trials that wait and keep a checkpoint, at most."""
    gang: int
    """Trials that write a checkpoint at once, at most."""

    def bytes(self, held: int) -> int:
        """An upper bound with so many trials that wait."""
        return most_checkpoints(held, self.gang) * self.checkpoint + self._rest

    @property
    def most(self) -> int:
        """What the run may need at most."""
        return self.bytes(self.held)

    @property
    def usual(self) -> int:
        """What a run of few rungs and small gangs needs."""
        return min(self.most, USUAL_CHECKPOINTS * self.checkpoint + self._rest)

    @property
    def least(self) -> int:
        """What it cannot do without."""
        return LEAST_CHECKPOINTS * self.checkpoint + self._rest

    @property
    def _rest(self) -> int:
        return 2 * self.adapter + self.records

    def affordable(self, free: int) -> int:
        """How many trials that wait may keep a checkpoint on a disk with so much room: one at the least."""
        room = (free - self._rest) // max(1, self.checkpoint) - SPARES - self.gang
        return max(1, min(self.held, room))

    def as_json(self) -> Mapping[str, int]:
        """Plain JSON values, the sums included."""
        return {
            "most_bytes": self.most,
            "least_bytes": self.least,
            "checkpoint_bytes": self.checkpoint,
            "checkpoints_at_most": most_checkpoints(self.held, self.gang),
            "adapter_bytes": self.adapter,
            "records_bytes": self.records,
        }


def most_checkpoints(held: int, gang: int) -> int:
    """How many can be on disk at once: of trials that wait or run, the spares, and those being written."""
    return held + SPARES + gang


def most_held(*, eta: int, top_rung: int, full_runs: float, workers: int = 1) -> int:
    """How many trials that wait may keep a checkpoint: a group at the first rung, and at each rung those that
    may still take the place of a promoted one. ``full_runs``: so many fit into the budget of one worker."""
    return eta + max(1, top_rung) * (runners_up(full_runs, workers) + 2)


def runners_up(full_runs: float, workers: int = 1) -> int:
    """So many trials behind the promoted ones keep their checkpoint, in case those fail: what is left at the
    end goes to them, on every worker."""
    further = max(1, math.ceil(FINALISTS_SHARE * full_runs))
    return max(RUNNERS_UP, int(full_runs)) + (workers - 1) * further


def held_of(plan: Plan, affordable: int) -> int:
    """The same for a plan, and no more than the disk has room for."""
    runs = plan.budget_seconds / plan.full_seconds
    most = most_held(eta=plan.eta, top_rung=plan.top_rung, full_runs=runs, workers=plan.workers)
    return min(affordable, most)


def need_of(
    weights: int,
    *,
    tokenizer_bytes: int,
    budget_seconds: float,
    held: int,
    gang: int,
) -> DiskNeed:
    """The need of a run whose largest adapter has so many weights."""
    return DiskNeed(
        checkpoint=CHECKPOINT_BYTES * weights + FILES_BYTES,
        adapter=EXPORT_BYTES * weights + FILES_BYTES + tokenizer_bytes,
        records=RECORDS_BYTES + int(RECORDS_BYTES_PER_SECOND * budget_seconds),
        held=held,
        gang=gang,
    )
