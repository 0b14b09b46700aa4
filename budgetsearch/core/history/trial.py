"""What is known of one trial, and the checkpoints that it may go on from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from budgetsearch.core.plan import Trial


@dataclass
class TrialState:
    """What is known of one trial."""

    trial: Trial
    micro_batch: int
    tokens: int = 0
    rung: int = -1
    """Highest rung that it has finished; -1 before the first."""
    goal: int = -1
    """Highest rung that it was sent to; above ``rung`` while it is under way."""
    checkpoint: str | None = None
    losses: dict[int, float] = field(default_factory=dict)
    """Validation loss at each finished rung."""
    example_losses: dict[int, tuple[float, ...]] = field(default_factory=dict)
    best_loss: float | None = None
    best_checkpoint: str | None = None
    best_tokens: int = 0
    best_examples: tuple[float, ...] = ()
    """Loss of each validation example there."""
    best_train: tuple[float, float] | None = None
    """Smoothed training loss there, and its standard error."""
    judged: bool = False
    """Its best checkpoint was never evaluated: it is judged by its training loss."""
    evaluated_tokens: int = 0
    """Where its loss was last measured."""
    full_losses: list[float] = field(default_factory=list)
    """Validation loss after each link of the full run's chain."""
    full_stop_tokens: int | None = None
    """Where the full run ends, as last recorded; None before it starts."""
    full_cooldown_tokens: int = 0
    """How long before that its cooldown begins."""
    dead: str | None = None
    """Why it will never run again (diverged, infeasible, crashed, timeout, lost), or None."""
    held: tuple[Checkpoint, ...] = ()
    """Its checkpoints that are on disk, in the order of writing."""
    exported: Checkpoint | None = None
    """Its best checkpoint, if that was lost and only the exported adapter is left of it."""
    lost: int = 0
    """How often the checkpoint was lost from which it would have gone on."""
    restarts: int = 0
    """How often there was no older one either."""
    unread: int = 0
    """How often in a row the checkpoint could not be read from which it would go on; it is still there."""
    crashes: int = 0
    stranded: int = 0
    """How many of its workers went away, each with its node, since a segment of it ended well."""
    moves: int = 0
    """How many went away in all."""
    timeouts: int = 0
    running: bool = False
    seconds: float = 0.0
    peak_bytes: int = 0
    steps: int = 0
    added_wall: float = 0.0
    """When it was sampled, in seconds since the epoch; for people, nothing is decided by it."""
    ended_wall: float | None = None
    """When its last segment ended, likewise."""

    @property
    def trial_id(self) -> int:
        """Its number, from 0 in the order of sampling."""
        return self.trial.trial_id

    @property
    def loss(self) -> float | None:
        """The loss at the highest finished rung."""
        return self.losses.get(self.rung)

    @property
    def rests(self) -> bool:
        """Its checkpoint is there and cannot be read: nothing is done with it until the run is resumed."""
        return self.unread >= MAX_UNREAD

    @property
    def stuck(self) -> bool:
        """It cannot run now, or never again."""
        return self.dead is not None or self.rests

    @property
    def started(self) -> bool:
        """It has run, or runs now."""
        return self.goal >= 0


MAX_RESTARTS = 1
"""A trial that lost all its checkpoints starts again from its beginning so often, then it is given up."""
MAX_UNREAD = 5
"""A checkpoint that is there and cannot be read is tried so often, one segment after the other; then its
trial rests, with all it holds, until the run is resumed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, with what the trial knew there."""

    name: str
    tokens: int
    loss: float | None
    """Its validation loss, if that was measured."""
    evaluated_tokens: int
    """Where the loss had last been measured."""
    full_losses: int
    """How many losses of its full run had been measured."""


def with_checkpoint(held: tuple[Checkpoint, ...], new: Checkpoint) -> tuple[Checkpoint, ...]:
    """The checkpoints with one more at their end; one of the same name keeps the loss that it had."""
    same = next((one for one in held if one.name == new.name), None)
    if same is not None and new.loss is None:
        new = replace(new, loss=same.loss)
    return (*(one for one in held if one is not same), new)


def best_of(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest loss; the latest of equals."""
    known = [(one.loss, -one.tokens, one) for one in checkpoints if one.loss is not None]
    return min(known, key=lambda pair: pair[:2])[2] if known else None


def spares(state: TrialState, others: Iterable[TrialState]) -> set[str]:
    """What stands in for the best trial's best checkpoint: another one of its own, and one of another's."""
    own = [one for one in state.held if one.name != state.best_checkpoint]
    second = best_of(own) or (own[-1] if own else None)
    other = best_of(one for trial in others if trial is not state for one in trial.held)
    return {one.name for one in (second, other) if one is not None}


def fall_back(state: TrialState, name: str) -> str:
    """Take a checkpoint away from a trial; returns what becomes of the trial, in words, or nothing if it goes
    on from another one anyway.
    """
    state.held = tuple(one for one in state.held if one.name != name)
    if state.checkpoint != name:
        return ""
    state.lost += 1
    if state.held:
        last = state.held[-1]
        state.tokens, state.checkpoint = last.tokens, last.name
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
    best = best_of((*state.held, *([state.exported] if state.exported else ())))
    if best is not None:
        state.best_loss, state.best_checkpoint, state.best_tokens = best.loss, best.name, best.tokens
    elif state.held:
        state.best_loss, state.best_checkpoint = None, None


def turned_worse(losses: list[float], window: int = 3, margin: float = 0.05) -> bool:
    """The mean of the last ``window`` links is worse than the best earlier one by more than ``margin``.

    Means, because the best of many noisy links is too good to be matched; and a clear margin, because
    the cooldown still lowers the loss.
    """
    means = [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]
    return len(means) > window and means[-1] > min(means[:-window]) * (1 + margin)
