"""What a plan rests on, before anything was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from budgetsearch.core.bases import Base
from budgetsearch.core.footprint import Footprint
from budgetsearch.core.metric import Metric
from budgetsearch.core.records import Calibration


@dataclass(frozen=True)
class PlanRequest:
    """Facts from the user and the data, before anything was measured."""

    budget_seconds: float
    gpu: str
    space: Mapping[str, Any]
    seed: int
    eta: int
    """Of so many trials at a rung one goes on."""
    first_rung: float | None
    """The first rung as a share of the full run; None: as the budget allows."""
    full_share: float
    """The full run's training as a share of the budget, at most."""
    max_epochs: float
    eval_share: float
    """Evaluation as a share of the first rung's time, at most."""
    batch_size: int
    train_tokens: int
    train_rows: int
    valid_rows: int
    task_examples: int
    max_trials: int
    limit_bytes: int | None = None
    max_gang: int = 1
    """Adapters that may train at once, at most."""
    ranks: tuple[int, ...] = (16,)
    """Ranks that the space can ask for; of a range its ends and its middle."""
    footprints: Mapping[str, Footprint] = field(default_factory=dict)
    """Memory as foreseen, by quantization; absent where nobody can foresee it."""
    longest: int = 0
    """Tokens of the longest training row."""
    dropout: float = 0.0
    """The largest dropout that the space can ask for."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Quantizations that this base model cannot have, and why."""
    max_held: int | None = None
    """The disk has room for the checkpoints of so many trials that wait; None: nobody looked."""
    workers: int = 1
    """Jobs that can run at once."""
    whole_evaluation: bool = False
    """An evaluation is one piece, whatever it looks at: it counts as one example."""
    whole: bool = False
    """Every segment begins from nothing: see ``Plan.whole``."""
    own_lengths: bool = False
    """Runs follow schedules that end at lengths of their own, so that unfinished ones say little."""
    metric: Metric | None = None
    """What finalists and the full run's checkpoints are chosen by; None: the loss."""
    token_shares: Mapping[str, float] = field(default_factory=dict)
    """See ``Plan.token_shares``."""
    length_shares: tuple[tuple[int, float], ...] = ()
    """See ``Plan.length_shares``."""

    def rate(self, found: Calibration) -> float:
        """Tokens a second, counted with the first model's."""
        return found.tokens_per_second / self.token_shares.get(Base.parse(found.quantization).model, 1.0)

    @property
    def step_tokens(self) -> float:
        """Mean tokens of one optimizer step."""
        return self.batch_size * self.train_tokens / self.train_rows

    @property
    def max_tokens(self) -> int:
        """``max_epochs`` over the training data."""
        return int(self.max_epochs * self.train_tokens)
