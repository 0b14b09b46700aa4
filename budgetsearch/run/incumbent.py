"""What the driver does about adapters and checkpoints: keep the best on disk, and notice what broke.

A checkpoint that turns out to be damaged is recorded and the next best takes its place, as long as there is
one. One that cannot be read now keeps its place: it is tried again, and nothing is given up for it. A disk
without room is told and swept, and the driver goes on with what stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from budgetsearch.core.errors import CheckpointError, DiskError, UnreadableError
from budgetsearch.core.events import CheckpointLost, Event, Exported, Noticed
from budgetsearch.core.history.history import History
from budgetsearch.core.history.retention import needed_checkpoints
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.ports import Exporter

MAX_UNWRITTEN = 2
"""So many jobs in a row may find no room for a checkpoint: between them the disk is swept."""

TRIED_AGAIN = "The run goes on; its end tries again."
"""What is said where there is no room for a better adapter in the middle of a run."""

STANDS = (
    "The best trial's adapter stands there already, whole, from an earlier export: the run ends with it. "
    "Only its card and budgetsearch.json lack the final scores; `budgetsearch report` has them."
)
"""What to say where the end of a run cannot write its adapter once more."""


@dataclass
class Incumbent:
    """The best adapter on disk and the checkpoints behind it; whatever it finds stands in the ledger."""

    exporter: Exporter
    record: Callable[[Event], None]
    history: Callable[[], History]

    def look_round(self) -> None:
        """Before a run goes on: whether every checkpoint that it needs is there, and as long as it was."""
        for name, why in sorted(self.exporter.missing(needed_checkpoints(self.history())).items()):
            done = self.history().exported
            mine = done is not None and done.checkpoint == name
            self.record(CheckpointLost(name, why, exported=mine and not self._may_stand(name)))

    def best(self) -> TrialState | None:
        """The best trial of which a whole adapter exists, in a checkpoint or already exported; None as well
        if that cannot be read now."""
        while (best := self.history().incumbent) is not None:
            try:
                why = self.exporter.damage(best)
            except UnreadableError as error:
                self.record(Noticed(str(error)))
                return None
            if not why:
                return best
            self._lose(best, why)
        return None

    def export(self, *, final: bool) -> TrialState | None:
        """Put the best adapter in its place; returns whose it is, None if nothing is left to export.

        At the end an adapter that was exported from the same checkpoint before, and is whole, will do.

        Raises:
            DiskError: there is no room for it, even after a sweep, or it cannot be read now.
        """
        swept = False
        while (best := self.history().incumbent) is not None:
            try:
                path = self.exporter.export(self.history(), best, final=final)
            except CheckpointError as error:
                self._lose(best, str(error))
            except DiskError as error:
                if not swept and not isinstance(error, UnreadableError):  # to which room would not help
                    self.sweep()
                    swept = True
                    continue
                path = self._standing(best) if final else ""
                if not path:
                    raise
                what = f"The adapter cannot be written once more ({error.__cause__ or error})."
                self.record(Noticed(f"{what} {STANDS}"))
                return self._told(best, path, final=True)
            else:
                return self._told(best, path, final=final)
        return None

    def _told(self, best: TrialState, path: str, *, final: bool) -> TrialState:
        self.record(Exported(best.trial_id, str(best.best_checkpoint), path, final))
        return best

    def _standing(self, best: TrialState) -> str:
        """Where the best trial's adapter stands already, whole; empty if it does not, or nobody can tell."""
        done = self.history().exported
        try:
            whole = done is not None and self.exporter.stands(str(best.best_checkpoint))
        except UnreadableError:
            return ""
        return done.path if done is not None and whole else ""

    def export_meanwhile(self) -> None:
        """The same in the middle of a run: if there is no room now, the end of the run tries again."""
        try:
            self.export(final=False)
        except DiskError as error:
            self.record(Noticed(f"{error} {TRIED_AGAIN}"))

    def sweep(self) -> None:
        """Remove what nothing needs."""
        self.exporter.sweep(self.history())

    def check_disk(self) -> None:
        """Insist that checkpoints can be written.

        Raises:
            DiskError: the last jobs could not.
        """
        history = self.history()
        if len(history.unwritten) < MAX_UNWRITTEN:
            return
        why = next(r.detail for _, r in reversed(history.results) if r.status == "unwritten")
        done = history.exported
        whole = done is not None and self._may_stand(done.checkpoint)
        stands = f" The best adapter so far is in {done.path}." if done is not None and whole else ""
        raise DiskError(
            f"No checkpoint can be written any more ({why}). Make room or mend the run's folder, then go on "
            f"with `budgetsearch resume`.{stands}"
        )

    def _lose(self, best: TrialState, why: str) -> None:
        name = str(best.best_checkpoint)
        whole = best.exported is None and self._may_stand(name)
        self.record(CheckpointLost(name, why, exported=not whole))

    def _may_stand(self, checkpoint: str) -> bool:
        """Whether nothing is known to be wrong with the adapter that was exported from the checkpoint."""
        try:
            return self.exporter.stands(checkpoint)
        except UnreadableError:
            return True


class NoExport:
    """Nothing is exported, no file can break: for rehearsals and simulations; see the port ``Exporter``."""

    def export(self, history: History, state: TrialState, *, final: bool) -> str:
        """No file is written."""
        return "nowhere"

    def damage(self, state: TrialState) -> str:
        """There is no file to break."""
        return ""

    def stands(self, checkpoint: str) -> bool:
        """There is no adapter."""
        return False

    def missing(self, names: Iterable[str]) -> Mapping[str, str]:
        """There is no file to miss."""
        return {}

    def sweep(self, history: History) -> None:
        """There is nothing to remove."""
