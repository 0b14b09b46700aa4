"""A disk for simulated runs: it has the checkpoints that were written, and some of them break."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from pathlib import Path

from budgetsearch.core.errors import CheckpointError
from budgetsearch.core.history.history import History
from budgetsearch.core.history.retention import needed_checkpoints
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.records import Segment
from budgetsearch.run.driver import Driver
from tests.support.simulation import make_driver
from tests.support.worlds import SyntheticWorld


class SimDisk:
    """The driver's exporter over names instead of folders; after each job some of them are damaged."""

    def __init__(self, rot: float = 0.0, seed: int = 0, damaged: Iterable[str] = ()) -> None:
        self.rng, self.rot, self.damaged = random.Random(f"rot/{seed}"), rot, set(damaged)
        self.whole: dict[str, bool] = {}
        self.adapter: tuple[str, bool] | None = None
        self.peak = 0
        self._seen = 0

    def loses(self, segment: Segment) -> bool:
        """Whether the checkpoint that it starts from is missing or damaged."""
        return not self.whole.get(str(segment.checkpoint_in))

    def export(self, history: History, state: TrialState, *, final: bool) -> str:
        """See the port."""
        self._notice(history)
        if why := self.damage(state):
            raise CheckpointError(why)
        self.adapter = (str(state.best_checkpoint), True)
        return "adapter"

    def damage(self, state: TrialState) -> str:
        """See the port."""
        name = str(state.best_checkpoint)
        if state.exported is not None and state.exported.name == name:
            return "" if self.stands(name) else "the adapter is damaged"
        return "" if self.whole.get(name) else "it is damaged"

    def stands(self, checkpoint: str) -> bool:
        """See the port."""
        return self.adapter == (checkpoint, True)

    def missing(self, names: Iterable[str]) -> dict[str, str]:
        """See the port."""
        return {name: "it is missing" for name in names if name not in self.whole}

    def sweep(self, history: History) -> None:
        """Remove as the real one does, then let the disk rot."""
        self._notice(history)
        self.peak = max(self.peak, len(self.whole))
        needed = needed_checkpoints(history)
        self.whole = {name: well for name, well in self.whole.items() if name in needed}
        for name in self.whole:
            if self.rng.random() < self.rot:
                self.whole[name] = False
        if self.adapter is not None and self.rng.random() < self.rot:
            self.adapter = (self.adapter[0], False)

    def _notice(self, history: History) -> None:
        """What the jobs have written since the last look."""
        for _, result in history.results[self._seen :]:
            if result.checkpoint_out and result.checkpoint_out not in self.whole:
                self.whole[result.checkpoint_out] = result.checkpoint_out not in self.damaged
        self._seen = len(history.results)


def driver_on(
    path: Path | None, disk: SimDisk, world: SyntheticWorld | None = None, **more: object
) -> Driver:
    """A driver on virtual time whose checkpoints lie on this disk; without a path its ledger is in memory."""
    world = world or SyntheticWorld()
    world.loses = disk.loses
    return dataclasses.replace(make_driver(path, world, **more), exporter=disk)  # type: ignore[arg-type]
