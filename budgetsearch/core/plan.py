"""What the policy rests on: the plan of a run, and the trials whose rungs it froze.

Units as in ``core.records``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from budgetsearch.core.bases import Base, cost_class
from budgetsearch.core.footprint import Footprint
from budgetsearch.core.metric import Metric
from budgetsearch.core.records import Params


@dataclass(frozen=True)
class Plan:
    """All that the policy needs, fixed once the quantizations are calibrated."""

    budget_seconds: float
    gpu: str
    space: Mapping[str, Any]
    seed: int
    eta: int
    ladder: tuple[float, ...]
    """Seconds of training alone at each rung; the last is R, the full run."""
    reference_rates: Mapping[str, float]
    """Tokens per second of each usable quantization."""
    micro_batches: Mapping[str, int]
    overheads: Mapping[str, float]
    """Seconds that a segment costs beside training (evaluation, checkpoint), by quantization."""
    checkpoint_seconds: Mapping[str, float]
    """Seconds that a segment without an evaluation costs beside training, by quantization."""
    load_seconds: Mapping[str, float]
    """Seconds that loading each quantization of the base took."""
    max_tokens: int
    """``max_epochs`` over the training data."""
    batch_size: int
    """In sequences; the largest that the space can ask for."""
    step_tokens: float
    """Mean tokens of one optimizer step."""
    eval_examples: int
    task_examples: int
    reserve_seconds: float
    """Kept for the final scores, the export and the exit."""
    score_seconds: float
    """The part of the reserve that the final scores may take."""
    checkpoint_every_seconds: float
    """Length of a full run's chain links."""
    max_trials: int
    limit_bytes: int | None = None
    gang_gains: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By quantization: how many times the reference rate 1, 2, ... members reach together."""
    gang_micro_batches: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By quantization: what a pass holds of each of 1, 2, ... members side by side."""
    recompute: Mapping[str, bool] = field(default_factory=dict)
    """By quantization: whether gradient checkpointing pays."""
    footprints: Mapping[str, Footprint] = field(default_factory=dict)
    """By quantization: bytes, as foreseen and corrected by what was measured; absent where unknown."""
    largest_ranks: Mapping[str, int] = field(default_factory=dict)
    """By quantization: the largest rank that the calibration found to fit."""
    longest: int = 0
    """Tokens of the longest row of the training data."""
    scouts: int = 0
    """So many first trials go to the second rung whatever their loss: they tell whether the first
    rung predicts it."""
    max_held: int | None = None
    """So many trials that wait may keep a checkpoint; None: as many as may still be promoted."""
    workers: int = 1
    """Jobs that can run at once, at the most that the run has seen. With one nothing runs beside anything."""
    single: bool = False
    """Too little time for a search: one configuration, the likeliest, gets all of it."""
    whole: bool = False
    """Training cannot go on from where it was: every segment begins from nothing."""
    metric: Metric | None = None
    """What finalists and the full run's checkpoints are chosen by; None: the loss."""
    metric_answers: int = 0
    """So many answers of each are graded by it; 0 where there is no time for a number that says anything."""
    answer_seconds: Mapping[str, float] = field(default_factory=dict)
    """By quantization: what one of them takes, its grading included."""
    epoch_tokens: int = 0
    """Of the training data, where trials may have epochs of their own; else 0."""
    token_shares: Mapping[str, float] = field(default_factory=dict)
    """Of several models, by label: the tokens that the same rows are, over those of the first. Tokens of the
    data and of steps are counted with the first model's."""
    length_shares: tuple[tuple[int, float], ...] = ()
    """Where trials may have a ``max_length`` of their own: lengths, ascending, and which part of the training
    tokens rows that are cut there still have."""

    @property
    def full_seconds(self) -> float:
        """R: training seconds of a full run."""
        return self.ladder[-1]

    @property
    def top_rung(self) -> int:
        """Index of the full run in the ladder."""
        return len(self.ladder) - 1

    @property
    def free(self) -> bool:
        """The space is one of anything: see ``Space.free``."""
        return self.space.get("free") is True

    def knobs(self, params: Params) -> Params:
        """Those parameters whose names mean something here: none of a free space, whose ``batch_size`` or
        ``epochs`` are the recipe's own."""
        return {} if self.free else params

    def cost_class(self, params: Params) -> str:
        """What costs, memory and speeds of a configuration are kept by."""
        return cost_class(params, self.free)

    def token_share(self, base: str) -> float:
        """How many times the first model's tokens the same rows are under this base."""
        return self.token_shares.get(Base.parse(base).model, 1.0)

    def step_of(self, params: Params) -> float:
        """Mean tokens of one optimizer step of a configuration's model and length."""
        share = self.token_share(self.cost_class(params)) * self.length_share(params)
        return self.step_tokens * share

    def length_share(self, params: Params) -> float:
        """Which part of the training tokens a configuration sees, between lengths as on a straight line."""
        length = self.knobs(params).get("max_length")
        if length is None or not self.length_shares:
            return 1.0
        known = [(0, 0.0), *self.length_shares]
        for (low, below), (high, above) in itertools.pairwise(known):
            if float(length) <= high:
                return below + (above - below) * (float(length) - low) / (high - low)
        return known[-1][1]

    def grading_seconds(self, quantization: str) -> float:
        """What the answers of one checkpoint take, as calibrated."""
        return self.metric_answers * self.answer_seconds.get(quantization, 0.0)

    def gang_gain(self, quantization: str, members: int) -> float:
        """How many times the rate of one alone so many members reach together."""
        gains = self.gang_gains.get(quantization, (1.0,))
        return gains[min(members, len(gains)) - 1]


@dataclass(frozen=True)
class Trial:
    """One configuration, with its rungs frozen in tokens."""

    trial_id: int
    params: Params
    seed: int
    rung_tokens: tuple[int, ...]
    warmup_tokens: int
    batch_size: int
    micro_batch: int
    max_tokens: int
    """Where its data end, whatever time is left."""
    origin: str = "prior"
    """Where the configuration comes from: prior, stratified or model."""
    entry: int = 0
    """The rung at which it enters at the earliest, see ``ports.Proposal``."""
