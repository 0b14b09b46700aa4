"""The Optuna study that dashboards show: a view of the ledger, never read back by the search.

Each configuration is one Optuna trial. Whatever happens, the mirror asks of a trial what the history
says of it now and writes the difference, so that catching up after a crash and following along are
the same thing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from budgetsearch.core.errors import SettingsError
from budgetsearch.core.events import (
    Charged,
    Closed,
    Decided,
    Entry,
    Heartbeat,
    Planned,
    SegmentEnded,
    SegmentStarted,
    TrialAdded,
)
from budgetsearch.core.history import History, TrialState
from budgetsearch.core.records import Plan
from budgetsearch.core.secrets import without_secrets
from budgetsearch.study import shown_trial
from budgetsearch.study.distributions import quiet
from budgetsearch.study.showcase import Showcase

LOGGER = logging.getLogger("budgetsearch.study")
LOCK_SECONDS = 2.0
"""The search waits so long for a study that somebody else has locked; later it tries again."""
RETRY_SECONDS = 60.0
"""A storage that failed is left alone for so long: each attempt may block for seconds."""
SILENT = (Heartbeat, Charged, Decided)
"""Events that change nothing in the study."""


class StudyMirror:
    """Keeps a persisted Optuna study level with the ledger; implements the port ``Watcher``.

    A storage that fails is no reason to stop a search: there is one warning, and the mirror catches
    up at the next event that works.
    """

    def __init__(self, storage: Any, study_name: str, showcase: Showcase | None = None) -> None:
        """Open or make the study in ``storage``: a URL, or a storage of Optuna's.

        ``showcase``: what is shown beside the trials.

        Raises:
            SettingsError: the URL is none that Optuna understands.
        """
        self._url, self._name = storage, study_name
        self._study: Any = None
        self._numbers: dict[int, int] = {}
        self._attrs: dict[int, dict[str, Any]] = {}
        self._told: set[int] = set()
        self._level = False
        self._warned = False
        self._retry_at = 0.0
        self._shown = without_password(storage) if isinstance(storage, str) else "in memory"
        self._showcase = showcase or Showcase(None)
        self._guarded(self._connect)

    def see(self, entry: Entry, history: History) -> None:
        """Bring the study level with an event."""
        event = entry.event
        if isinstance(event, SILENT):
            return
        if isinstance(event, Closed):
            self._retry_at = 0.0
        if not self._level:
            self.catch_up(history)
        elif isinstance(event, (TrialAdded, SegmentStarted, SegmentEnded)):
            self._guarded(lambda: self._follow([history.trials[_trial_of(event)]], history))
        elif isinstance(event, (Planned, Closed)):
            self._guarded(lambda: self._follow(history.trials.values(), history))
        if isinstance(event, Closed) and not self._level:
            LOGGER.warning("The Optuna study is not complete; the ledger is. `resume` brings it level.")

    def catch_up(self, history: History) -> None:
        """Bring the study level with all of the history; does nothing where it is level already."""
        self._guarded(lambda: self._catch_up(history))

    # ------------------------------------------------------------------------- the study

    def _guarded(self, work: Callable[[], None]) -> None:
        if time.monotonic() < self._retry_at:
            return
        try:
            with quiet():
                work()
        except Exception as error:
            # Any database, driver or network can stand behind the URL, so any error can come.
            self._level = False
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if not self._warned:
                why = without_secrets(str(error))
                LOGGER.warning("Optuna study %s: %s. The search goes on without it.", self._shown, why)
            self._warned = True

    def _connect(self) -> None:
        import optuna

        storage = _open(self._url) if isinstance(self._url, str) else self._url
        # Nothing is sampled here, so the sampler is one that does not look at the trials.
        self._study = optuna.create_study(
            storage=storage,
            study_name=self._name,
            direction="minimize",
            sampler=optuna.samplers.RandomSampler(seed=0),
            load_if_exists=True,
        )

    def _catch_up(self, history: History) -> None:
        if self._study is None:
            self._connect()
        self._numbers, self._attrs, self._told = {}, {}, set()
        for frozen in self._study.get_trials(deepcopy=False):
            trial_id = frozen.user_attrs.get("trial_id")
            if trial_id is None:
                continue
            self._numbers[trial_id] = frozen.number
            self._attrs[trial_id] = dict(frozen.user_attrs)
            if frozen.state.is_finished():
                self._told.add(trial_id)
        self._follow(history.trials.values(), history)
        self._level, self._warned = True, False

    def _follow(self, states: Iterable[TrialState], history: History) -> None:
        if history.plan is None:
            return
        self._describe(history, history.plan)
        frozen = self._study.get_trials(deepcopy=False)
        winning = shown_trial.winners(history)
        for state in self._concerned(states, history):
            if state.trial_id in self._told:
                continue
            if state.trial_id not in self._numbers:
                self._create(state, history)
                continue
            self._note(state, history, frozen[self._numbers[state.trial_id]])
            if shown_trial.has_ended(state, history):
                self._tell(state, winning)
        self._showcase.show(self._study, self._numbers, history)

    def _concerned(self, states: Iterable[TrialState], history: History) -> list[TrialState]:
        """These trials, and those that what happened to them has ruled out."""
        found = {state.trial_id: state for state in states}
        for state in history.trials.values():
            if state.dead and self._attrs.get(state.trial_id, {}).get("status") != state.dead:
                found[state.trial_id] = state
        return [found[number] for number in sorted(found)]

    def _describe(self, history: History, plan: Plan) -> None:
        known = self._study.user_attrs
        if not known:
            self._study.set_metric_names([shown_trial.LOSS])
        for key, value in shown_trial.study_attributes(history, plan).items():
            if known.get(key) != value:
                self._study.set_user_attr(key, value)

    # ------------------------------------------------------------------------- one trial

    def _create(self, state: TrialState, history: History) -> None:
        """Add the trial in one piece, with its real times."""
        # `Study.add_trial` does the same and does not say which number it gave; to ask takes a look at all.
        storage, trial = self._study._storage, shown_trial.whole_trial(state, history)
        key = storage.create_new_trial(self._study._study_id, template_trial=trial)
        self._numbers[state.trial_id] = storage.get_trial_number_from_id(key)
        self._attrs[state.trial_id] = shown_trial.attributes(state, history)
        if shown_trial.has_ended(state, history):
            self._told.add(state.trial_id)

    def _note(self, state: TrialState, history: History, frozen: Any) -> None:
        """Write the attributes, values and constraints that the study does not have yet."""
        import optuna

        known = self._attrs[state.trial_id]
        attributes = shown_trial.attributes(state, history)
        news = {key: value for key, value in attributes.items() if known.get(key) != value}
        values = shown_trial.values(state, history)
        missing = {step: value for step, value in values.items() if step not in frozen.intermediate_values}
        if not news and not missing:
            return
        live = optuna.trial.Trial(self._study, frozen._trial_id)
        for step, value in missing.items():
            live.report(value, step)
        if shown_trial.infeasible(state) and not frozen.constraints:
            live.set_constraint(shown_trial.CONSTRAINT, shown_trial.INFEASIBLE)
            live.storage.set_trial_system_attr(frozen._trial_id, shown_trial.LEGACY, [shown_trial.INFEASIBLE])
        for key, value in news.items():
            live.set_user_attr(key, value)
            known[key] = value

    def _tell(self, state: TrialState, winning: set[int]) -> None:
        end = shown_trial.end_of(state, winning)
        loss = state.best_loss if end == "COMPLETE" else None
        number = self._numbers[state.trial_id]
        self._study.tell(number, loss, state=_state(end), skip_if_finished=True)
        self._told.add(state.trial_id)


def _trial_of(event: TrialAdded | SegmentStarted | SegmentEnded) -> int:
    if isinstance(event, TrialAdded):
        return event.trial.trial_id
    return event.segment.trial_id if isinstance(event, SegmentStarted) else event.result.trial_id


def _state(name: str) -> Any:
    import optuna

    return optuna.trial.TrialState[name]


def _open(url: str) -> Any:
    import optuna

    options: dict[str, Any] = {}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": LOCK_SECONDS}
    storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
    if url.startswith("sqlite"):
        _hurry(storage.engine)
    return storage


def _hurry(engine: Any) -> None:
    """Write without waiting for the disk: the study can be made again from the ledger at any time."""
    import sqlalchemy

    @sqlalchemy.event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    engine.dispose()  # connections made so far would wait


def without_password(url: str) -> str:
    """The URL as it may stand in a log.

    Raises:
        SettingsError: the URL cannot be read, or its database has no driver here.
    """
    import sqlalchemy

    try:
        sqlalchemy.engine.make_url(url).get_dialect()
        return without_secrets(url)
    except sqlalchemy.exc.ArgumentError as error:
        raise SettingsError(
            f"--storage {without_secrets(url)!r} is no database that Optuna can use "
            f"({without_secrets(str(error))}). Use something like sqlite:///study.sqlite, or leave it out."
        ) from error
