"""Everything that ``budgetsearch plan`` shows, from settings alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import DeviceError, ModelError
from budgetsearch.core.policy.deadline import EXIT_SECONDS
from budgetsearch.core.policy.planning import PlanRequest
from budgetsearch.core.records import Calibration
from budgetsearch.core.resources.disk import CHECKPOINT_BYTES
from budgetsearch.core.resources.memory import foresee
from budgetsearch.core.space.space import Space
from budgetsearch.machine.clock import deadline_of, timing_of_new
from budgetsearch.machine.detect import Card, detect
from budgetsearch.machine.host import gib
from budgetsearch.machine.memory import Training, estimate
from budgetsearch.machine.profiles import profile
from budgetsearch.machine.shapes import ModelShape, find_config, shape_of
from budgetsearch.run.preflight import cache_need, check_inputs, largest_adapter, run_need
from budgetsearch.run.prepare import DataSize, request_for
from budgetsearch.run.settings import Settings
from budgetsearch.run.spaces import load_space
from budgetsearch.tools.plan.guesses import Guess, TrainedWith, guess_calibration, speed_guesses
from budgetsearch.tools.plan.rehearsal import RAY_SECONDS, SETUP_SECONDS, Rehearsal, rehearse, slowed
from budgetsearch.training.data.size import DataGuess, guess_data


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
    slow: float
    guesses: tuple[Guess, ...]
    disk: Mapping[str, Any] = field(default_factory=dict)
    """``run``: bytes of the run folder (None: the shape is not known); ``cache``: bytes that are added to the
    cache, by what they are (None: unknown)."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Inputs:
    """What is known before anything is guessed."""

    settings: Settings
    space: Space
    card: Card
    shape: ModelShape | None
    shape_source: str
    data: DataGuess


def gather(settings: Settings, cache: Path, *, need_shape: bool = True) -> Inputs:
    """Card, shape, space and data of the settings, without touching anything.

    ``need_shape``: nothing else will tell what fits.

    Raises:
        UsageError: an input, the model or the card cannot be used.
    """
    space = load_space(settings.space)
    check_inputs(settings, space)
    shape, source = None, "unknown"
    try:
        config, source = find_config(settings.model, settings.revision, cache)
        shape = shape_of(config, settings.model)
        shape.check_targets(settings.targets)
    except ModelError:
        if need_shape:
            raise
    data = guess_data(settings.data, settings.max_rows)
    return Inputs(settings, space, _card(settings), shape, source, data)


def preview(
    inputs: Inputs, slow: float = 1.0, measured: tuple[PlanRequest, Mapping[str, Calibration]] | None = None
) -> Preview:
    """What the run would become; ``measured`` are the request and the calibrations of a probe, else both are
    guessed.

    Raises:
        DeviceError: nothing of the search space fits into the card's memory.
        BudgetError: the hours are too few.
    """
    request = measured[0] if measured else _request(inputs)
    found = measured[1] if measured else _guessed(inputs, request, slow)
    if measured:
        found = {name: slowed(calibration, slow) for name, calibration in found.items()}
    if all(calibration.status != "ok" for calibration in found.values()):
        raise _nothing_works(inputs, found)
    workers = inputs.settings.gpus or 1
    setup = SETUP_SECONDS + (RAY_SECONDS if _on_ray(inputs.settings) else 0.0)
    rehearsal = rehearse(request, found, setup * slow, workers)
    plan = rehearsal.plan
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
        measured=measured is not None,
        slow=slow,
        guesses=tuple(_guesses(inputs, measured is not None)),
        disk=_disk(inputs, plan.budget_seconds),
    )


def _on_ray(settings: Settings) -> bool:
    return settings.engine == "ray" or (settings.gpus or 1) > 1


def _workers(settings: Settings) -> list[Guess]:
    """What the number of workers rests on; nothing for the one of the local engine."""
    if not _on_ray(settings):
        return []
    if settings.gpus is None:
        return [Guess("workers", "1", "without --gpus; a run takes every GPU that Ray sees")]
    takes = "" if settings.engine == "ray" else "; a run takes --engine ray for it"
    return [Guess("workers", str(settings.gpus), f"--gpus, one card like this each{takes}")]


def _card(settings: Settings) -> Card:
    """The card that is here, or a card as the profile of one that is not describes it."""
    wanted = profile(settings.gpu)
    try:
        return detect(settings.gpu, settings.device)
    except DeviceError:
        if wanted.usable_bytes is None:
            raise
        here = f"{wanted.name} (not in this machine)"
        return Card(wanted, "cuda:0", here, wanted.usable_bytes, wanted.usable_bytes)


