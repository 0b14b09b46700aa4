"""What can be said of a run before anything is fetched, prepared or measured; ``plan`` shows all of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from budgetsearch.core.errors import BudgetError, DeviceError, LateError, ModelError, UsageError
from budgetsearch.core.policy.jobs import OPTIONAL_SHARE, probe_seconds
from budgetsearch.core.policy.minimum import too_small
from budgetsearch.core.policy.planning import minimum_seconds
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.records import Calibration
from budgetsearch.core.resources.disk import CHECKPOINT_BYTES
from budgetsearch.core.resources.memory import LEAST_POSITIONS, foresee
from budgetsearch.core.space.models import without_models
from budgetsearch.core.space.space import Space
from budgetsearch.machine.clock import Timing
from budgetsearch.machine.configs import find_config, find_shape, folder_of
from budgetsearch.machine.detect import Card, detect
from budgetsearch.machine.profiles import profile
from budgetsearch.machine.shapes import ModelShape, shape_of
from budgetsearch.run.calibrations import calibrations_of, preparation_of
from budgetsearch.run.guesses import TrainedWith, guess_calibration
from budgetsearch.run.lengths import lengths_of, with_longest
from budgetsearch.run.preflight import Resolved, check_inputs, known_shape
from budgetsearch.run.prepare import DataSize, request_for
from budgetsearch.run.settings import Settings
from budgetsearch.run.spaces import load_space
from budgetsearch.storage.files import cache_folder
from budgetsearch.training.data.frame import frame_of
from budgetsearch.training.data.size import DataGuess, Reading, guess_data

SETUP_SECONDS = 20.0
"""Imports, and tokenizing data that are on disk."""
LEAST_SETUP_SECONDS = 5.0
"""The same where everything is fast: only what would be too little even there is refused by a guess. What it
takes here is measured, and then refused or not."""
RAY_SECONDS = 15.0
"""What Ray's own start adds to that (docs/scale.md)."""
FETCH_SECONDS = 30.0
"""Fetching a wheel and converting its model, once."""
LEAST_FETCH_SECONDS = 10.0
PROBES = 6
"""Sizes that a calibration tries where it has the time, each for its time and a step of warm-up."""
FILLED = 0.9
"""Of the positions of a pass that are tokens: rows of similar length come together (docs/training.md)."""
EVALUATED = 16
"""Examples by which a calibration times an evaluation."""


AGAIN = "{:.0f} s of that went to fetching and converting the model, which is done: start the run again"
LATE_FACTOR = 2.0
"""A preparation that was not done in time is taken to need so many times what it had."""


@dataclass(frozen=True)
class Setup:
    """Seconds until the first calibration begins."""

    usual: float
    """What it took the last time, or mostly takes."""
    least: float
    """Where everything is fast; no less than it took the last time."""

    def slowed(self, slow: float) -> Setup:
        """On a machine that is so many times slower."""
        return Setup(slow * self.usual, slow * self.least)


@dataclass(frozen=True)
class Inputs:
    """What is known before anything is guessed."""

    settings: Settings
    space: Space
    card: Card
    shape: ModelShape | None
    shape_source: str
    data: DataGuess

    @property
    def setup(self) -> Setup:
        """Until the first calibration begins."""
        fetched = Setup(FETCH_SECONDS, LEAST_FETCH_SECONDS) if self._fetches else Setup(0.0, 0.0)
        if (known := preparation_of(self.settings).find()) is not None:
            return Setup(known + fetched.usual, known + fetched.least)
        ray = RAY_SECONDS if on_ray(self.settings) else 0.0
        return Setup(SETUP_SECONDS + ray + fetched.usual, LEAST_SETUP_SECONDS + ray + fetched.least)

    @property
    def _fetches(self) -> bool:
        """The model comes in a wheel that is not here yet."""
        folder = folder_of(self.settings.model, self.settings.revision, cache_folder())
        return self.settings.model.startswith("pypi:") and not (folder and folder.is_dir())

    @property
    def known_shape(self) -> ModelShape:
        """The shape, where everything else was refused before."""
        assert self.shape is not None
        return self.shape


