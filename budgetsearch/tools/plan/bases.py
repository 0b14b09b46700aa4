"""Which base model under which quantization suits a card and the hours: side by side, before any run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import BudgetError, ModelError
from budgetsearch.core.policy.planning import make_plan
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.records import Calibration
from budgetsearch.machine.host import gib
from budgetsearch.machine.memory import WEIGHT_BYTES
from budgetsearch.run.foresight import (
    Inputs,
    gather,
    guessed_calibrations,
    guessed_request,
    measuring_seconds,
)
from budgetsearch.run.guesses import Guess
from budgetsearch.run.settings import Settings
from budgetsearch.tools.plan.bounds import trials_in
from budgetsearch.tools.plan.preview import budget_seconds_of, guesses_of, nothing_works

LEAST_PASSES = 1.0
"""A full run that sees less of the data than this has not learned them yet, however large its base is."""
ALIKE = 1.25
"""Models whose weights differ by less than this factor are of one size: which is better only a run tells."""
LARGEST = (
    "the largest that has time enough is taken: of the five best entries of the NeurIPS LLM Efficiency "
    "Challenge three trained a 14B on one card, in nf4 where 16 bits did not fit; what it is worth on these "
    "data only training tells"
)
ROUNDING = "adapters on nf4 were found as good as on 16 bits (QLoRA), so the faster quantization is taken"


@dataclass(frozen=True)
class BaseRow:
    """A base model under one quantization, on this card and in these hours."""

    model: str
    weights: int
    quantization: str
    """Empty where the model cannot be looked at."""
    fits: bool
    peak_bytes: float
    """Of a training step as it would run; of what does not fit, the least that one row needs; 0 of what
    cannot be for another reason."""
    rank: int = 0
    """The largest that fits."""
    micro_batch: int = 0
    recompute: bool = False
    tokens_per_second: float = 0.0
    full_tokens: int = 0
    """Of the full run; 0: there is none in these hours."""
    passes: float = 0.0
    """The same over the data."""
    trials: int = 0
    """Configurations that are tried, if this is the only base."""
    why: str = ""
    """Why it cannot be, or that the hours are too few."""


@dataclass(frozen=True)
class BasesPreview:
    """The bases side by side, and the one to take."""

    card: str
    note: str
    usable_bytes: int
    budget_seconds: float
    data: str
    rows: int
    tokens_per_row: float
    bases: tuple[BaseRow, ...]
    choice: BaseRow
    ground: tuple[str, ...]
    """Why that one, a sentence each."""
    guesses: tuple[Guess, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def compare_bases(settings: Settings, cache: Path, slow: float = 1.0) -> BasesPreview:
    """Every model of the settings under every quantization of the space, and which of them to take.

    Raises:
        UsageError: an input, every model or the card cannot be used.
        DeviceError: nothing of the search space fits into the card's memory.
        BudgetError: the hours are too few for every base.
    """
    seconds = budget_seconds_of(settings)
    able, bases = _gathered(settings, cache, seconds)
    each, requests = [inputs for inputs, _ in able], [request for _, request in able]
    known: dict[str, Calibration] = {}
    late: list[BudgetError] = []
    for inputs, request in able:
        for found in guessed_calibrations(inputs, request, slow).values():
            bases.append(_row(inputs, request, found, slow, late))
            known[named(bases[-1])] = found
    first = each[0]
    if not any(base.full_tokens for base in bases):
        raise late[0] if late else nothing_works(", ".join(settings.models), first.card, known)
    chosen = choose(bases, requests[0].eta)
    return BasesPreview(
        card=first.card.name,
        note=first.card.note,
        usable_bytes=first.card.usable_bytes,
        budget_seconds=seconds,
        data=settings.data,
        rows=requests[0].train_rows + requests[0].valid_rows,
        tokens_per_row=requests[0].train_tokens / requests[0].train_rows,
        bases=tuple(bases),
        choice=chosen,
        ground=tuple(_ground(chosen, bases, requests[0].eta)),
        guesses=tuple(_guesses(each, slow)),
    )


def _gathered(
    settings: Settings, cache: Path, seconds: float
) -> tuple[list[tuple[Inputs, PlanRequest]], list[BaseRow]]:
    """What is known of each model that can be used, and a row with the reason of each that cannot.

    Raises:
        ModelError: none can.
    """
    able: list[tuple[Inputs, PlanRequest]] = []
    gone: list[BaseRow] = []
    for one in settings.apart:
        try:
            inputs = gather(one, cache)
            able.append((inputs, guessed_request(inputs, seconds)))
        except ModelError as error:
            gone.append(BaseRow(one.model, 0, "", False, 0.0, why=str(error)))
            if len(gone) == len(settings.models):
                raise
    return able, gone


def _row(
    inputs: Inputs, request: PlanRequest, found: Calibration, slow: float, late: list[BudgetError]
) -> BaseRow:
    """What the base comes to alone; ``late`` takes what is said where the hours are too few."""
    model, name, rule = inputs.settings.model, found.quantization, request.footprints[found.quantization]
    base = BaseRow(model, inputs.known_shape.weights, name, False, 0.0)
    if found.status != "ok":
        if found.status == "out_of_memory":
            least = rule.bytes(rank=min(request.ranks), tokens=request.longest, recompute=True)
            base = replace(base, peak_bytes=least)
        return replace(base, why=found.detail)
    tokens = found.micro_batch * request.longest
    base = replace(
        base,
        fits=True,
        peak_bytes=rule.bytes(rank=found.rank, tokens=tokens, recompute=found.recompute),
        rank=found.rank,
        micro_batch=found.micro_batch,
        recompute=found.recompute,
        tokens_per_second=found.tokens_per_second,
    )
    alone = replace(request, space=inputs.space.restrict("quantization", [name]).to_dict())
    spent = inputs.setup.slowed(slow).usual + measuring_seconds(found, alone, alone.budget_seconds)
    try:
        plan = make_plan(alone, {name: found}, spent)
    except BudgetError as error:
        late.append(error)
        return replace(base, why="the hours are too few to train anything")
    full = round(min(plan.max_tokens, plan.full_seconds * found.tokens_per_second))
    return replace(base, full_tokens=full, passes=full / request.train_tokens, trials=trials_in(plan, spent))


# ------------------------------------------------------------------------------ the choice


def choose(bases: Sequence[BaseRow], eta: int) -> BaseRow:
    """The base to take: of those with time enough the largest model, under the quantization that trains it
    fastest; where none has, the one that sees most of the data."""
    able = [base for base in bases if base.full_tokens]
    enough = [base for base in able if has_time(base, eta)]
    if not enough:
        return max(able, key=lambda base: (base.passes, base.trials, base.weights))
    return max(enough, key=_merit)


def has_time(base: BaseRow, eta: int) -> bool:
    """Whether the hours hold a first rung of which one goes on, and a full run that sees all the data."""
    return base.trials >= eta and base.passes >= LEAST_PASSES


def _merit(base: BaseRow) -> tuple[float, float, float]:
    """The larger the better."""
    return base.weights, base.tokens_per_second, WEIGHT_BYTES[base.quantization]


def _ground(chosen: BaseRow, bases: Sequence[BaseRow], eta: int) -> list[str]:
    """Why this one, and why none of the others."""
    others = [base for base in bases if base.model != chosen.model]
    if not has_time(chosen, eta):
        ground = [f"no base sees the data {LEAST_PASSES:g} times beside {eta} trials; this one comes nearest"]
    else:
        ground = [LARGEST] if any(0 < base.weights < chosen.weights for base in others) else []
    same = [base for base in bases if base.model == chosen.model and base is not chosen]
    if chosen.quantization != "fp32" and any(base.full_tokens for base in same):
        ground.append(ROUNDING)
    ground += [_against(chosen, base, eta) for base in [*same, *others]]
    alike = [
        b.model for b in others if max(b.weights, chosen.weights) < ALIKE * min(b.weights, chosen.weights)
    ]
    if alike:
        names = ", ".join(dict.fromkeys(alike))
        ground.append(f"{names} is of nearly the same size: which is better only training both tells")
    return ground


def _against(chosen: BaseRow, other: BaseRow, eta: int) -> str:
    """What speaks against another base."""
    name = named(other)
    if not other.fits and other.peak_bytes:
        return f"{name} does not fit: at least {gib(round(other.peak_bytes))}"
    if not other.full_tokens:
        return f"{name}: {other.why}"
    if has_time(chosen, eta) and not has_time(other, eta):
        return (
            f"{name} has too little time: {other.trials} trials, and a full run of {other.passes:.2g} passes "
            f"over the data; {eta} and {LEAST_PASSES:g} are the least"
        )
    if other.model == chosen.model:
        return f"{name} trains {other.tokens_per_second / chosen.tokens_per_second:.2f} times as fast"
    return (
        f"{name} would have {other.trials} trials and {other.passes:.2g} passes over the data, with "
        f"{other.weights / 1e9:.2g}B weights instead of {chosen.weights / 1e9:.2g}B"
    )


def named(base: BaseRow) -> str:
    """A base as a person calls it."""
    return f"{base.model} in {base.quantization}" if base.quantization else base.model


def _guesses(each: Sequence[Inputs], slow: float) -> list[Guess]:
    """What all of it rests on, once."""
    shapes = [
        Guess(
            f"shape of {one.settings.model}",
            f"{one.known_shape.weights / 1e9:.2f}B weights",
            one.shape_source,
        )
        for one in each
    ]
    own = ("shape of the model", "routed experts", "learning rate")
    common = [guess for guess in guesses_of(each[0], {}, False) if guess.what not in own]
    tokens = Guess("tokens", "the same for every model", "a run counts them with each model's own tokenizer")
    slower = [Guess("slower", f"{slow:g} times", "--slow")] if slow != 1 else []
    return [*shapes, *common, tokens, *slower]
