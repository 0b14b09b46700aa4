"""What a plan rests on before anything is measured: one builder for a run and for its preview."""

from __future__ import annotations

from dataclasses import dataclass

from budgetsearch.core.budget import PlanRequest
from budgetsearch.core.space import Space
from budgetsearch.gpu.estimate import footprints
from budgetsearch.gpu.shapes import ModelShape
from budgetsearch.settings import Settings


@dataclass(frozen=True)
class DataSize:
    """How much there is to train on."""

    train_tokens: int
    train_rows: int
    valid_rows: int
    longest: int
    """Tokens of the longest training row."""


def request_for(
    settings: Settings,
    *,
    budget_seconds: float,
    card: str,
    device: str,
    usable_bytes: int,
    space: Space,
    data: DataSize,
    shape: ModelShape | None,
    max_gang: int,
) -> PlanRequest:
    """The request of a run with these settings.

    ``shape``: None where nobody can foresee memory; then the calibration finds out.

    Raises:
        UsageError: the model has no layer of a name in ``targets``.
    """
    foreseen = {}
    if shape is not None:
        shape.check_targets(settings.targets)
        foreseen = footprints(
            shape, space, targets=settings.targets, optimizer=settings.optimizer, device=device
        )
    return PlanRequest(
        budget_seconds=budget_seconds,
        gpu=card,
        space=space.to_dict(),
        seed=settings.seed,
        eta=settings.eta,
        first_rung=settings.first_rung,
        full_share=settings.full_share,
        max_epochs=settings.max_epochs,
        eval_share=settings.eval_share,
        batch_size=settings.batch_size,
        train_tokens=data.train_tokens,
        train_rows=data.train_rows,
        valid_rows=data.valid_rows,
        task_examples=settings.task_examples,
        max_trials=settings.max_trials,
        max_gang=max_gang if settings.optimizer == "adamw" else 1,
        limit_bytes=usable_bytes,
        ranks=space.ranks,
        footprints=foreseen,
        longest=data.longest,
        dropout=max(float(value) for value in space.values_of("dropout")),
    )
