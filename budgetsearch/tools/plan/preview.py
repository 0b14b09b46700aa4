"""Everything that ``budgetsearch plan`` shows, from settings alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from budgetsearch.core.errors import DeviceError
from budgetsearch.core.policy.deadline import EXIT_SECONDS
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.records import Calibration
from budgetsearch.core.targets import EXPERTS, words_of
from budgetsearch.machine.clock import deadline_of, timing_of_new
from budgetsearch.machine.detect import Card
from budgetsearch.machine.host import gib
from budgetsearch.machine.memory import Training, estimate
from budgetsearch.run.foresight import (
    Inputs,
    check_minimum,
    guessed_calibrations,
    guessed_request,
    on_ray,
    slowed,
)
from budgetsearch.run.guesses import Guess, speed_guesses
from budgetsearch.run.preflight import cache_need, largest_adapter, run_need
from budgetsearch.run.settings import Settings
from budgetsearch.run.spaces import following
from budgetsearch.tools.plan.bounds import enough_from, search_from
from budgetsearch.tools.plan.rehearsal import Rehearsal, rehearse


@dataclass(frozen=True)
class FitCell:
    """One micro-batch of a configuration."""

    micro_batch: int
    bytes: float
    fits: bool
    recompute: bool
    """Whether it takes gradient checkpointing; ``bytes`` are then with it."""


@dataclass(frozen=True)
class FitRow:
    """What one quantization at one rank needs."""

    quantization: str
    rank: int
    cells: tuple[FitCell, ...]


@dataclass(frozen=True)
class Preview:
    """What a run would do, and what that rests on."""

    model: str
    weights: int | None
    """None for a shape that nobody knows and a probe measured."""
    data: str
    rows: int
    train_rows: int
    tokens_per_row: float
    card: str
    note: str
    """What the user should know of the card: that it stands in for another, or that others use it."""
    usable_bytes: int
    longest: int
    """Tokens of the longest row, for which memory is foreseen."""
    fits: tuple[FitRow, ...]
    calibrations: Mapping[str, Calibration]
    rehearsal: Rehearsal
    reserve: Mapping[str, float]
    """Seconds of the reserve, by what they are for."""
    measured: bool
    """Whether real steps were measured, instead of guessed."""
    search_hours: float
    """From here on, or from the given hours on, more than one configuration is tried."""
    enough_hours: float | None
    """From here on more hours change next to nothing; None: far from the given ones."""
    slow: float
    guesses: tuple[Guess, ...]
    disk: Mapping[str, Any] = field(default_factory=dict)
    """``run``: bytes of the run folder (None: the shape is not known); ``cache``: bytes that are added to the
    cache, by what they are (None: unknown)."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def preview(
    inputs: Inputs, slow: float = 1.0, measured: tuple[PlanRequest, Mapping[str, Calibration]] | None = None
) -> Preview:
    """What the run would become; ``measured`` are the request and the calibrations of a probe, else both are
    guessed.

    Raises:
        DeviceError: nothing of the search space fits into the card's memory.
        BudgetError: the hours are too few.
    """
    request = measured[0] if measured else guessed_request(inputs, budget_seconds_of(inputs.settings))
    found = measured[1] if measured else guessed_calibrations(inputs, request, slow)
    if measured:
        found = {name: slowed(calibration, slow) for name, calibration in found.items()}
    if all(calibration.status != "ok" for calibration in found.values()):
        raise nothing_works(inputs.settings.model, inputs.card, found)
    setup = inputs.setup.slowed(slow)
    check_minimum(request, found, setup)
    play = partial(rehearse, calibrations=found, setup_seconds=setup.usual, workers=inputs.settings.gpus or 1)
    rehearsal = play(request)
    real = measured is not None or all(c.measured for c in found.values() if c.status == "ok")
    plan = rehearsal.plan
    enough = enough_from(request, found, setup.usual)
    writes = max(c.checkpoint_seconds for c in found.values() if c.status == "ok")
    return Preview(
        model=inputs.settings.model,
        weights=inputs.shape.weights if inputs.shape else None,
        data=inputs.settings.data,
        rows=request.train_rows + request.valid_rows,
        train_rows=request.train_rows,
        tokens_per_row=request.train_tokens / request.train_rows,
        card=inputs.card.name,
        note=inputs.card.note,
        usable_bytes=inputs.card.usable_bytes,
        longest=request.longest,
        fits=tuple(_fits(inputs, request)),
        calibrations=found,
        rehearsal=rehearsal,
        reserve={
            "scores of base and adapter": plan.score_seconds,
            "two checkpoints": 2 * writes,
            "export and exit": plan.reserve_seconds - plan.score_seconds - 2 * writes,
        },
        measured=real,
        search_hours=search_from(request, rehearsal, play) / 3600,
        enough_hours=None if enough is None else enough / 3600,
        slow=slow,
        guesses=tuple(guesses_of(inputs, found, real)),
        disk=_disk(inputs, plan.budget_seconds),
    )


def budget_seconds_of(settings: Settings) -> float:
    """What a run that began now would have."""
    deadline = deadline_of(settings.deadline) if settings.deadline else None
    return timing_of_new(settings.hours, deadline, 0.0).budget_seconds


