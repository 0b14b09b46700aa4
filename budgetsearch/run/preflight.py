"""What is looked at before a run touches anything: what its settings mean here, its inputs, room on disk."""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from budgetsearch.core.bases import labels_of
from budgetsearch.core.errors import (
    DataError,
    ModelError,
    RunFolderError,
    SettingsError,
    SpaceError,
    nearest,
)
from budgetsearch.core.ladders import DEEP
from budgetsearch.core.ports import Say
from budgetsearch.core.resources.disk import DiskNeed, most_held, need_of
from budgetsearch.core.space.knobs import KNOBS, SETTINGS
from budgetsearch.core.space.models import with_models
from budgetsearch.core.space.space import Space
from budgetsearch.core.targets import words_of
from budgetsearch.machine.configs import find_shape, known_models
from budgetsearch.machine.detect import Card, detect
from budgetsearch.machine.shapes import ModelShape
from budgetsearch.run.choose_engine import check_engine, is_elsewhere
from budgetsearch.run.first_guesses import said_of_tries, with_guesses
from budgetsearch.run.lengths import with_longest
from budgetsearch.run.metric import anchored_metric, said_of_metric, with_direction
from budgetsearch.run.recipe_inputs import anchored_recipe, check_recipe, recipe_space
from budgetsearch.run.settings import Settings
from budgetsearch.run.spaces import load_space
from budgetsearch.storage.shared import check_shared, folder_of, own_place
from budgetsearch.training.data.gym import GYM
from budgetsearch.training.data.models import BIG_MODEL
from budgetsearch.training.data.origins import Origin, check_spelling, on_hub, origins_of
from budgetsearch.training.data.samples import check_rows
from budgetsearch.training.data.size import guess_data
from budgetsearch.training.data.sources import check_source
from budgetsearch.training.data.templates import written
from budgetsearch.views.study.storage import anchored_storage, check_url, shown


@dataclass(frozen=True)
class Resolved:
    """The settings of a run and what they mean on this machine, found once."""

    settings: Settings
    space: Space
    card: Card | None
    """None: it is on another machine of a cluster, and only a worker there can say which."""


def resolve(settings: Settings) -> Resolved:
    """Check everything that can be checked without fetching or writing anything.

    Raises:
        UsageError: the card, the model's source or another input cannot be used.
    """
    card = card_of(settings)
    if settings.recipe is not None:
        check_recipe(settings)
        space = space_of(settings)
        settings = with_guesses(settings, space)
        said_of_tries(settings, space)
        _storage(settings, space)
        _shared(settings, space)
        return Resolved(settings, space, card)
    for model in settings.models:
        check_source(model)
    space = space_of(settings)
    settings = with_longest(with_guesses(settings, space), space)
    check_inputs(settings, space)
    return Resolved(with_direction(settings), space, card)


def space_of(settings: Settings) -> Space:
    """What is searched: the space that the settings name, or a recipe's own.

    Raises:
        SpaceError: there is none, or it is broken.
    """
    if settings.recipe is not None:
        return recipe_space(settings)
    found = load_space(settings.space)
    return with_models(found, labels(settings)) if len(settings.models) > 1 else found


def card_of(settings: Settings) -> Card | None:
    """The card that engine and settings mean; None where a cluster has it.

    Raises:
        UsageError: it cannot be used, or the settings contradict each other.
    """
    check_engine(settings)
    return None if is_elsewhere(settings) else detect(settings.gpu, settings.device)


def labels(settings: Settings) -> tuple[str, ...]:
    """What a run calls its models: the same before its settings are ``anchored`` and after."""
    return labels_of([_absolute(source) for source in settings.models])


def anchored(settings: Settings) -> Settings:
    """The same settings with absolute paths, so that a resume works from any folder."""
    local: dict[str, Any] = {
        name: str(Path(source).expanduser().absolute())
        for name in ("space",)
        if isinstance(source := getattr(settings, name), str) and Path(source).expanduser().exists()
    }
    local["model"] = "\n".join(map(_absolute, settings.models))
    local |= {
        name: "\n".join(_anchored(origin) for origin in origins_of(data))
        for name in ("data", "valid")
        if (data := getattr(settings, name))
    }
    if isinstance(settings.space, str) and not Path(settings.space).suffix:
        local.pop("space", None)  # a name that comes with the package
    local["metric"] = anchored_metric(settings.metric)
    if settings.recipe:
        local["recipe"] = anchored_recipe(settings.recipe)
    if settings.template:
        local["template"] = written(settings.template)  # a file may change or go
    local["storage"] = anchored_storage(settings.storage)
    if settings.shared:
        assert settings.out is not None
        local["shared"] = own_place(settings.shared, settings.out.name)
    return settings.model_copy(update=local)