def on_ray(settings: Settings) -> bool:
    """The run takes Ray, or would have to."""
    return settings.engine == "ray" or (settings.gpus or 1) > 1


def gather(settings: Settings, cache: Path, *, need_shape: bool = True) -> Inputs:
    """Card, shape, space and data of the settings, without touching anything.

    ``need_shape``: nothing else will tell what fits.

    Raises:
        UsageError: an input, the model or the card cannot be used.
    """
    space = load_space(settings.space)
    settings = with_longest(settings, space)
    check_inputs(settings, space)
    shape, source = None, "unknown"
    try:
        shape, source = _shape(settings, cache)
        shape.check_targets(space.targets(settings.targets))
    except ModelError:
        if need_shape:
            raise
    return Inputs(settings, space, _card(settings), shape, source, _data(settings, cache))


def _data(settings: Settings, cache: Path) -> DataGuess:
    """What the data hold, by their first rows and the model's template."""
    frame = frame_of(folder_of(settings.model, settings.revision, cache), settings.template)
    reading = Reading(frame, settings.columns, settings.system or "", settings.max_length)
    return guess_data(settings.data, settings.max_rows, reading)


def _shape(settings: Settings, cache: Path) -> tuple[ModelShape, str]:
    """The shape from sizes or files; where only the modules of the model tell, transformers builds them."""
    try:
        return find_shape(settings.model, settings.revision, cache)
    except ModelError as error:
        config, source = find_config(settings.model, settings.revision, cache)
        from budgetsearch.training.anatomy import built_table

        try:
            table = built_table(config)
        except ModelError as why:
            raise ModelError(f"{error} transformers does not build it either: {why}") from why
        return shape_of(config, settings.model, table), f"{source}, built without weights"


def check_hours(run: Resolved, budget_seconds: float, cache: Path) -> None:
    """Refuse what cannot even train one configuration, as far as that is known without fetching anything.

    Raises:
        BudgetError: the budget is below the minimum that the guesses come to.
    """
    if run.card is None:
        return
    late: list[BudgetError] = []
    for settings in run.settings.apart:
        shape = known_shape(settings, cache)
        if shape is None:
            return
        inputs = Inputs(settings, without_models(run.space), run.card, shape, "", _data(settings, cache))
        request = guessed_request(inputs, budget_seconds)
        try:
            check_minimum(request, guessed_calibrations(inputs, request), inputs.setup)
            return  # one that fits suffices: what there is no time for is not measured
        except BudgetError as error:
            late.append(error)
    raise late[0]


def too_late(run: Resolved, timing: Timing, once: float, error: LateError) -> UsageError:
    """What to say where the preparation has used up the budget: from now on ``plan`` and ``run`` reckon with
    what it took, less what was done ``once`` and for all, in seconds. The ``error`` itself where nothing can
    be foreseen."""
    spent, cache = timing.clock.now() - once, cache_folder()
    preparation_of(run.settings).keep(LATE_FACTOR * spent)
    try:
        check_hours(run, timing.budget_seconds, cache)
    except BudgetError as found:
        return found
    return LateError(f"{error}. {AGAIN.format(once)}") if once else error


def check_minimum(request: PlanRequest, found: Mapping[str, Calibration], setup: Setup) -> None:
    """Refuse a budget that does not suffice to measure the first quantization that fits and to train with it,
    however fast this machine prepares a run; what is named is what it mostly takes.

    Raises:
        BudgetError: the budget is below that minimum.
    """
    first = next((c for c in found.values() if c.status == "ok"), None)
    if first is None:
        return
    spent = setup.usual + measuring_seconds(first, request, 0.0)
    minimum = minimum_seconds(request, {first.quantization: first}, spent)
    if minimum - (setup.usual - setup.least) > request.budget_seconds:
        ground = "" if first.measured else "nothing was measured here yet"
        raise too_small(request.budget_seconds, minimum, guessed=ground)


