"""The Optuna study that dashboards show: a view of the ledger, never read back by the search.

Each configuration is one Optuna trial. Whatever happens, the mirror asks of a trial what the history
says of it now and writes the difference, so that catching up after a crash and following along are
the same thing.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budgetsearch.core.events import Charged, Closed, Decided, Entry, Heartbeat
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.views.study import shown_trial
from budgetsearch.views.study.damage import (
    CONTRADICTS,
    DAMAGED,
    OTHER_VERSION,
    Contradiction,
    check_trial,
    check_whole,
    close,
    damage,
    put_aside,
    reason,
)
from budgetsearch.views.study.distributions import quiet
from budgetsearch.views.study.showcase import Showcase
from budgetsearch.views.study.storage import (
    check_url,
    close_storage,
    connectable,
    hidden,
    make_file,
    one_transaction,
    open_storage,
)
from budgetsearch.views.study.storage import shown as shown_url

LOGGER = logging.getLogger("budgetsearch.study")
RETRY_SECONDS = 60.0
"""A storage that failed is left alone for so long at most: each attempt may take seconds."""
FIRST_RETRY_SECONDS = 1.0
"""After the first failure; each further one doubles it."""
MOST_MENDS = 3
"""So often a process makes the study anew; a fault that comes again and again is not the file's."""
TOGETHER = 25
"""So many trials are written in one transaction: nobody waits long for the lock."""
SILENT = (Heartbeat, Charged, Decided)
"""Events that change nothing in the study."""
INCOMPLETE = (
    "The Optuna study is not complete; the ledger is. `budgetsearch resume` of this run brings it level."
)
KINDS = {
    DAMAGED: "it is damaged",
    OTHER_VERSION: "another version of Optuna made it",
    CONTRADICTS: "it contradicts the ledger",
}


class _Stopped(Exception):
    """Whoever called has no more time."""


@dataclass
class _Known:
    """What the study has of one trial."""

    number: int
    storage_id: int
    attrs: dict[str, Any] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)
    constrained: bool = False


