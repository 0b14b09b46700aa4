"""What the history knows of one trial."""

from __future__ import annotations

from dataclasses import dataclass, field

from budgetsearch.core.plan import Trial
from budgetsearch.core.stands import MAX_UNREAD, Stand


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
    held: tuple[Stand, ...] = ()
    """Its checkpoints that are on disk, in the order of writing."""
    exported: Stand | None = None
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
