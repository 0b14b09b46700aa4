"""The Optuna study that dashboards show: a view of the ledger, never read back by the search.

Each configuration is one Optuna trial. Whatever happens, the mirror asks of a trial what the history
says of it now and writes the difference, so that catching up after a crash and following along are
the same thing.
"""

from __future__ import annotations

import logging
import math
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
from budgetsearch.core.space import Space
from budgetsearch.study.distributions import quiet, shown

LOGGER = logging.getLogger("budgetsearch.study")
LOCK_SECONDS = 2.0
"""The search waits so long for a study that somebody else has locked; later it tries again."""
RETRY_SECONDS = 60.0
"""A storage that failed is left alone for so long: each attempt may block for seconds."""
SILENT = (Heartbeat, Charged, Decided)
"""Events that change nothing in the study."""
CONSTRAINT = "memory"


class StudyMirror:
    """Keeps a persisted Optuna study level with the ledger; implements the port ``Watcher``.

    A storage that fails is no reason to stop a search: there is one warning, and the mirror catches
    up at the next event that works.
    """

    def __init__(self, storage_url: str, study_name: str) -> None:
        """Open or make the study.

        Raises:
            SettingsError: the URL is none that Optuna understands.
        """
        self._url, self._name = storage_url, study_name
        self._study: Any = None
        self._numbers: dict[int, int] = {}
        self._attrs: dict[int, dict[str, Any]] = {}
        self._told: set[int] = set()
        self._level = False
        self._warned = False
        self._retry_at = 0.0
        self._shown = without_password(storage_url)
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

        options: dict[str, Any] = {}
        if self._url.startswith("sqlite"):
            options["connect_args"] = {"timeout": LOCK_SECONDS}
        storage = optuna.storages.RDBStorage(self._url, engine_kwargs=options)
        if self._url.startswith("sqlite"):
            _hurry(storage.engine)
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
            # A trial that was enqueued when the process died is still waiting; `ask` will pop it.
            if trial_id is None or frozen.state.name == "WAITING":
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
        self._describe(history.plan)
        frozen = self._study.get_trials(deepcopy=False)
        ends = history.closed is not None and history.closed.state == "finished"
        winners = _winners(history) if ends else set()
        for state in sorted(states, key=lambda state: state.trial_id):
            if state.trial_id in self._told:
                continue
            if state.trial_id not in self._numbers:
                self._create(state, history.plan)
                frozen = self._study.get_trials(deepcopy=False)
            self._note(state, history, frozen[self._numbers[state.trial_id]])
            if ends:
                self._tell(state, winners)

    def _describe(self, plan: Plan) -> None:
        if "rungs" in self._study.user_attrs:
            return
        rungs = [
            {
                "rung": rung,
                "seconds": seconds,
                "tokens": {name: round(seconds * rate) for name, rate in plan.reference_rates.items()},
            }
            for rung, seconds in enumerate(plan.ladder)
        ]
        self._study.set_user_attr("budget_seconds", plan.budget_seconds)
        self._study.set_user_attr("gpu", plan.gpu)
        self._study.set_user_attr("rungs", rungs)

    # ------------------------------------------------------------------------- one trial

    def _create(self, state: TrialState, plan: Plan) -> None:
        """Enqueue the configuration and ask for it: Optuna's trial of it is running from now on."""
        trial = state.trial
        distributions = shown(Space.parse(plan.space), trial.params)
        attrs = {
            "trial_id": trial.trial_id,
            "origin": trial.origin,
            "params": dict(trial.params),
            "rung_tokens": list(trial.rung_tokens),
        }
        if not any(t.user_attrs.get("trial_id") == trial.trial_id for t in self._waiting()):
            self._study.enqueue_trial({name: trial.params[name] for name in distributions}, user_attrs=attrs)
        asked = self._study.ask(fixed_distributions=distributions)
        if asked.user_attrs.get("trial_id") != trial.trial_id:
            self._study.tell(asked, state=_state("FAIL"))
            raise RuntimeError(f"the study holds trials that budgetsearch did not enqueue ({asked.number})")
        self._numbers[trial.trial_id] = asked.number
        self._attrs[trial.trial_id] = dict(asked.user_attrs)

    def _waiting(self) -> list[Any]:
        return list(self._study.get_trials(deepcopy=False, states=(_state("WAITING"),)))

    def _note(self, state: TrialState, history: History, frozen: Any) -> None:
        """Write the attributes, values and constraints that the study does not have yet."""
        import optuna

        known = self._attrs[state.trial_id]
        news = {key: value for key, value in _attributes(state, history).items() if known.get(key) != value}
        values = _values(state, history)
        missing = {step: value for step, value in values.items() if step not in frozen.intermediate_values}
        if not news and not missing:
            return
        live = optuna.trial.Trial(self._study, frozen._trial_id)
        for step, value in missing.items():
            live.report(value, step)
        if "constraints" in news and hasattr(live, "set_constraint") and not frozen.constraints:
            live.set_constraint(CONSTRAINT, news["constraints"][0])
        for key, value in news.items():
            live.set_user_attr(key, value)
            known[key] = value

    def _tell(self, state: TrialState, winners: set[int]) -> None:
        number = self._numbers[state.trial_id]
        if state.trial_id in winners:
            self._study.tell(number, state.best_loss, skip_if_finished=True)
        elif state.dead and (state.dead != "timeout" or not state.losses):
            self._study.tell(number, state=_state("FAIL"), skip_if_finished=True)
        else:
            self._study.tell(number, state=_state("PRUNED"), skip_if_finished=True)
        self._told.add(state.trial_id)


# ---------------------------------------------------------------- what a trial looks like


def _attributes(state: TrialState, history: History) -> dict[str, Any]:
    attrs: dict[str, Any] = {
        "status": history.standing(state),
        "rung": state.rung,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 3),
        "peak_bytes": state.peak_bytes,
    }
    if state.dead == "infeasible":
        # optuna-dashboard does not read `set_constraint` yet; it shows user attributes.
        attrs["constraints"] = [1.0]
    return attrs


def _values(state: TrialState, history: History) -> dict[int, float]:
    """Loss by rung. A full run that ended before R has its best loss at the last rung."""
    assert history.plan is not None
    values = dict(state.losses)
    over = state.trial_id in history.full_done
    if over and state.full_losses:
        values.setdefault(history.plan.top_rung, min(state.full_losses))
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _winners(history: History) -> set[int]:
    """Trials that are told as complete: the full runs, or without any the exported one."""
    ran = {
        state.trial_id
        for state in history.trials.values()
        if state.full_losses and state.best_loss is not None and state.dead in (None, "timeout")
    }
    best = history.incumbent
    return ran or ({best.trial_id} if best is not None else set())


def _trial_of(event: TrialAdded | SegmentStarted | SegmentEnded) -> int:
    if isinstance(event, TrialAdded):
        return event.trial.trial_id
    return event.segment.trial_id if isinstance(event, SegmentStarted) else event.result.trial_id


def _state(name: str) -> Any:
    import optuna

    return optuna.trial.TrialState[name]


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
