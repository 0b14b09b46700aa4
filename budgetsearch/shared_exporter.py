"""The exporter where checkpoints lie behind a URL: it fetches what the adapter is made from.

Of the best checkpoint the adapter's files are copied into the run folder; what training needs to go on stays
in the store. Not more than that one copy is kept.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from budgetsearch.checkpoint_store import ONCE, CheckpointStore
from budgetsearch.core.errors import CheckpointError, DiskError, UnreadableError
from budgetsearch.core.history import History
from budgetsearch.core.trial_state import TrialState
from budgetsearch.exporter import AdapterExporter, is_spare
from budgetsearch.shared import folder_of, open_store, url_of
from budgetsearch.training import sums

LOGGER = logging.getLogger("budgetsearch.shared")
COPIED = (*sums.ADAPTER_FILES, sums.META_FILE)
"""Of a checkpoint: what an adapter is made from, and its sums."""
PAUSE_SECONDS = 60.0
"""So long a store that did not answer is not swept: the driver has other things to do than wait for it."""


def exporter_for(exporter: AdapterExporter, shared: str | None) -> AdapterExporter | SharedExporter:
    """The exporter of a run whose checkpoints lie where ``shared`` says: the run's own place.

    Raises:
        SettingsError: no package here knows the URL's protocol.
    """
    if url := url_of(shared):
        return SharedExporter(exporter, open_store(url))
    folder = folder_of(shared)
    return exporter if folder is None else replace(exporter, checkpoint_path=folder)


@dataclass
class SharedExporter:
    """Exports from copies; implements the driver's ``Exporter``."""

    inner: AdapterExporter
    store: CheckpointStore
    clock: Callable[[], float] = time.monotonic
    _unswept_until: float = -math.inf
    """The store is left alone until then: it did not answer."""

    @property
    def target(self) -> Path:
        """Where the adapter stands."""
        return self.inner.target

    def with_tokenizer(self, folder: Path) -> SharedExporter:
        """The same, with the tokenizer's files from another folder."""
        return replace(self, inner=self.inner.with_tokenizer(folder))

    def export(self, history: History, state: TrialState, *, final: bool) -> str:
        """Put the trial's best checkpoint on disk as a PEFT adapter; returns its path.

        Raises:
            CheckpointError: what it would be made from is missing or damaged; the adapter stays as it is.
            UnreadableError: that cannot be read now.
            DiskError: it cannot be written; the adapter stays as it is.
        """
        self._fetch(state)
        return self.inner.export(history, state, final=final)

    def damage(self, state: TrialState) -> str:
        """What is wrong with that from which the trial's adapter would be made; nothing if it is whole.

        Raises:
            UnreadableError: the store does not answer now.
        """
        try:
            self._fetch(state)
        except CheckpointError as error:
            return str(error)
        return self.inner.damage(state)

    def stands(self, checkpoint: str) -> bool:
        """Whether the exported adapter is whole and was made from this checkpoint.

        Raises:
            UnreadableError: it cannot be read now.
        """
        return self.inner.stands(checkpoint)

    def missing(self, names: Iterable[str]) -> Mapping[str, str]:
        """Which of these checkpoints are obviously not whole, and why; sums are not looked at. Of a store
        that does not answer now nothing is said."""
        try:
            return self.store.flaws(names)
        except UnreadableError as error:
            LOGGER.warning("Whether all checkpoints are there is not known. %s", error)
            return {}

    def sweep(self, history: History) -> None:
        """Remove the checkpoints that nothing needs from the store, and all copies but the best one's."""
        best = history.incumbent
        for path in self._copies():
            if best is None or path.name != best.best_checkpoint:
                shutil.rmtree(path, ignore_errors=True)
        if self.inner.keep_checkpoints or self.clock() < self._unswept_until:
            return
        spare, store = is_spare(history), replace(self.store, patience=ONCE)
        try:
            for name in store.names():
                if spare(name):
                    store.remove(name)
        except DiskError as error:
            self._unswept_until = self.clock() + PAUSE_SECONDS
            LOGGER.warning("Checkpoints that nothing needs are still there. %s", error)

    def _copies(self) -> list[Path]:
        folder = self.inner.checkpoint_path
        return list(folder.iterdir()) if folder.is_dir() else []

    def _fetch(self, state: TrialState) -> None:
        """Copy what the trial's adapter is made from, unless that is the exported one itself."""
        name = state.best_checkpoint
        if state.exported is not None and state.exported.checkpoint == name:
            return
        copy = self.inner.checkpoint_path / str(name)
        try:
            sums.check(copy, sums.ADAPTER_FILES)
        except (CheckpointError, UnreadableError):
            shutil.rmtree(copy, ignore_errors=True)
            self.store.get(str(name), copy, COPIED)
