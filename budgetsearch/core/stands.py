"""What a trial can go on from: its checkpoints on disk, and which of them are worth their room.

The history believes that whatever it holds is on disk. What it does not need any more it forgets for good,
just when the exporter removes it, so that a later loss falls back to nothing that is gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from budgetsearch.core.trial_state import TrialState

MAX_RESTARTS = 1
"""A trial that lost all its checkpoints starts again from its beginning so often, then it is given up."""
MAX_UNREAD = 5
"""A checkpoint that is there and cannot be read is tried so often, one segment after the other; then its
trial rests, with all it holds, until the run is resumed."""
SPARES = 4
"""Beside the checkpoints to go on from: the best adapter, what takes its place if it breaks (of the same
trial and of another one), and the full run's last but one."""


@dataclass(frozen=True)
class Stand:
    """A checkpoint, with what the trial knew there."""

    checkpoint: str
    tokens: int
    loss: float | None
    """Its validation loss, if that was measured."""
    evaluated_tokens: int
    """Where the loss had last been measured."""
    full_losses: int
    """How many losses of its full run had been measured."""


def with_stand(held: tuple[Stand, ...], new: Stand) -> tuple[Stand, ...]:
    """The stands with one more at their end; one of the same name keeps the loss that it had."""
    same = next((stand for stand in held if stand.checkpoint == new.checkpoint), None)
    if same is not None and new.loss is None:
        new = replace(new, loss=same.loss)
    return (*(stand for stand in held if stand is not same), new)


def best_stand(stands: Iterable[Stand]) -> Stand | None:
    """The one with the lowest loss; the latest of equals."""
    known = [(stand.loss, -stand.tokens, stand) for stand in stands if stand.loss is not None]
    return min(known, key=lambda one: one[:2])[2] if known else None


def spares(state: TrialState, others: Iterable[TrialState]) -> set[str]:
    """What stands in for the best trial's best checkpoint: another one of its own, and one of another's."""
    own = [stand for stand in state.held if stand.checkpoint != state.best_checkpoint]
    second = best_stand(own) or (own[-1] if own else None)
    other = best_stand(stand for trial in others if trial is not state for stand in trial.held)
    return {stand.checkpoint for stand in (second, other) if stand is not None}


def fall_back(state: TrialState, name: str) -> str:
    """Take a checkpoint away from a trial; returns what becomes of the trial, in words, or nothing if it goes
    on from another one anyway.
    """
    state.held = tuple(stand for stand in state.held if stand.checkpoint != name)
    if state.checkpoint != name:
        return ""
    state.lost += 1
    if state.held:
        last = state.held[-1]
        state.tokens, state.checkpoint = last.tokens, last.checkpoint
        state.evaluated_tokens = last.evaluated_tokens
        del state.full_losses[last.full_losses :]
        return f"trial {state.trial_id} goes back to {last.tokens} tokens"
    state.tokens, state.checkpoint, state.evaluated_tokens = 0, None, 0
    state.full_losses.clear()
    state.restarts += 1
    if state.dead:
        return ""
    if state.restarts > MAX_RESTARTS:
        state.dead = "lost"
        return f"trial {state.trial_id} is given up"
    return f"trial {state.trial_id} would have to start again from its beginning"


def settle(state: TrialState) -> None:
    """After a loss somewhere: a trial's best is the best of what still exists of it, for it may be the next
    to be exported. Of whoever holds nothing the report still tells the loss.
    """
    best = best_stand((*state.held, *([state.exported] if state.exported else ())))
    if best is not None:
        state.best_loss, state.best_checkpoint, state.best_tokens = best.loss, best.checkpoint, best.tokens
    elif state.held:
        state.best_loss, state.best_checkpoint = None, None
