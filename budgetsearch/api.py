"""The Python API: from settings to a finished ``Result``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack, get_type_hints

from budgetsearch.core.errors import RunFolderError, SettingsError, UsageError
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.history import History
from budgetsearch.core.ports import Say, Watcher
from budgetsearch.run import session
from budgetsearch.run.result import Result
from budgetsearch.run.session import Caller, never_began
from budgetsearch.run.settings import Changes, RunSettings, Settings, load_settings, names_out, settings_help
from budgetsearch.storage.files import cache_folder
from budgetsearch.storage.ledger import read_entries, read_history
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.tools.compare.tasks import Tasks
from budgetsearch.tools.reproduce.inputs import Places
from budgetsearch.views.report.write import Reports, write_reports

if TYPE_CHECKING:
    from budgetsearch.tools.compare.comparison import Comparison
    from budgetsearch.tools.doctor.check import Check
    from budgetsearch.tools.plan.preview import Preview
    from budgetsearch.tools.reproduce.replay import Reproduced
    from budgetsearch.tools.reproduce.verify import Verified

P = ParamSpec("P")
T = TypeVar("T")


def _explained(function: Callable[P, T]) -> Callable[P, T]:
    """Let the help of a function with ``**settings`` name each of them, as its signature does."""
    own = inspect.signature(function)
    kinds = get_type_hints(RunSettings)
    settings = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kinds[name])
        for name in Settings.model_fields
    ]
    known = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = own.replace(parameters=[*known, *settings])  # type: ignore[attr-defined]
    function.__doc__ = f"{inspect.getdoc(function)}\n\nSettings:\n{settings_help()}"
    return function


@_explained
def run(
    *,
    config: str | os.PathLike[str] | None = None,
    resume: str = "never",
    watchers: Sequence[Watcher] = (),
    say: Say = lambda line: None,
    already_seconds: float = 0.0,
    last_resort: bool = False,
    **settings: Unpack[RunSettings],
) -> Result:
    """Search for the best adapter within the budget; returns before the deadline.

    A setting that is not given, or None, comes from ``config`` (or ``budgetsearch.yaml`` in the working
    folder), else from the card's profile, else from its default.

    Args:
        config: a YAML file of settings.
        resume: ``auto``: go on with the run in ``out`` if there is one, with its own settings.
        watchers: see every event.
        say: takes lines about the preparation.
        already_seconds: so much of the budget is already gone.
        last_resort: end this process when the time is over, whatever hangs in it.

    Raises:
        UsageError: a setting, the data, the model, the card or the folder cannot be used; nothing
            was touched.
        BudgetError: the budget is below the measured minimum.
        EngineError: the worker cannot train here.
    """
    if resume not in ("never", "auto"):
        raise SettingsError(f"--resume {resume}: use never or auto.")
    file = Path(config) if config else None
    chosen = load_settings(settings, file)
    assert chosen.out is not None
    folder, caller = chosen.out, Caller(watchers, say, already_seconds, last_resort)
    if resume == "auto":
        if not (settings.get("out") or names_out(file)):
            raise SettingsError("--resume auto needs --out: the folder in which the run is, or will be.")
        if RunFolder(folder).has_ledger():
            say(f"going on with the run in {folder}, with its own settings")
            again = Changes(
                storage=chosen.storage,
                deadline=settings.get("deadline"),
                engine=settings.get("engine"),
                gpus=settings.get("gpus"),
                address=settings.get("address"),
            )
            return session.resume(RunFolder(folder), again, caller, patient=True)
    return session.start(chosen, caller)


@_explained
def plan(
    *,
    slow: float = 1.0,
    probe: bool = False,
    config: str | os.PathLike[str] | None = None,
    say: Say = lambda line: None,
    **settings: Unpack[RunSettings],
) -> Preview:
    """What ``run`` with the same settings would do: what fits, the ladder, when each phase begins.

    Nothing is spent, and nothing fetched but a Hub model's config.json where it is not known. ``slow``:
    everything takes so many times as long. ``probe``: load the model and measure real steps first.

    Raises:
        UsageError: a setting, the model or the card cannot be used, nothing fits, or the hours are too few.
    """
    from budgetsearch.tools.plan.preview import gather, preview
    from budgetsearch.tools.plan.probe import probe_here

    if not 0.1 <= slow <= 100:
        raise UsageError(f"--slow must be from 0.1 to 100; it is {slow:g}.")
    known = load_settings(settings, Path(config) if config else None)
    inputs = gather(known, cache_folder(), need_shape=not probe)
    return preview(inputs, slow, probe_here(known, say) if probe else None)


@_explained
def doctor(
    *,
    config: str | os.PathLike[str] | None = None,
    say: Callable[[Check], None] | None = None,
    **settings: Unpack[RunSettings],
) -> list[Check]:
    """Check what a run with these settings needs; fetches and writes nothing.

    Every setting that is None comes from where ``run`` would take it. ``say`` hears of each check as
    soon as it is done.

    Raises:
        UsageError: a setting is unknown or out of range.
    """
    from budgetsearch.tools.doctor.examine import examine

    file = Path(config) if config else None
    return examine(settings, cache=cache_folder(), config=file, say=say or (lambda check: None))


def resume(
    run: str | os.PathLike[str],
    *,
    watchers: Sequence[Watcher] = (),
    say: Say = lambda line: None,
    already_seconds: float = 0.0,
    last_resort: bool = False,
    patient: bool = False,
    **changes: Unpack[Changes],
) -> Result:
    """Go on with an interrupted run, with its own settings and what is left of its budget.

    ``hours``: what it may take in all, another number than before. ``deadline``: another one than before, or
    the first. ``storage``: the study's URL again, with its
    password, which stands nowhere in the run. ``engine``, ``gpus``, ``address``: others than before, as on
    another cluster. ``last_resort``: end this process when the time is over,
    whatever hangs in it. ``patient``: wait for three minutes at most where a process on another
    machine, which may have been killed a moment ago, still seems to have the run; with a deadline it counts.

    Raises:
        RunFolderError: there is no run in the folder, or it is in use.
        LedgerError: neither its ledger nor the backup can be used.
        SettingsError: the study's storage needs a password, and nobody says which; or the hours are spent.
    """
    caller = Caller(watchers, say, already_seconds, last_resort)
    return session.resume(RunFolder(Path(run)), changes, caller, patient=patient)


def status(run: str | os.PathLike[str]) -> dict[str, Any]:
    """How a run stands, finished or going, as plain JSON values.

    Raises:
        RunFolderError: there is no run in the folder.
    """
    from budgetsearch.views.report.workers import worker_seconds_of
    from budgetsearch.views.tables import status_dict

    history = open_history(run)
    folder = RunFolder(Path(run))
    found = status_dict(history, folder.goes(history.closed is not None))
    workers = worker_seconds_of(read_entries(folder.ledger))
    if workers.most_workers > 1:
        found["workers"] = asdict(workers)
    reports = (folder.report_html, folder.report, folder.report_json)
    found["reports"] = [str(path) for path in reports if path.is_file()]
    return found


def report(run: str | os.PathLike[str], *, out: str | os.PathLike[str] | None = None) -> Reports:
    """Write report.md, report.json and report.html from the ledger again; returns their paths.

    ``out``: the folder that they go to; None: the run's own.

    Raises:
        RunFolderError: there is no run in the folder, or the reports cannot be written.
    """
    folder = RunFolder(Path(run))
    open_history(run)
    entries = list(read_entries(folder.ledger))
    try:
        return write_reports(folder, entries, fold(entries), Path(out) if out is not None else None)
    except OSError as error:
        raise RunFolderError(
            f"The reports in {out or folder.path} cannot be written ({error.strerror or error}). Make room, "
            "mend the folder's permissions, or name another folder with --out."
        ) from error


def reproduce(
    run: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    alone: bool = False,
    anyway: bool = False,
    places: Places | None = None,
    tolerance: float | None = None,
    say: Say = lambda line: None,
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
            given=places or Places(), tolerance=tolerance, say=say,
        )  # fmt: skip


def verify(
    run: str | os.PathLike[str],
    *,
    score: bool = True,
    places: Places | None = None,
    tolerance: float | None = None,
    say: Say = lambda line: None,
) -> Verified:
    """Check every hash in a run's manifest, and score its adapter again unless ``score`` is off.

    The arguments are those of ``reproduce``.

    Raises:
        UsageError: there is no manifest, it cannot be read, or the base needs code that is not allowed.
    """
    from budgetsearch.run.process import stop_signals
    from budgetsearch.tools.reproduce.verify import verify as check

    with stop_signals():
        return check(Path(run), score=score, given=places or Places(), tolerance=tolerance, say=say)


def compare(
    runs: Sequence[str | os.PathLike[str]],
    *,
    tasks: Tasks | str | None = None,
    baseline: str | os.PathLike[str] | None = None,
    say: Say = lambda line: None,
    tick: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Comparison:
    """Runs side by side: paired differences on the same validation rows, and what each run cost.

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
        say=say,
        tick=tick,
    )


def dashboard(*runs: str | os.PathLike[str], port: int | None = None, say: Say = lambda line: None) -> None:
    """Serve the runs in one view on loopback until the process is interrupted; going runs are followed.

    ``port``: without one the first that is free from 8080 on. ``say`` hears the address once it answers.

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
    serve(folders, port, say)


def open_history(run: str | os.PathLike[str]) -> History:
    """The history of a run, read from its ledger.

    Raises:
        RunFolderError: there is no run in the folder, or it has not begun.
    """
    folder = RunFolder(Path(run))
    folder.check_run()
    history = read_history(folder.ledger)
    if history.opened is None:
        raise folder.being_prepared() if folder.in_use() else never_began(folder)
    return history