def _workers(settings: Settings) -> list[Guess]:
    """What the number of workers rests on; nothing for the one of the local engine."""
    if not on_ray(settings):
        return []
    if settings.gpus is None:
        return [Guess("workers", "1", "without --gpus; a run takes every GPU that Ray sees")]
    takes = "" if settings.engine == "ray" else "; a run takes --engine ray for it"
    return [Guess("workers", str(settings.gpus), f"--gpus, one card like this each{takes}")]


def _disk(inputs: Inputs, budget_seconds: float) -> Mapping[str, Any]:
    settings, shape, data = inputs.settings, inputs.shape, inputs.data
    cache = cache_need(settings.model, shape, data.rows, data.rows * data.tokens_per_row)
    if shape is None:
        return {"run": None, "cache": cache}
    need = run_need(settings, largest_adapter(settings.targets, inputs.space, shape), budget_seconds)
    return {"run": need.as_json(), "cache": cache}


def _fits(inputs: Inputs, request: PlanRequest) -> list[FitRow]:
    if inputs.shape is None:
        return []
    sizes = [1]
    while sizes[-1] * 2 <= request.batch_size:
        sizes.append(sizes[-1] * 2)
    rows = []
    for name in inputs.space.quantizations:
        for rank in sorted(request.ranks):
            cells = tuple(_cell(inputs, request, name, rank, size) for size in sizes)
            rows.append(FitRow(name, rank, cells))
    return rows


def _cell(inputs: Inputs, request: PlanRequest, name: str, rank: int, micro_batch: int) -> FitCell:
    settings, shape = inputs.settings, inputs.known_shape
    plain, again = (
        estimate(
            shape,
            Training(
                name,
                rank,
                targets=inputs.space.targets(settings.targets),
                micro_batch=micro_batch,
                length=request.longest,
                recompute=recompute,
                optimizer=settings.optimizer,
                dropout=any(inputs.space.values_of("dropout")),
                device="cpu" if inputs.card.device == "cpu" else "cuda",
            ),
        ).total
        for recompute in (False, True)
    )
    if plain <= inputs.card.usable_bytes:
        return FitCell(micro_batch, plain, True, False)
    return FitCell(micro_batch, again, again <= inputs.card.usable_bytes, True)


def nothing_works(model: str, card: Card, found: Mapping[str, Calibration]) -> DeviceError:
    """What to say where nothing of the model can be trained; ``found``: by base, why not."""
    why = "; ".join(f"{name}: {c.detail}" for name, c in found.items())
    if any(c.status != "out_of_memory" for c in found.values()):
        return DeviceError(f"{model} cannot be trained here ({why}).")
    return DeviceError(
        f"{model} does not fit into {gib(card.usable_bytes)} ({why}). Use a smaller "
        "--model, a shorter --max-length, a --space with nf4, or a larger card."
    )


def _experts(inputs: Inputs) -> list[Guess]:
    """How wide routed experts lie in memory."""
    shape, targets = inputs.shape, inputs.space.targets(inputs.settings.targets)
    if shape is None or not shape.experts:
        return []
    share = f"{shape.experts / shape.weights:.0%} of the weights"
    if EXPERTS in words_of(targets):
        return [
            Guess("routed experts", f"{share}, in 16 or 32 bits", "they wear adapters, one trial at a time")
        ]
    packs = "nf4" in inputs.space.quantizations and shape.packed_experts("nf4", targets)
    width = "in 4 bits under nf4, else in 16 or 32" if packs else "in 16 or 32 bits"
    return [Guess("routed experts", f"{share}, {width}", "they wear no adapters; --targets experts")]


def _rate(inputs: Inputs) -> list[Guess]:
    """Where the search over the learning rate begins, if that follows the model."""
    space = following(inputs.space, inputs.shape)
    if space is inputs.space:
        return []
    center = space.default()["learning_rate"]
    return [Guess("learning rate", f"begins at {float(center):.2g}", space["learning_rate"].source)]


def guesses_of(inputs: Inputs, found: Mapping[str, Calibration], measured: bool) -> list[Guess]:
    """What a plan rests on; ``measured``: whether real steps were."""
    data = inputs.data
    weights = f"{inputs.shape.weights / 1e9:.2f}B weights" if inputs.shape else "not foreseen"
    known = [
        *_workers(inputs.settings),
        Guess("shape of the model", weights, inputs.shape_source),
        *_experts(inputs),
        *_rate(inputs),
        Guess("memory of the card", gib(inputs.card.usable_bytes), inputs.card.profile.source),
    ]
    earlier = [
        Guess(
            f"speed of {c.quantization}", f"{c.tokens_per_second:,.0f} tokens/s", f"measured on {c.measured}"
        )
        for c in found.values()
        if c.measured
    ]
    if measured:
        return [*known, *(earlier or [Guess("speed and memory", "measured", "real steps on this machine")])]
    return [
        *known,
        Guess("memory of training", "counted", "docs/memory.md; a run measures it first"),
        Guess("data", f"{data.rows} rows of {data.tokens_per_row:.0f} tokens", data.source),
        *earlier,
        *speed_guesses(inputs.card.profile, os.cpu_count() or 1),
        Guess("trials at once", "1", "whether more pay is measured when the run begins"),
        Guess("leaving", f"{EXIT_SECONDS:.0f} s or 0.5% of the budget", "measured on a CPU"),
    ]
