"""What is known of one trial, and the checkpoints that it may go on from."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from budgetsearch.core.metric import Values, chosen
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
    merits: Values = ()
    """What the metric gave there, the higher the better."""
    is_final: bool = False
    """Its best was to be graded by the metric."""
    graded_tokens: int = -1
    """Where the metric was last measured, or could not be; -1: nowhere."""
    best_train: tuple[float, float] | None = None
    """Smoothed training loss there, and its standard error."""
    judged: bool = False
    """Its best checkpoint was never evaluated: it is judged by its training loss."""
    evaluated_tokens: int = 0
    """Where its loss was last measured."""
    full_losses: list[float] = field(default_factory=list)
    """Validation loss after each link of the full run's chain that was evaluated; ..."""
    full_examples: list[tuple[float, ...]] = field(default_factory=list)
    """... the loss of each example there, ..."""
    full_marks: list[int] = field(default_factory=list)
    """... and the tokens that the trial had seen."""
    full_stop_tokens: int | None = None
    """Where the full run ends, as last recorded; None before it starts."""
    full_cooldown_tokens: int = 0
    """How long before that its cooldown begins."""
    dead: str | None = None
    """Why it will never run again (diverged, infeasible, crashed, timeout, lost, dropped), or None."""
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
    wished: bool = False
    """A person asked for its next promotion."""
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
    merits: Values = ()
    """What the metric gave to it, the higher the better; none where it was not measured."""
    is_final: bool = False
    """It was to be graded by the metric: see ``core.metric.chosen``."""


def with_checkpoint(held: tuple[Checkpoint, ...], new: Checkpoint) -> tuple[Checkpoint, ...]:
    """The checkpoints with one more at their end; one of the same name keeps the loss that it had."""
    same = next((one for one in held if one.name == new.name), None)
    if same is not None and new.loss is None:
        new = replace(new, loss=same.loss)
    if same is not None and not new.merits:
        new = replace(new, merits=same.merits, is_final=new.is_final or same.is_final)
    return (*(one for one in held if one is not same), new)


def best_of(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest loss, or that the metric prefers; the latest of equals."""
    return chosen([one for one in checkpoints if one.loss is not None], lambda c: (c.loss or 0.0, -c.tokens))


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
        for known in (state.full_losses, state.full_examples, state.full_marks):
            del known[last.full_losses :]
        return f"trial {state.trial_id} goes back to {last.tokens} tokens"
    state.tokens, state.checkpoint, state.evaluated_tokens = 0, None, 0
    for known in (state.full_losses, state.full_examples, state.full_marks):
        known.clear()
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
        state.merits, state.is_final = best.merits, best.is_final
    elif state.held:
        state.best_loss, state.best_checkpoint = None, None


LAST = 3
"""So many evaluations of a full run are looked at together: one alone may be bad luck."""
MARGIN = 0.05
"""Their mean must be worse by so large a share: what is still to cool down gains some percent back."""
BEYOND_NOISE = 2.0
"""Standard errors by which each of them must be worse."""


def turned_worse(state: TrialState) -> bool:
    """The validation loss of a full run has turned worse for good: training on does not pay.

    The mean of the last evaluations is worse than the best earlier mean of as many by a clear margin, and
    each of them is worse than the best earlier one beyond the noise: that of the differences on the same
    examples, or without examples that of the losses themselves. Where the metric found its best among them,
    the loss does not decide.
    """
    losses = state.full_losses
    means = [sum(losses[i : i + LAST]) / LAST for i in range(len(losses) - LAST + 1)]
    if len(means) <= LAST or means[-1] <= min(means[:-LAST]) * (1 + MARGIN):
        return False
    if any(state.merits) and state.best_tokens >= state.full_marks[-LAST]:
        return False
    best = min(range(len(losses) - LAST), key=losses.__getitem__)
    return all(_is_worse(state, best, place) for place in range(len(losses) - LAST, len(losses)))


def _is_worse(state: TrialState, before: int, after: int) -> bool:
    """One evaluation is worse than an earlier one, beyond noise."""
    examples = state.full_examples
    pairs = [b - a for a, b in zip(examples[before], examples[after], strict=False)]
    apart, noise = state.full_losses[after] - state.full_losses[before], 0.0
    if len(pairs) > 1:
        mean = math.fsum(pairs) / len(pairs)
        noise = math.sqrt(math.fsum((d - mean) ** 2 for d in pairs) / (len(pairs) - 1) / len(pairs))
    else:
        steps = [b - a for a, b in itertools.pairwise(state.full_losses[:-LAST])]
        noise = statistics.median(map(abs, steps)) if steps else 0.0
    return apart > BEYOND_NOISE * noise
