"""What stands beside a run, from Python: plan, doctor, compare, reproduce, export, dashboard, and others."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from budgetsearch.api.display import log
from budgetsearch.api.explained import explained
from budgetsearch.api.given import given
from budgetsearch.api.runs import open_history
from budgetsearch.core.errors import SpaceError, UsageError
from budgetsearch.run.configuration import check_one_model, load_settings
from budgetsearch.run.permissions import Places
from budgetsearch.run.settings import RunSettings
from budgetsearch.run.spaces import load_space
from budgetsearch.storage.files import cache_folder
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.tools.compare.tasks import Tasks
from budgetsearch.training.recipes.contract import Examination, Promise
from budgetsearch.training.recipes.loading import code_of, find_recipe, load_recipe
from budgetsearch.training.recipes.protocol import Recipe

if TYPE_CHECKING:
    from budgetsearch.tools.compare.comparison import Comparison
    from budgetsearch.tools.doctor.check import Check
    from budgetsearch.tools.export.wanted import Made, Wanted
    from budgetsearch.tools.inspect.look import Inspection
    from budgetsearch.tools.plan.bases import BasesPreview
    from budgetsearch.tools.plan.preview import Preview
    from budgetsearch.tools.plan.recipe import RecipePreview
    from budgetsearch.tools.reproduce.replay import Reproduced
    from budgetsearch.tools.reproduce.verify import Verified
    from budgetsearch.tools.serve.command import Serving
    from budgetsearch.tools.simulate.contest import Outcome
    from budgetsearch.tools.submit.entry import Entry, Submitting


@explained
def plan(
    *,
    slow: float = 1.0,
    probe: bool = False,
    config: str | os.PathLike[str] | None = None,
    **settings: Unpack[RunSettings],
) -> Preview | RecipePreview | BasesPreview:
    """Foresee what ``run`` with the same settings would do: what fits, the ladder, when each phase begins; of
    several models which one to take, and under which quantization.

    Nothing is spent, and nothing fetched but a Hub model's config.json where it is not known. ``slow``:
    everything takes so many times as long. ``probe``: load the model and measure real steps first. A recipe
    is always measured.

    Raises:
        UsageError: a setting, the model or the card cannot be used, nothing fits, or the hours are too few.
    """
    from budgetsearch.run.foresight import gather
    from budgetsearch.tools.plan.preview import preview
    from budgetsearch.tools.plan.probe import probe_here

    if not 0.1 <= slow <= 100:
        raise UsageError(f"--slow must be from 0.1 to 100; it is {slow:g}.")
    known = load_settings(given(settings), Path(config) if config else None)
    if known.recipe is not None:
        from budgetsearch.tools.plan.recipe import preview_recipe

        return preview_recipe(known, log)
    if len(known.models) > 1 and not probe:
        from budgetsearch.tools.plan.bases import compare_bases

        return compare_bases(known, cache_folder(), slow)
    check_one_model(known)
    inputs = gather(known, cache_folder(), need_shape=not probe)
    return preview(inputs, slow, probe_here(known, log) if probe else None)


@explained
def doctor(
    *,
    config: str | os.PathLike[str] | None = None,
    tell: Callable[[Check], None] = lambda check: None,
    **settings: Unpack[RunSettings],
) -> list[Check]:
    """Check what a run with these settings needs; fetches and writes nothing.

    Every setting that is None comes from where ``run`` would take it. ``tell`` hears of each check as
    soon as it is done.

    Raises:
        UsageError: a setting is unknown or out of range.
    """
    from budgetsearch.tools.doctor.examine import examine

    file = Path(config) if config else None
    return examine(given(settings), cache=cache_folder(), config=file, say=tell)


@explained
def inspect(
    *,
    rows: int | None = 3,
    config: str | os.PathLike[str] | None = None,
    **settings: Unpack[RunSettings],
) -> Inspection:
    """Prepare the data as ``run`` with the same settings does, and show what will be trained.

    Nothing is trained; a run then finds the rows in the cache. ``rows``: so many are shown, None for all.

    Raises:
        UsageError: a setting, the model or the data cannot be used.
    """
    from budgetsearch.tools.inspect.look import look

    return look(load_settings(given(settings), Path(config) if config else None), log, rows)


def reproduce(
    run: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    alone: bool = False,
    anyway: bool = False,
    places: Places | None = None,
    tolerance: float | None = None,
) -> Reproduced:
    """Train the winner of a run again, from its manifest alone, and say what agrees.

    ``run``: a run, its adapter, or a manifest. ``out``: a folder for the reproduced adapter. ``alone``:
    without the trials that trained beside it. ``anyway``: although an input has changed. ``places``: where
    the inputs lie now, and whether the base may run its own code. ``tolerance``: of a loss, as a share of it.

    Raises:
        UsageError: there is no manifest, an input has changed or is missing, or the base needs code that is
            not allowed; it is named.
        EngineError: the worker cannot train here.
    """
    from budgetsearch.run.process import stop_signals
    from budgetsearch.tools.reproduce.replay import reproduce as replay

    with stop_signals():
        return replay(
            Path(run), out=Path(out) if out else None, alone=alone, anyway=anyway,
            given=places or Places(), tolerance=tolerance, say=log,
        )  # fmt: skip


def verify(
    run: str | os.PathLike[str],
    *,
    score: bool = True,
    places: Places | None = None,
    tolerance: float | None = None,
) -> Verified:
    """Check every hash in a run's manifest, and score its adapter again unless ``score`` is off.

    The arguments are those of ``reproduce``.

    Raises:
        UsageError: there is no manifest, it cannot be read, or the base needs code that is not allowed.
    """
    from budgetsearch.run.process import stop_signals
    from budgetsearch.tools.reproduce.verify import verify as check

    with stop_signals():
        return check(Path(run), score=score, given=places or Places(), tolerance=tolerance, say=log)


def compare(
    runs: Sequence[str | os.PathLike[str]],
    *,
    tasks: Tasks | str | None = None,
    baseline: str | os.PathLike[str] | None = None,
    price: float | None = None,
    tick: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Comparison:
    """Put runs side by side: paired differences on the same validation rows, and what each run cost.

    Without ``tasks`` the ledgers alone are read; else each base and adapter is asked them, and the answers
    are kept in the run folders. ``baseline``: the run that each other one is paired with. ``price``: of an
    hour of the card. ``tick`` hears (what is asked, answers so far, answers in all).

    Raises:
        UsageError: a folder is not a run, or an option cannot be used.
        BudgetsearchError: a task cannot be run.
    """
    from budgetsearch.tools.compare import command

    return command.compare(
        [Path(run) for run in runs],
        cache=cache_folder(),
        tasks=tasks if isinstance(tasks, Tasks) else Tasks(tasks),
        baseline=Path(baseline) if baseline else None,
        price=price,
        say=log,
        tick=tick,
    )


def export(
    run: str | os.PathLike[str],
    *,
    wanted: Wanted,
    places: Places | None = None,
    gpu: str | None = None,
) -> list[Made]:
    """Make the wanted forms of a finished run's adapter; each is loaded again and its loss compared.

    ``places``: where the inputs lie now, and whether the base may run its own code. ``gpu``: the card to load
    on; None: that of the run.

    Raises:
        UsageError: the run is not finished, or what is wanted cannot be made of it.
        BudgetsearchError: a form does not compute what the adapter does, or could not be written or pushed.
    """
    from budgetsearch.tools.export.command import export as make

    return make(Path(run), wanted, given=places or Places(), gpu=gpu, say=log)


def serve(run: str | os.PathLike[str], *, how: Serving | None = None) -> None:
    """Answer over HTTP with a finished run's adapter, or a merged model, until the process is told to stop.

    Raises:
        UsageError: the folder, the base model, the card or the port cannot be used.
    """
    from budgetsearch.tools.serve.command import Serving
    from budgetsearch.tools.serve.command import serve as answer

    answer(Path(run), how or Serving(), log)


def submit(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    how: Submitting | None = None,
    places: Places | None = None,
) -> Entry:
    """Make an entry to the NeurIPS LLM Efficiency Challenge of a finished run, in the new folder ``out``.

    ``places``: where the inputs lie now, and whether the base may run its own code.

    Raises:
        UsageError: the run is not finished, a licence is not known to be open, it does not fit the card, or
            an input is not what it was.
        BudgetsearchError: its steps do not work in a fresh virtual environment, or it could not be written.
    """
    from budgetsearch.tools.submit.command import submit as make
    from budgetsearch.tools.submit.entry import Submitting

    return make(Path(run), Path(out), how or Submitting(), places or Places(), log)


def dashboard(*runs: str | os.PathLike[str], port: int | None = None) -> None:
    """Serve the runs in one view on loopback until the process is interrupted; going runs are followed.

    ``port``: without one the first that is free from 8080 on. It prints the address once it answers.

    Raises:
        RunFolderError: there is no run in a folder.
        UsageError: no run, one of them twice, or a port that cannot be used.
    """
    from budgetsearch.views.dashboard import serve

    folders = [RunFolder(Path(run)) for run in runs]
    if len({folder.path.resolve() for folder in folders}) < max(1, len(folders)):
        raise UsageError("Name at least one run, and none of them twice.")
    for folder in folders:
        open_history(folder.path)
    serve(folders, port, partial(print, flush=True))


def simulate(
    curves: Sequence[str | os.PathLike[str]],
    *,
    budgets: Sequence[float] = (4.0, 10.0, 30.0),
    seeds: int = 20,
    jobs: int | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Outcome]:
    """Play the policy and random search on recorded learning curves, in virtual time.

    ``curves``: .npz files (docs/curves.md) or folders of them. ``budgets``: in mean full runs. ``seeds``:
    runs of each on each table. ``jobs``: processes; None: one for each CPU. ``tell`` hears (runs done,
    runs in all).

    Raises:
        UsageError: a table or a method that does not exist, or a budget that is none.
    """
    from budgetsearch.tools.simulate import contest

    tables = contest.find_tables([Path(path) for path in curves])
    return contest.compete(tables, budgets, seeds, jobs, tell)


def check(
    recipe: str | type[Recipe],
    *,
    space: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    device: str = "cpu",
    seen: Callable[[Promise], None] = lambda promise: None,
) -> list[Promise]:
    """Try on a recipe what every recipe promises; its code runs in this process.

    Args:
        recipe: ``my_module:MyRecipe``, or the class.
        space: the search space; None: the recipe's own.
        device: ``cpu`` or ``cuda:N``.
        seen: hears of each point as soon as it is known.

    Raises:
        RecipeError: it cannot be found or loaded.
        SpaceError: it has no search space, or a broken one.
    """
    code = find_recipe(recipe) if isinstance(recipe, str) else code_of(recipe)
    found = load_recipe(code)
    given: Any = found.space if space is None else space
    if given is None:
        raise SpaceError(f"{code.name} has no search space of its own; name one with --space FILE.yaml.")
    return Examination(found, load_space(given, free=True), device, seen).examine()


def unpack(model: str, folder: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Write a copy in 16 bits of a base model whose checkpoint is quantized; returns its folder.

    Raises:
        UsageError: the model cannot be found or fetched, or it is nothing that can be unpacked.
    """
    from budgetsearch.training.data.models import resolve_model
    from budgetsearch.training.data.unpacking import unpack as write

    base = resolve_model(model, cache_folder(), revision=revision, say=log)
    return write(base.path, Path(folder), log)