def measuring_seconds(found: Calibration, request: PlanRequest, limit_seconds: float) -> float:
    """What it takes to find out what a calibration says, if that is not known already; what is optional in it
    ends after its share of the limit."""
    if found.measured:
        return 0.0
    step = request.step_tokens / request.rate(found)
    probe = step + max(2 * step, probe_seconds(request.budget_seconds))
    optional = min((PROBES - 1) * probe, max(0.0, OPTIONAL_SHARE * limit_seconds - probe))
    evaluated = EVALUATED * found.eval_seconds_per_example
    return found.load_seconds + probe + optional + evaluated + found.checkpoint_seconds


def slowed(calibration: Calibration, slow: float) -> Calibration:
    """A measured calibration on a machine that turns out so many times slower."""
    return replace(
        calibration,
        tokens_per_second=calibration.tokens_per_second / slow,
        eval_seconds_per_example=calibration.eval_seconds_per_example * slow,
        checkpoint_seconds=calibration.checkpoint_seconds * slow,
        load_seconds=calibration.load_seconds * slow,
        answer_seconds=calibration.answer_seconds * slow,
    )


def guessed_request(inputs: Inputs, budget_seconds: float) -> PlanRequest:
    """What the plan would rest on, with a guess at the size of the data."""
    settings, data = inputs.settings, inputs.data
    valid = 0 if settings.valid else max(1, round(data.rows * settings.valid_share))
    if settings.valid:
        valid = guess_data(settings.valid, None).rows
    train = data.rows if settings.valid else max(1, data.rows - valid)
    tokens = min(data.tokens_per_row, settings.max_length)
    shares = tuple((length, min(1.0, length / tokens)) for length in lengths_of(inputs.space))
    size = DataSize(max(1, round(train * tokens)), train, valid, settings.max_length, shares)
    request = request_for(settings, budget_seconds, inputs.card, inputs.space, size, inputs.known_shape)
    return replace(request, max_gang=1)  # what gangs gain is measured, never guessed


def guessed_calibrations(inputs: Inputs, request: PlanRequest, slow: float = 1.0) -> dict[str, Calibration]:
    """What earlier runs measured, and else what the calibrations may find; all ``slow`` times slower."""
    kept = calibrations_of(inputs.settings, inputs.space, inputs.card, request.budget_seconds)
    found = {name: kept.find(name) for name in inputs.space.quantizations}
    return {
        name: slowed(known, slow) if known else _guessed(inputs, request, name, slow)
        for name, known in found.items()
    }


def _guessed(inputs: Inputs, request: PlanRequest, name: str, slow: float) -> Calibration:
    limit, rule, length = inputs.card.usable_bytes, request.footprints[name], request.longest
    if name in request.refused:
        return Calibration(name, "refused", detail=request.refused[name])
    ahead = foresee(rule, limit, request.ranks, request.batch_size, length)
    if ahead.refusal:
        return Calibration(name, "out_of_memory", detail=ahead.refusal)
    needs = {rank: rule.bytes(rank=rank, tokens=length, recompute=True) for rank in request.ranks}
    # What is only a little too large, the run tries all the same.
    rank = max((r for r in request.ranks if needs[r] <= limit), default=min(request.ranks))
    plain, again = (
        rule.micro_batch(limit, rank=rank, length=length, most=request.batch_size, recompute=recompute)
        for recompute in (False, True)
    )
    # Half the speed for the recomputed third: worth it only where next to nothing fits without.
    recompute = plain == 0 or (plain * length < LEAST_POSITIONS and again >= 4 * plain)
    weights = inputs.known_shape.weights_per_rank(inputs.space.targets(inputs.settings.targets))
    micro, row = max(1, again if recompute else plain), request.train_tokens / request.train_rows
    # A pass has room for positions, rows x width, so short rows come together; never more than a step has.
    room = min(request.batch_size * row, max(row, FILLED * micro * length))
    return guess_calibration(
        inputs.known_shape,
        inputs.card.profile,
        TrainedWith(name, rank, micro, recompute, room),
        cores=os.cpu_count() or 1,
        tokens_per_row=row,
        adapter_bytes=CHECKPOINT_BYTES * rank * weights,
        slow=slow,
    )


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
