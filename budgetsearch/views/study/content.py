"""What a study holds of a run: compared with the history, and the difference written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.views.study import shown_trial
from budgetsearch.views.study.storage import one_transaction

TOGETHER = 25
"""So many trials are written in one transaction: nobody waits long for the lock."""


class Stopped(Exception):
    """Whoever called has no more time."""


class Contradiction(Exception):
    """The study says what the ledger does not."""


@dataclass
class _Known:
    """State of one trial in the study."""

    number: int
    storage_id: int
    attrs: dict[str, Any] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)
    constrained: bool = False


class StudyContent:
    """The trials of one run in an open study."""

    def __init__(self, storage: Any, name: str, history: History) -> None:
        """Open the study, made where it is not there, and take stock of it.

        Raises:
            Contradiction: it has what the ledger does not, or has it otherwise.
        """
        import optuna

        self._storage = storage
        self.study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="minimize",
            # Nothing is sampled here, so the sampler is one that does not look at the trials.
            sampler=optuna.samplers.RandomSampler(seed=0),
            load_if_exists=True,
        )
        self._known: dict[int, _Known] = {}
        self._told: set[int] = set()
        for frozen in self.study.get_trials(deepcopy=False):
            # Without a number of ours it is somebody else's.
            if "trial_id" in frozen.user_attrs and frozen.state.name != "WAITING":
                self._take(frozen, history)

    @property
    def numbers(self) -> dict[int, int]:
        """Optuna's number of each trial."""
        return {trial_id: known.number for trial_id, known in self._known.items()}

    def follow(self, history: History, stopped: Callable[[], bool]) -> None:
        """Ask of each trial what the history says now, and write the difference.

        Raises:
            Stopped: between two transactions, for ``stopped`` says so.
        """
        if history.plan is None:
            return
        self._describe(history)
        open_ = [state for number, state in sorted(history.trials.items()) if number not in self._told]
        for first in range(0, len(open_), TOGETHER):
            if stopped():
                raise Stopped
            with one_transaction(self._storage):
                self._write(open_[first : first + TOGETHER], history)

    def _take(self, frozen: Any, history: History) -> None:
        trial_id = frozen.user_attrs["trial_id"]
        state = history.trials.get(trial_id)
        if state is None or trial_id in self._known or not _agrees(frozen, state, history):
            raise Contradiction(f"its trial {frozen.number} is not what the ledger says")
        if frozen.state.is_finished():
            self._told.add(trial_id)
        self._known[trial_id] = _Known(
            frozen.number,
            frozen._trial_id,
            dict(frozen.user_attrs),
            dict(frozen.intermediate_values),
            bool(frozen.constraints),
        )

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
        known = self.study.user_attrs
        if not known:
            self.study.set_metric_names([shown_trial.LOSS])
        for key, value in shown_trial.study_attributes(history, history.plan).items():
            if known.get(key) != value:
                self.study.set_user_attr(key, value)

    # ------------------------------------------------------------------------- one trial

    def _create(self, state: TrialState, history: History) -> None:
        """Add a trial with all that is known of it, and its real times."""
        # `Study.add_trial` does the same and does not say which number it gave; to ask takes a look at all.
        storage, whole = self.study._storage, shown_trial.whole_trial(state, history)
        storage_id = storage.create_new_trial(self.study._study_id, template_trial=whole)
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
        known, storage = self._known[state.trial_id], self.study._storage
        for step, value in shown_trial.values(state, history).items():
            if not _close(known.values.get(step), value):
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

        live = optuna.trial.Trial(self.study, known.storage_id)
        live.set_constraint(shown_trial.CONSTRAINT, shown_trial.INFEASIBLE)
        legacy = [shown_trial.INFEASIBLE]
        live.storage.set_trial_system_attr(known.storage_id, shown_trial.LEGACY, legacy)
        known.constrained = True

    def _tell(self, state: TrialState, winning: set[int]) -> None:
        """End a trial as Optuna's ``tell`` does after reading all of it; a pruned one has its last loss."""
        import optuna

        known, end = self._known[state.trial_id], shown_trial.end_of(state, winning)
        value = shown_trial.value_of(end, state, known.values)
        self.study._storage.set_trial_state_values(
            known.storage_id, optuna.trial.TrialState[end], None if value is None else [value]
        )
        self._told.add(state.trial_id)


def _agrees(frozen: Any, state: TrialState, history: History) -> bool:
    """Tell whether a trial can be brought level by writing what it lacks."""
    losses = shown_trial.values(state, history) if history.plan else {}
    known = frozen.intermediate_values
    if not all(_same(value, state.trial.params.get(key)) for key, value in frozen.params.items()):
        return False
    if not known.keys() <= losses.keys():
        return False
    if not frozen.state.is_finished():
        return True
    won = state.trial_id in shown_trial.winners(history)
    return (
        (shown_trial.is_over(history) or shown_trial.is_settled(state, history))
        and all(_close(value, known.get(step)) for step, value in losses.items())
        and (frozen.state.name == "COMPLETE") == won
        and (not won or _close(frozen.value, state.best_loss))
    )


def _same(one: Any, other: Any) -> bool:
    return _close(one, other) if isinstance(one, float) and isinstance(other, float) else bool(one == other)


def _close(one: float | None, other: float | None) -> bool:
    """The same number, as far as databases keep it."""
    return one is not None and other is not None and math.isclose(one, other, rel_tol=1e-6)