def _request(inputs: Inputs) -> PlanRequest:
    settings, data = inputs.settings, inputs.data
    deadline = deadline_of(settings.deadline) if settings.deadline else None
    valid = 0 if settings.valid else max(1, round(data.rows * settings.valid_share))
    if settings.valid:
        valid = guess_data(settings.valid, None).rows
    train = data.rows if settings.valid else max(1, data.rows - valid)
    tokens = min(data.tokens_per_row, settings.max_length)
    size = DataSize(max(1, round(train * tokens)), train, valid, settings.max_length)
    budget_seconds = timing_of_new(settings.hours, deadline, 0.0).budget_seconds
    request = request_for(settings, budget_seconds, inputs.card, inputs.space, size, _shape(inputs))
    return dataclasses.replace(request, max_gang=1)  # what gangs gain is measured, never guessed


def _guessed(inputs: Inputs, request: PlanRequest, slow: float) -> dict[str, Calibration]:
    found = {}
    for name in inputs.space.quantizations:
        limit, rule, length = inputs.card.usable_bytes, request.footprints[name], request.longest
        ahead = foresee(rule, limit, request.ranks, request.batch_size, length)
        if ahead.refusal:
            found[name] = Calibration(name, "out_of_memory", detail=ahead.refusal)
            continue
        needs = {rank: rule.bytes(rank=rank, tokens=length, recompute=True) for rank in request.ranks}
        # What is only a little too large, the run tries all the same.
        rank = max((r for r in request.ranks if needs[r] <= limit), default=min(request.ranks))
        plain, again = (
            rule.micro_batch(limit, rank=rank, length=length, most=request.batch_size, recompute=recompute)
            for recompute in (False, True)
        )
        # Half the speed for the recomputed third: worth it only where next to nothing fits without.
        recompute = plain == 0 or (plain == 1 and again >= 4)
        found[name] = guess_calibration(
            _shape(inputs),
            inputs.card.profile,
            TrainedWith(name, rank, max(1, again if recompute else plain), recompute),
            cores=os.cpu_count() or 1,
            tokens_per_row=request.train_tokens / request.train_rows,
            adapter_bytes=CHECKPOINT_BYTES * rank * _shape(inputs).weights_per_rank(inputs.settings.targets),
            slow=slow,
        )
    return found


def _shape(inputs: Inputs) -> ModelShape:
    """The shape, where everything else was refused before."""
    assert inputs.shape is not None
    return inputs.shape


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
    settings, shape = inputs.settings, _shape(inputs)
    plain, again = (
        estimate(
            shape,
            Training(
                name,
                rank,
                targets=settings.targets,
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


def _nothing_works(inputs: Inputs, found: Mapping[str, Calibration]) -> DeviceError:
    why = "; ".join(f"{name}: {c.detail}" for name, c in found.items())
    if any(c.status != "out_of_memory" for c in found.values()):
        return DeviceError(f"{inputs.settings.model} cannot be trained here ({why}).")
    return DeviceError(
        f"{inputs.settings.model} does not fit into {gib(inputs.card.usable_bytes)} ({why}). Use a smaller "
        "--model, a shorter --max-length, a --space with nf4, or a larger card."
    )


def _guesses(inputs: Inputs, measured: bool) -> list[Guess]:
    data = inputs.data
    weights = f"{inputs.shape.weights / 1e9:.2f}B weights" if inputs.shape else "not foreseen"
    known = [
        *_workers(inputs.settings),
        Guess("shape of the model", weights, inputs.shape_source),
        Guess("memory of the card", gib(inputs.card.usable_bytes), inputs.card.profile.source),
    ]
    if measured:
        return [*known, Guess("speed and memory", "measured", "real steps on this machine")]
    return [
        *known,
        Guess("memory of training", "counted", "docs/memory.md; a run measures it first"),
        Guess("data", f"{data.rows} rows of {data.tokens_per_row:.0f} tokens", data.source),
        *speed_guesses(inputs.card.profile, os.cpu_count() or 1),
        Guess("trials at once", "1", "whether more pay is measured when the run begins"),
        Guess("leaving", f"{EXIT_SECONDS:.0f} s or 0.5% of the budget", "measured on a CPU"),
    ]