def _absolute(source: str) -> str:
    """A model's folder or file as an absolute path; any other source as it is."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def _anchored(origin: Origin) -> str:
    """Of a pattern the folder that it is looked for in; what is not on this disk stays as it is."""
    path = Path(origin.source).expanduser()
    generated = origin.source.startswith(GYM)  # its parameters look like a pattern
    here = path.exists() or (glob.has_magic(origin.source) and not generated and not on_hub(origin.source))
    bare, sign, query = origin.source.rpartition("?split=")
    if not here and sign and Path(bare).expanduser().exists():
        return origin.at(f"{Path(bare).expanduser().absolute()}{sign}{query}")
    return origin.at(str(path.absolute()) if here else origin.source)


# ------------------------------------------------------------------------------- the inputs


@dataclass(frozen=True)
class Input:
    """Something that a run, a plan and the doctor look at alike."""

    name: str
    look: Callable[[Settings, Space], str]
    """What was found, on one line; empty where the settings name no such thing. Raises UsageError."""


def check_inputs(settings: Settings, space: Space) -> None:
    """Check what needs neither the card nor the model, and no network.

    Raises:
        UsageError: the space, the targets, the data or the storage cannot be used.
    """
    for each in INPUTS:
        each.look(settings, space)


def _space(settings: Settings, space: Space) -> str:
    if space.extra:
        known = (*KNOBS, *SETTINGS)
        unknown = ", ".join(f"{name}{nearest(name, known)}" for name in space.extra)
        raise SpaceError(
            f"The search space {space.name} has dimensions that training does not know: {unknown}. It knows "
            f"{', '.join(known)}."
        )
    return f"{space.name}, ranks {', '.join(map(str, space.ranks))}, {', '.join(space.quantizations)}"


def _targets(settings: Settings, space: Space) -> str:
    found = space.targets(settings.targets)
    for where, targets in (("--targets", settings.targets), (f"targets of {space.name}:", found)):
        if not all(words_of(targets)):
            raise SettingsError(
                f"{where} {targets!r} holds an empty name; write q_proj,v_proj or all-linear."
            )
    return found


def _rows(data: str | None, columns: str | None) -> str:
    found = origins_of(data or "", columns)
    for origin in found:
        try:
            if not check_spelling(origin.source):
                check_rows(origin)
        except OSError as error:
            raise DataError(f"{origin.source[:200]} cannot be read: {error.strerror or error}.") from error
    return ", ".join(origin.at(origin.source) for origin in found)


def _storage(settings: Settings, space: Space) -> str:
    if not settings.storage:
        return ""
    check_url(settings.storage)
    return shown(settings.storage)


def _shared(settings: Settings, space: Space) -> str:
    if settings.shared:
        check_shared(settings.shared)
    return settings.shared or ""


INPUTS = (
    Input("metric", said_of_metric),
    Input("space", _space),
    Input("tries", said_of_tries),
    Input("targets", _targets),
    Input("data", lambda settings, space: _rows(settings.data, settings.columns)),
    Input("validation", lambda settings, space: _rows(settings.valid, None)),
    Input("storage", _storage),
    Input("shared", _shared),
)
"""In the order in which they are refused."""


# ----------------------------------------------------------------------------- room on disk

FULL_RUNS = 8
"""Before anything is measured nobody knows how many full runs the budget holds: so many are assumed, and
where it holds more, fewer trials than that wait for one."""
TOKENIZER_BYTES = 32 * 2**20
"""Of a tokenizer that is not here yet: an allowance."""
ROW_BYTES = 12
"""Of a tokenized row beside its tokens."""


def check_room(resolved: Resolved, budget_seconds: float, cache: Path, say: Say) -> None:
    """Look at the disks of the run folder and of the cache, as far as the model is known without fetching it.

    Raises:
        RunFolderError: not even the least that a run needs fits.
    """
    settings = resolved.settings
    assert settings.out is not None
    if settings.recipe is not None:
        return  # nobody knows how large its checkpoints are
    shapes = {one.model: known_shape(one, cache) for one in settings.apart}
    known = {model: shape for model, shape in shapes.items() if shape is not None}
    if len(known) < len(shapes):
        say("disk: the need is not known before the model is here; it is looked at then")
        return
    data = guess_data(settings.data, settings.max_rows)
    tokens = data.rows * data.tokens_per_row
    added = [each for m, shape in known.items() for each in cache_need(m, shape, data.rows, tokens).items()]
    weights = max(largest_adapter(settings.targets, resolved.space, shape) for shape in known.values())
    need = run_need(settings, weights, budget_seconds, _folder(settings.models[0]))
    extra = sum(size or 0 for _, size in added)
    together = os.stat(standing(settings.out)).st_dev == os.stat(standing(cache)).st_dev
    if not together and (free := free_bytes(cache)) < extra:
        raise RunFolderError(
            f"The cache {cache} has {amount(free)} free, but {amount(extra)} are needed "
            f"({', '.join(what for what, _ in added)}). Make room, or name another folder with "
            "BUDGETSEARCH_CACHE."
        )
    check_disks(settings.shared, settings.out, need, say, extra if together else 0)


def check_disks(
    shared: str | None, out: Path, need: DiskNeed, say: Say = lambda line: None, extra: int = 0
) -> int | None:
    """Insist on the least that a run needs in its folder ``out`` and where its checkpoints lie.

    Returns how many trials that wait may keep a checkpoint; None: behind a URL nobody knows.

    Raises:
        RunFolderError: it does not fit.
    """
    if not shared:
        return check_run_folder(out, need, say, extra)
    folder = folder_of(shared)
    # Behind a URL the run folder holds copies of the best adapter; with a folder, no checkpoints at all.
    here = replace(need, checkpoint=need.adapter if folder is None else 0, held=0, gang=0)
    check_run_folder(out, here, extra=extra)
    return None if folder is None else check_run_folder(folder, need, say, flag="--shared")


def check_run_folder(
    out: Path, need: DiskNeed, say: Say = lambda line: None, extra: int = 0, flag: str = "--out"
) -> int:
    """Insist on the least that a run needs; returns how many trials that wait may keep a checkpoint.

    ``extra``: bytes that go to the same disk beside the run. ``flag``: what names the folder.

    Raises:
        RunFolderError: it does not fit.
    """
    free = free_bytes(out) - extra
    least, most = amount(need.least), amount(need.most)
    if free < need.least:
        raise RunFolderError(
            f"{flag} {out}: its disk has {amount(max(0, free))} free, but a run needs at least {least} there "
            f"and {most} at most (checkpoints of {amount(need.checkpoint)} at the largest rank, the adapter "
            "twice, and the records). Make room, name a folder on another disk, give fewer --hours, or use a "
            "--space with smaller ranks."
        )
    held = need.affordable(free)
    if free < need.most:
        say(
            f"disk: {amount(free)} are free for {out}, and {most} could be used at most; so {held} trials "
            "that wait keep a checkpoint, and the others are dropped earlier"
        )
    return held


def largest_adapter(targets: str, space: Space, shape: ModelShape) -> int:
    """Weights of an adapter of the largest rank that the space can ask for."""
    return shape.weights_per_rank(space.targets(targets)) * max(space.ranks)


def run_need(settings: Settings, weights: int, budget_seconds: float, base: Path | None = None) -> DiskNeed:
    """The need of the run folder with so many weights in the largest adapter. ``base``: the folder of the
    base model, where it is known."""
    workers = settings.gpus or 1
    held = most_held(eta=settings.eta, top_rung=len(DEEP) - 1, full_runs=FULL_RUNS, workers=workers)
    return need_of(
        weights,
        tokenizer_bytes=_tokenizer_bytes(base) if base is not None else TOKENIZER_BYTES,
        budget_seconds=budget_seconds,
        held=min(held, workers * settings.max_trials),
        gang=workers * (settings.max_gang if settings.optimizer == "adamw" else 1),
    )


def cache_need(model: str, shape: ModelShape | None, rows: int, tokens: float) -> dict[str, int | None]:
    """Bytes that a run adds to the cache, by what they are; None: unknown. A folder is used where it lies."""
    tokenized = int(4 * tokens) + ROW_BYTES * rows
    path = Path(model).expanduser()
    if path.is_dir():
        return {"tokenized data": tokenized}
    converted = None
    if path.suffix == ".gguf" and shape is not None:
        converted = shape.weights * (2 if shape.weights > BIG_MODEL else 4)
    return {"tokenized data": tokenized, "model": converted}


def amount(size: int) -> str:
    """Bytes as a person reads them: ``39.35 GiB``, ``12.5 MiB``."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def standing(path: Path) -> Path:
    """The nearest folder that exists: it decides on the disk."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if os.path.exists(p))


def free_bytes(path: Path) -> int:
    """What this user may still write there."""
    found = shutil.disk_usage(standing(path))
    return found.free if found.total else sys.maxsize  # /proc is no disk: making a folder there says so


def known_shape(settings: Settings, cache: Path) -> ModelShape | None:
    """The shape of the model, if it is known without asking anybody."""
    model = settings.model
    here = Path(model).expanduser().exists() or model.startswith("pypi:") or model in known_models()
    if not here:
        return None
    try:
        return find_shape(model, settings.revision, cache)[0]
    except ModelError:
        return None


def _folder(model: str) -> Path | None:
    path = Path(model).expanduser()
    return path if path.is_dir() else None


def _tokenizer_bytes(base: Path) -> int:
    """Every small file of the model's folder: the tokenizer is among them."""
    files = [path for path in base.iterdir() if path.is_file() and path.suffix != ".safetensors"]
    return sum(path.stat().st_size for path in files)
