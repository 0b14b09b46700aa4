"""What stands beside a run, from Python: plan, doctor, compare, reproduce, verify, dashboard, simulate."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from budgetsearch.api.display import log
from budgetsearch.api.explained import explained
from budgetsearch.api.given import given
from budgetsearch.api.runs import open_history
from budgetsearch.core.errors import UsageError
from budgetsearch.run.configuration import load_settings
from budgetsearch.run.settings import RunSettings
from budgetsearch.storage.files import cache_folder
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.tools.compare.tasks import Tasks
from budgetsearch.tools.reproduce.inputs import Places

if TYPE_CHECKING:
    from budgetsearch.tools.compare.comparison import Comparison
    from budgetsearch.tools.doctor.check import Check
    from budgetsearch.tools.inspect.look import Inspection
    from budgetsearch.tools.plan.preview import Preview
    from budgetsearch.tools.reproduce.replay import Reproduced
    from budgetsearch.tools.reproduce.verify import Verified
    from budgetsearch.tools.simulate.contest import Outcome


@explained
def plan(
    *,
    slow: float = 1.0,
    probe: bool = False,
    config: str | os.PathLike[str] | None = None,
    **settings: Unpack[RunSettings],
) -> Preview:
    """Foresee what ``run`` with the same settings would do: what fits, the ladder, when each phase begins.

    Nothing is spent, and nothing fetched but a Hub model's config.json where it is not known. ``slow``:
    everything takes so many times as long. ``probe``: load the model and measure real steps first.

    Raises:
        UsageError: a setting, the model or the card cannot be used, nothing fits, or the hours are too few.
    """
    from budgetsearch.run.foresight import gather
    from budgetsearch.tools.plan.preview import preview
    from budgetsearch.tools.plan.probe import probe_here

    if not 0.1 <= slow <= 100:
        raise UsageError(f"--slow must be from 0.1 to 100; it is {slow:g}.")
    known = load_settings(given(settings), Path(config) if config else None)
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
    tick: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Comparison:
    """Put runs side by side: paired differences on the same validation rows, and what each run cost.

    Without ``tasks`` the ledgers alone are read; else each base and adapter is asked them, and the answers
    are kept in the run folders. ``baseline``: the run that each other one is paired with. ``tick`` hears
    (what is asked, answers so far, answers in all).

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
        say=log,
        tick=tick,
    )


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
