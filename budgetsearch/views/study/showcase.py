"""What the study shows beside its trials: notes, plots and files, rewritten while the run goes.

All of it goes through the public functions of optuna-dashboard and Optuna. Writing costs little on SQLite and
more on a database far away, so it happens when something has changed, and not too often; at the end of a run
nothing is begun after a second, for that second is one of the budget. What is left out then, ``budgetsearch
dashboard`` shows all the same: it makes its own study from the ledger.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from budgetsearch.core.history.history import History
from budgetsearch.views.drawing import Figure
from budgetsearch.views.study import artifacts, notes, plots

LOGGER = logging.getLogger("budgetsearch.study")
EVERY_SECONDS = 30.0
"""Notes and plots are written at most so often while a run goes."""
LAST_SECONDS = 1.0
"""At the end of a run nothing more is begun after so long."""


class Showcase:
    """Writes notes, plots and files of one run into its study, as far as they have changed."""

    def __init__(
        self,
        run: Path | None,
        store: artifacts.Store | None = None,
        every_seconds: float = EVERY_SECONDS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``run``: the folder whose files are shown; ``store``: where links to them are kept, by default in
        the folder itself."""
        self._run, self._store, self._every, self._now = run, store, every_seconds, now
        self.forget()

    def forget(self) -> None:
        """From now on it is another study: nothing stands there yet."""
        self._next_at = 0.0
        self._seen: tuple[Any, ...] | None = None
        self._written: dict[str, str] = {}
        self._files: set[str] | None = None

    def show(self, study: Any, numbers: Mapping[int, int], history: History) -> None:
        """Write what has changed, if it is time to. ``numbers``: Optuna's number of each trial."""
        ends = history.closed is not None
        state = (int(history.spent / max(self._every, 1.0)), *_state(history))
        now = self._now()
        if state == self._seen or (now < self._next_at and not ends):
            return
        for work in self._works(study, numbers, history):
            if ends and self._now() > now + LAST_SECONDS:
                LOGGER.info("notes and plots of the study are not up to date: writing them takes too long")
                return
            work()
        self._seen, self._next_at = state, self._now() + self._every

    def _works(
        self, study: Any, numbers: Mapping[int, int], history: History
    ) -> Iterator[Callable[[], None]]:
        import optuna

        yield partial(self._note, study, notes.study_note(history))
        for state in notes.finalists(history):
            if state.trial_id in numbers:
                storage, number = study._storage, numbers[state.trial_id]
                key = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
                trial = optuna.trial.Trial(study, key)
                yield partial(self._note, trial, notes.trial_note(state, history))
        for draw in plots.PLOTS:
            yield partial(self._plot, study, draw(history))
        if self._run is not None:
            yield partial(self._attach, study, self._run, history)

    def _note(self, about: Any, text: str) -> None:
        """A note that somebody else has begun is left as it is."""
        from optuna_dashboard import get_note, save_note

        key = f"note {getattr(about, 'number', 'study')}"
        if self._written.get(key) == text:
            return
        there = get_note(about)
        if there != text and (not there or notes.ours(there)):
            save_note(about, text)
        self._written[key] = text

    def _plot(self, study: Any, figure: Figure) -> None:
        from optuna_dashboard import save_plotly_graph_object

        text = figure.to_json()
        if self._written.get(figure.name) != text:
            save_plotly_graph_object(study, figure, graph_object_id=figure.name)
            self._written[figure.name] = text

    def _attach(self, study: Any, run: Path, history: History) -> None:
        """A folder in which nothing can be made costs the links to the files, nothing else."""
        try:
            if self._files is None:
                self._files = artifacts.attached(study)
            news = [path for path in artifacts.files_of(run, history) if path.name not in self._files]
            for path in news:
                self._store = self._store or artifacts.FolderLinks(run / "artifacts")
                artifacts.attach(study, self._store, path)
                self._files.add(path.name)
        except OSError as error:
            LOGGER.warning("%s cannot be linked from the study: %s", run, error)
            self._run = None


def _state(history: History) -> tuple[Any, ...]:
    """Collect what notes and plots depend on, but for the seconds that pass."""
    best = history.incumbent
    return (
        len(history.results),
        best and (best.trial_id, best.best_loss),
        tuple(history.full_trials),
        history.exported,
        history.closed,
    )