class StudyMirror:
    """Brings a persisted Optuna study level with a history; implements the port ``Watcher``.

    A storage that fails is no reason to stop a search: there is one warning, and the mirror catches
    up later. It writes when it is called, which takes as long as the storage takes: in a search a
    ``Follower`` calls it, from a thread of its own.
    """

    def __init__(
        self,
        storage: Any,
        study_name: str,
        own: Path | None = None,
        stopped: Callable[[], bool] = lambda: False,
        showcase: Showcase | None = None,
    ) -> None:
        """Nothing is opened yet.

        ``storage``: a URL, or a storage of Optuna's, which stays open. ``own``: the study's file, if it is
        the run's and nobody else's: a damaged one is put aside and made again. ``stopped``: whether to give
        up between two transactions. ``showcase``: what is shown beside the trials.

        Raises:
            SettingsError: the URL is none that Optuna understands.
        """
        self._url, self._shown = "", "in memory"
        self._lent = None if isinstance(storage, str) else storage
        if isinstance(storage, str):
            check_url(storage)
            self._url, self._shown = connectable(storage), shown_url(storage)
        self._name, self._own = study_name, own
        self._showcase = showcase or Showcase(None)
        self.stopped = stopped
        self._storage: Any = None
        self._study: Any = None
        self._file: tuple[int, int] | None = None
        self._known: dict[int, _Known] = {}
        self._told: set[int] = set()
        self.level = False
        """Whether the study has all of the last history that it was given."""
        self._generation = 1
        self._mends, self._mending = 0, False
        self._warned = False
        self._failures = 0
        self._longest_pause = RETRY_SECONDS
        self._retry_at = 0.0

    def see(self, entry: Entry, history: History) -> None:
        """Bring the study level with an event."""
        if isinstance(entry.event, SILENT):
            return
        if isinstance(entry.event, Closed):
            self._retry_at = 0.0
        self.catch_up(history)
        if isinstance(entry.event, Closed) and not self.level:
            LOGGER.warning(INCOMPLETE)

    def catch_up(self, history: History) -> None:
        """Bring the study level with all of the history; does nothing where it is level already, or where
        the storage failed a moment ago."""
        if self.pause > 0:
            return
        try:
            self._attempt(history)
        except _Stopped:
            self._let_go()
        except Exception as error:
            # Any database, driver or network can stand behind the URL, so any error can come.
            self._let_go()
            if self._mend(error):
                self._attempt_again(history)
            else:
                self._postpone(error)

    @property
    def pause(self) -> float:
        """Seconds until the storage is tried again; 0: now."""
        return max(0.0, self._retry_at - time.monotonic())

    def hurry(self, longest_pause: float) -> None:
        """Try again now, and then often: little time is left."""
        self._retry_at, self._longest_pause = 0.0, longest_pause

    def close(self) -> None:
        """Close every connection; ``catch_up`` opens them again."""
        self._let_go()

    # ----------------------------------------------------------------------- failures

    def _attempt(self, history: History) -> None:
        with quiet():
            if self._file is not None and self._file != self._identity():
                self._let_go()  # the file was deleted, or another one put in its place
            if self._study is None:
                self._connect(history)
            if not self.level:
                self._compare(history)
            self._follow(history)
        if self._warned:
            LOGGER.warning("The Optuna study %s is level with the ledger again.", self._shown)
        self.level, self._warned, self._failures = True, False, 0

    def _attempt_again(self, history: History) -> None:
        try:
            self._attempt(history)
        except _Stopped:
            self._let_go()
        except Exception as error:
            self._let_go()
            self._postpone(error)

    def _postpone(self, error: Exception) -> None:
        pause = FIRST_RETRY_SECONDS * 2.0 ** min(self._failures, 10)
        self._failures += 1
        self._retry_at = time.monotonic() + min(pause, self._longest_pause, RETRY_SECONDS)
        if not self._warned:
            why = hidden(reason(error), self._url)
            LOGGER.warning(
                "Optuna study %s: %s. The search goes on without it; the study is brought level when that "
                "works again.",
                self._shown,
                why,
            )
        self._warned = True

    def _mend(self, error: Exception) -> bool:
        """Make room for a study that is made again from the ledger, and say so; False where that is no help.

        The run's own file is put aside. A storage that others use keeps what it has: there the study gets a
        new name.
        """
        why = damage(error)
        if not why or self._mends == MOST_MENDS:
            return False
        if self._own is not None and self._own.exists():
            try:
                aside = put_aside(self._own, why)
            except OSError:
                return False
            what = f"It is kept as {aside.name}, and made again from the ledger"
        elif self._own is None and why == CONTRADICTS:
            self._generation += 1
            what = f"It stays as it is, and {self._numbered()} is made from the ledger"
        else:
            return False
        self._mends, self._mending = self._mends + 1, True
        text = hidden(reason(error), self._url)
        LOGGER.warning("The Optuna study %s: %s (%s). %s.", self._shown, KINDS[why], text, what)
        return True

    def _let_go(self) -> None:
        """Forget the study and all that was known of it: the next attempt looks anew."""
        self.level = False
        storage, self._storage, self._study, self._file = self._storage, None, None, None
        self._known, self._told = {}, set()
        if storage is not None and self._lent is None:
            close_storage(storage)

    # ------------------------------------------------------------------------- the study

    def _connect(self, history: History) -> None:
        import optuna

        missing = self._own is not None and not (self._own.exists() and self._own.stat().st_size)
        if self._own is not None and missing:
            make_file(self._own)
        self._storage = open_storage(self._url) if self._lent is None else self._lent
        if self._own is not None:
            check_whole(self._storage)
        self._file = self._identity()
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=self._current_name(),
            direction="minimize",
            # Nothing is sampled here, so the sampler is one that does not look at the trials.
            sampler=optuna.samplers.RandomSampler(seed=0),
            load_if_exists=True,
        )
        if missing and history.trials and not self._mending and not self._warned:
            LOGGER.warning(
                "The Optuna study %s was not there: it is made again from the ledger.", self._shown
            )
        self._mending = False

    def _current_name(self) -> str:
        """The last of the names that the run's study has had in a storage that others use too."""
        while self._own is None and self._holds(self._numbered(1)):
            self._generation += 1
        return self._numbered()

    def _numbered(self, further: int = 0) -> str:
        number = self._generation + further
        return self._name if number == 1 else f"{self._name}-{number}"

    def _holds(self, name: str) -> bool:
        try:
            self._storage.get_study_id_from_name(name)
        except KeyError:
            return False
        return True

    def _identity(self) -> tuple[int, int] | None:
        if self._own is None or not self._own.exists():
            return None
        found = os.stat(self._own)
        return found.st_dev, found.st_ino

    def _compare(self, history: History) -> None:
        """Take stock of what the study has.

        Raises:
            Contradiction: it has what the ledger does not, or has it otherwise.
        """
        self._known, self._told = {}, set()
        winning = shown_trial.winners(history)
        for frozen in self._study.get_trials(deepcopy=False):
            trial_id = frozen.user_attrs.get("trial_id")
            if trial_id is None or frozen.state.name == "WAITING":
                continue  # somebody else's
            state = history.trials.get(trial_id)
            values = shown_trial.values(state, history) if state and history.plan else {}
            check_trial(frozen, state, values)
            assert state is not None
            if trial_id in self._known:
                raise Contradiction(f"trials {self._known[trial_id].number} and {frozen.number} are the same")
            if frozen.state.is_finished():
                _check_end(frozen, state, history, winning)
                self._told.add(trial_id)
            self._known[trial_id] = _Known(
                frozen.number,
                frozen._trial_id,
                dict(frozen.user_attrs),
                dict(frozen.intermediate_values),
                bool(frozen.constraints),
            )

    def _follow(self, history: History) -> None:
        """Ask of each trial what the history says now, and write the difference."""
        if history.plan is None:
            return
        self._describe(history)
        open_ = [state for number, state in sorted(history.trials.items()) if number not in self._told]
        for first in range(0, len(open_), TOGETHER):
            if self.stopped():
                raise _Stopped
            with one_transaction(self._storage) if self._lent is None else nullcontext():
                self._write(open_[first : first + TOGETHER], history)
        if shown_trial.is_over(history) and self._own is not None:
            check_whole(self._storage)
        numbers = {trial_id: known.number for trial_id, known in self._known.items()}
        self._showcase.show(self._study, numbers, history)

    def _write(self, states: Sequence[TrialState], history: History) -> None:
        winning = shown_trial.winners(history)
        for state in states:
            if state.trial_id not in self._known:
                self._create(state, history)
                continue
            self._note(state, history)
            if shown_trial.has_ended(state, history):
                self._tell(state, winning)

    def _describe(self, history: History) -> None:
        assert history.plan is not None
        known = self._study.user_attrs
        if not known:
            self._study.set_metric_names([shown_trial.LOSS])
        for key, value in shown_trial.study_attributes(history, history.plan).items():
            if known.get(key) != value:
                self._study.set_user_attr(key, value)

    # ------------------------------------------------------------------------- one trial

    def _create(self, state: TrialState, history: History) -> None:
        """Add a trial with all that is known of it, and its real times."""
        # `Study.add_trial` does the same and does not say which number it gave; to ask takes a look at all.
        storage, whole = self._study._storage, shown_trial.whole_trial(state, history)
        storage_id = storage.create_new_trial(self._study._study_id, template_trial=whole)
        self._known[state.trial_id] = _Known(
            storage.get_trial_number_from_id(storage_id),
            storage_id,
            dict(whole.user_attrs),
            dict(whole.intermediate_values),
            shown_trial.infeasible(state),
        )
        if shown_trial.has_ended(state, history):
            self._told.add(state.trial_id)

    def _note(self, state: TrialState, history: History) -> None:
        """Write the attributes, values and constraints that the study does not have yet."""
        known, storage = self._known[state.trial_id], self._study._storage
        for step, value in shown_trial.values(state, history).items():
            if not close(known.values.get(step), value):
                storage.set_trial_intermediate_value(known.storage_id, step, value)
                known.values[step] = value
        if shown_trial.infeasible(state) and not known.constrained:
            self._constrain(known)
        for key, value in shown_trial.attributes(state, history).items():
            if known.attrs.get(key) != value:
                storage.set_trial_user_attr(known.storage_id, key, value)
                known.attrs[key] = value

    def _constrain(self, known: _Known) -> None:
        import optuna

        live = optuna.trial.Trial(self._study, known.storage_id)
        live.set_constraint(shown_trial.CONSTRAINT, shown_trial.INFEASIBLE)
        legacy = [shown_trial.INFEASIBLE]
        live.storage.set_trial_system_attr(known.storage_id, shown_trial.LEGACY, legacy)
        known.constrained = True

    def _tell(self, state: TrialState, winning: set[int]) -> None:
        end = shown_trial.end_of(state, winning)
        self._end(state.trial_id, end, state.best_loss if end == "COMPLETE" else None)
        self._told.add(state.trial_id)

    def _end(self, trial_id: int, state: str, value: float | None = None) -> None:
        """What Optuna's ``tell`` does after reading all of the trial; a pruned one has its last loss."""
        known = self._known[trial_id]
        if state == "PRUNED" and known.values:
            value = known.values[max(known.values)]
        values = None if value is None else [value]
        self._study._storage.set_trial_state_values(known.storage_id, _state(state), values)


def _check_end(frozen: Any, state: TrialState, history: History, winning: set[int]) -> None:
    """Compare a trial that was told with what would be told now.

    Raises:
        Contradiction: they differ.
    """
    name = f"trial {frozen.number}"
    if not shown_trial.is_over(history) and not shown_trial.is_settled(state, history):
        raise Contradiction(f"{name} has ended, but may still go on")
    won = state.trial_id in winning
    if (frozen.state.name == "COMPLETE") != won or (won and not close(frozen.value, state.best_loss)):
        raise Contradiction(f"{name} has another end")


def _state(name: str) -> Any:
    import optuna

    return optuna.trial.TrialState[name]
