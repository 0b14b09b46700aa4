"""``fold(entries) -> History``: everything that the policy may know, from the ledger alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from budgetsearch.core.bases import cost_class
from budgetsearch.core.decisions import Finish
from budgetsearch.core.errors import LedgerError
from budgetsearch.core.events import (
    Asked,
    Calibrated,
    CardWatched,
    Charged,
    CheckpointLost,
    Closed,
    Decided,
    Entry,
    Event,
    Exported,
    Heartbeat,
    Noticed,
    Opened,
    Planned,
    Rescheduled,
    Resumed,
    Scored,
    SegmentEnded,
    SegmentStarted,
    TrialAdded,
    WorkersChanged,
)
from budgetsearch.core.history.history import History
from budgetsearch.core.history.measured import Measured
from budgetsearch.core.history.outcomes import rule_out_infeasible, segment_ended
from budgetsearch.core.history.retention import forget, lose, recount
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.resources.memory import taught

Handler = Callable[[History, Any], None]
"""Takes an event of its type; when it happened is in ``History.spent`` already."""


def fold(entries: Iterable[Entry]) -> History:
    """The history that a ledger tells.

    Raises:
        LedgerError: an entry contradicts what came before.
    """
    history = History()
    for entry in entries:
        apply(history, entry)
    return history


def apply(history: History, entry: Entry) -> None:
    """Take one more entry into account.

    Raises:
        LedgerError: the entry contradicts what came before.
    """
    history.spent = max(history.spent, entry.at)
    history.seq, history.wall = entry.seq, entry.wall
    history.accounts.apply(entry)
    kind = type(entry.event)
    if kind not in CALM:
        history.ahead = None
    try:
        ON[kind](history, entry.event)
    except KeyError as error:
        raise LedgerError(
            f"entry {entry.seq} ({kind.__name__}) names {error} which the ledger never "
            "introduced. The ledger is damaged: restore ledger.sqlite from a copy, or start a new run."
        ) from error


def _opened(history: History, event: Opened) -> None:
    history.opened = event


def _resumed(history: History, event: Resumed) -> None:
    history.closed = history.finish = None
    history.unwritten.clear()
    for state in history.trials.values():
        state.unread = 0
    recount(history)


def _rescheduled(history: History, event: Rescheduled) -> None:
    if history.opened is not None:
        history.opened = replace(history.opened, budget_seconds=event.budget_seconds)
    if history.plan is not None:
        history.plan = replace(history.plan, budget_seconds=event.budget_seconds)


def _calibrated(history: History, event: Calibrated) -> None:
    history.calibrations[event.calibration.quantization] = event.calibration


def _planned(history: History, event: Planned) -> None:
    history.plan = event.plan
    history.workers = event.plan.workers
    history.measured = Measured(event.plan)


def _workers_changed(history: History, event: WorkersChanged) -> None:
    history.workers = event.workers
    if history.plan is not None and event.workers > history.plan.workers:
        history.plan = replace(history.plan, workers=event.workers)


def _trial_added(history: History, event: TrialAdded) -> None:
    trial = event.trial
    micro = taught(history.shrunk, trial.params, trial.micro_batch, history.free)
    history.trials[trial.trial_id] = TrialState(trial, micro, added_wall=history.wall)
    history.active[trial.trial_id] = history.trials[trial.trial_id]
    rule_out_infeasible(history, [history.trials[trial.trial_id]])


def _asked(history: History, event: Asked) -> None:
    state = history.trials[event.trial_id]
    if event.action == "promote":
        state.wished = True
        return
    state.dead = state.dead or "dropped"
    if event.trial_id in history.full_trials and not state.running:
        history.full_trials.remove(event.trial_id)
        history.full_done.append(event.trial_id)
    forget(history)


def _decided(history: History, event: Decided) -> None:
    history.decisions += 1
    if isinstance(event.decision, Finish):
        history.finish, history.finished_at = event.decision, event.now
        history.full_done += history.full_trials  # the time ended them
        history.full_trials.clear()
        history.ahead = None


def _segment_started(history: History, event: SegmentStarted) -> None:
    segment = event.segment
    state = history.trials[segment.trial_id]
    history.send(state, segment.rung)
    history.running.setdefault(event.job_id, []).append(segment)
    history.running_since.setdefault(event.job_id, history.spent)
    history.job_sizes[event.job_id] = len(history.running[event.job_id])
    history.next_job = max(history.next_job, event.job_id + 1)
    history.last_quantization = cost_class(segment.params, history.free)
    if history.plan and segment.rung == history.plan.top_rung:
        state.full_stop_tokens = segment.schedule.stop_tokens
        state.full_cooldown_tokens = segment.schedule.cooldown_tokens
        _note_full_run(history, segment.trial_id)


def _note_full_run(history: History, trial_id: int) -> None:
    if history.plan is not None and history.plan.workers == 1 and history.full_trials != [trial_id]:
        history.full_trials.clear()
        history.ahead = None
    if trial_id not in history.full_trials:
        history.full_trials.append(trial_id)


def _heartbeat(history: History, event: Heartbeat) -> None:
    history.last_beat = event.beat
    history.last_beat_at = history.spent


def _noticed(history: History, event: Noticed) -> None:
    history.notices.append((history.spent, event.text))


def _card_watched(history: History, event: CardWatched) -> None:
    history.uses.append(event.use)


def _checkpoint_lost(history: History, event: CheckpointLost) -> None:
    lose(history, event.checkpoint, event.detail, exported=event.exported)
    forget(history)


def _charged(history: History, event: Charged) -> None:
    history.charged[event.phase] = history.charged.get(event.phase, 0.0) + event.seconds


def _scored(history: History, event: Scored) -> None:
    before = history.scored
    if before and before.checkpoint == event.checkpoint and event.score.base_loss is None:
        event = replace(event, score=before.score.joined(event.score))
    history.scored = event


def _exported(history: History, event: Exported) -> None:
    history.exported = event
    for state in map(history.trials.__getitem__, history.holders):
        if state.exported is not None and state.exported.name != event.checkpoint:
            state.exported = None


def _closed(history: History, event: Closed) -> None:
    history.closed = event


CALM = frozenset(
    {TrialAdded, Decided, SegmentStarted, SegmentEnded, Heartbeat, Charged, Noticed, CardWatched}
)
"""Events that change what is needed of checkpoints for the trials that they name at the most; where one of
them changes more its handler says so."""
ON: Mapping[type[Event], Handler] = {
    Opened: _opened,
    Resumed: _resumed,
    Rescheduled: _rescheduled,
    Calibrated: _calibrated,
    Planned: _planned,
    WorkersChanged: _workers_changed,
    TrialAdded: _trial_added,
    Asked: _asked,
    Decided: _decided,
    SegmentStarted: _segment_started,
    SegmentEnded: segment_ended,
    Heartbeat: _heartbeat,
    Noticed: _noticed,
    CardWatched: _card_watched,
    CheckpointLost: _checkpoint_lost,
    Charged: _charged,
    Scored: _scored,
    Exported: _exported,
    Closed: _closed,
}
"""Every event of a run, and what it changes."""
