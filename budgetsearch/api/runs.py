"""Runs from Python: begun, gone on with, opened, and what came of them."""

from __future__ import annotations

import html
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

from budgetsearch.api.callbacks import watcher_of
from budgetsearch.api.display import display
from budgetsearch.api.explained import explained
from budgetsearch.api.given import given
from budgetsearch.api.steering import ask
from budgetsearch.core.errors import RunFolderError, SettingsError
from budgetsearch.core.events import Opened
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.history import History
from budgetsearch.core.ports import Watcher
from budgetsearch.run import session
from budgetsearch.run.configuration import load_settings, names_out
from budgetsearch.run.result import Result, result_of
from budgetsearch.run.session import Caller
from budgetsearch.run.settings import Changes, RunSettings
from budgetsearch.storage.ledger import one_generation, read_entries, read_history
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.report.write import Reports, write_reports
from budgetsearch.views.runs import Listed, runs_below
from budgetsearch.views.shortfalls import shortfall_lines, shortfalls_of
from budgetsearch.views.tables import TrialRow, final_lines, trial_rows

if TYPE_CHECKING:
    import pandas

PathLike = str | os.PathLike[str]


class Trials(tuple[TrialRow, ...]):
    """The trials of a run, by their numbers."""

    __slots__ = ()

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each trial, a column for each parameter and each rung's loss.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Trials.to_pandas needs pandas: pip install pandas") from error
        rows = [_columns(row) for row in self]
        return pandas.DataFrame(rows, columns=None if rows else ["trial_id"]).set_index("trial_id")


def _columns(row: TrialRow) -> dict[str, Any]:
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    losses = {f"loss_at_{rung}": loss for rung, loss in enumerate(values.pop("losses"))}
    return {**values.pop("params"), **values, **losses}


@dataclass(frozen=True, repr=False)
class Run(Result):
    """A run in its folder: what came of it, or how far it is.

    Its values are those of the moment it was made; ``budgetsearch.open(run.path)`` looks again.
    """

    @property
    def trials(self) -> Trials:
        """Every trial with its configuration, status and losses."""
        history = open_history(self.path)
        rows = trial_rows(history, self.state == "running")
        return Trials(sorted(rows, key=lambda row: row.trial_id))

    @property
    def status(self) -> dict[str, Any]:
        """How it stands now, as plain JSON values."""
        return status(self.path)

    def report(self, out: PathLike | None = None) -> Reports:
        """Write its reports from the ledger again, into ``out`` or its own folder; returns their paths."""
        return report(self.path, out=out)

    def resume(self, **options: Any) -> Run:
        """Go on with it; the keywords are those of ``budgetsearch.resume``."""
        return resume(self.path, **options)

    def try_(self, configuration: str) -> str:
        """Add a configuration while it goes: ``rank=16,learning_rate=2e-4``."""
        return ask(self.path, "try", guess=configuration)

    def drop(self, trial: int) -> str:
        """Give a trial up while it goes."""
        return ask(self.path, "drop", trial)

    def promote(self, trial: int) -> str:
        """Send a trial one rung up, ahead of the others."""
        return ask(self.path, "promote", trial)

    def __repr__(self) -> str:
        loss = "" if self.best is None else f", loss {self.best.loss:.4f}"
        return f"<Run {self.path}: {self.state}{loss}>"

    def __str__(self) -> str:
        lines = [f"{self.path}  {self.state}: {self.reason}", *shortfall_lines(self.shortfalls)]
        lines += final_lines(open_history(self.path))
        lines += [f"adapter  {self.adapter_path}"] if self.adapter_path is not None else []
        page = RunFolder(self.path).report_html
        return "\n".join([*lines, *([f"report  {page}"] if page.is_file() else [])])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


@dataclass(frozen=True)
class Beside:
    """What goes along with a search."""

    watchers: Sequence[Watcher] = ()
    callbacks: Sequence[Any] = ()
    progress: bool | None = None
    already_seconds: float = 0.0
    """So much of the budget is already gone."""
    last_resort: bool = False
    """End this process when the time is over, whatever hangs in it."""

    @contextmanager
    def caller(self) -> Iterator[Caller]:
        """Show the search as long as it goes, and say who hears of it.

        Raises:
            SettingsError: a callback is none.
        """
        with display(self.progress) as (shown, say):
            watchers = [*shown, *self.watchers, *map(watcher_of, self.callbacks)]
            yield Caller(watchers, say, self.already_seconds, self.last_resort)


@explained
def run(
    *,
    config: PathLike | None = None,
    resume: str = "never",
    callbacks: Sequence[Any] = (),
    watchers: Sequence[Watcher] = (),
    progress: bool | None = None,
    **settings: Unpack[RunSettings],
) -> Run:
    """Search for the best adapter within the budget; returns before the deadline.

    A setting that is not given, or None, comes from ``config`` (or ``budgetsearch.yaml`` in the working
    folder), else from the card's profile, else from its default. Ctrl-C stops the search: what it returns is
    then ``interrupted`` and can be resumed. Before the search has begun nothing is left behind, and
    KeyboardInterrupt is raised.

    Args:
        config: a YAML file of settings.
        resume: ``auto``: go on with the run in ``out`` if there is one, with its own settings.
        callbacks: functions of every event, or objects with methods such as ``on_segment_ended``
            (``budgetsearch.api.callbacks``).
        watchers: loggers (``budgetsearch.views.loggers``), and whatever else has the method ``see``.
        progress: show the search; None: in a terminal or a notebook. Lines about the preparation are logged
            at INFO by the logger ``budgetsearch`` in any case.

    Raises:
        UsageError: a setting, the data, the model, the card or the folder cannot be used; nothing
            was touched.
        BudgetError: the budget is below the measured minimum.
        EngineError: the worker cannot train here.
    """
    return search(settings, config, resume, Beside(watchers, callbacks, progress))


def search(settings: RunSettings, config: PathLike | None, resume: str, beside: Beside) -> Run:
    """Begin a run, or with ``resume="auto"`` go on with it; ``run`` says the rest."""
    if resume not in ("never", "auto"):
        raise SettingsError(f"--resume {resume}: use never or auto.")
    file = Path(config) if config else None
    chosen = load_settings(given(settings), file)
    assert chosen.out is not None
    folder = RunFolder(chosen.out)
    if resume == "auto" and not (settings.get("out") or names_out(file)):
        raise SettingsError("--resume auto needs --out: the folder in which the run is, or will be.")
    with beside.caller() as caller:
        if resume == "auto" and folder.has_ledger():
            caller.say(f"going on with the run in {folder.path}, with its own settings")
            again = Changes(
                storage=chosen.storage,
                deadline=settings.get("deadline"),
                engine=settings.get("engine"),
                gpus=settings.get("gpus"),
                address=settings.get("address"),
                shared=chosen.shared,
                trust_remote_code=chosen.trust_remote_code,
            )
            begun = next(iter(read_entries(folder.ledger)), None)
            known = begun.event.settings if begun is not None and isinstance(begun.event, Opened) else {}
            for role in ("model", "data", "valid", "metric"):
                if (named := getattr(chosen, role)) == known.get(role):
                    again[role] = named
            return Run(**vars(session.resume(folder, again, caller, patient=True)))
        return Run(**vars(session.start(chosen, caller)))


def resume(
    run: PathLike,
    *,
    callbacks: Sequence[Any] = (),
    watchers: Sequence[Watcher] = (),
    progress: bool | None = None,
    **changes: Unpack[Changes],
) -> Run:
    """Go on with an interrupted run, with its own settings and what is left of its budget.

    Args:
        run: its folder.
        callbacks: as of ``run``, like ``watchers`` and ``progress``.
        watchers: loggers.
        progress: show the search.
        changes: ``hours``, which it may take in all; ``deadline``, another one or the first; ``storage``, the
            study's URL again with its password, which stands nowhere in the run; ``engine``, ``gpus`` and
            ``address``, as on another cluster; ``shared``, ``trust_remote_code``, the storage and the address
            again where the run has them, and ``metric`` where it is a function, for the run's folder may be a
            stranger's; of a run that was begun elsewhere also ``model``, ``data`` and ``valid``, where they
            have to be fetched.

    Raises:
        RunFolderError: there is no run in the folder, or it is in use.
        LedgerError: neither its ledger nor the backup can be used.
        SettingsError: a change is none of these, the study's storage needs a password that nobody says, or
            the hours are spent.
    """
    return search_on(run, changes, Beside(watchers, callbacks, progress))


def search_on(run: PathLike, changes: Changes, beside: Beside) -> Run:
    """Go on with a run; ``resume`` says the rest."""
    if unknown := set(changes) - set(Changes.__annotations__):
        known = ", ".join(Changes.__annotations__)
        raise SettingsError(f"resume: {', '.join(sorted(unknown))} cannot be changed; it takes {known}.")
    with beside.caller() as caller:
        named = cast(Changes, given(changes))
        return Run(**vars(session.resume(RunFolder(Path(run)), named, caller)))


def open_run(path: PathLike) -> Run:
    """The run in a folder, finished, stopped or going.

    Raises:
        RunFolderError: there is no run in the folder, or it has not begun.
    """
    folder = _folder_of(path)
    history = _begun(folder, read_history(folder.ledger))
    return Run(**vars(result_of(folder, history)))


def status(run: PathLike) -> dict[str, Any]:
    """How a run stands, finished or going, as plain JSON values.

    Raises:
        RunFolderError: there is no run in the folder.
    """
    return look(run)[1]


def look(run: PathLike) -> tuple[History, dict[str, Any]]:
    """The history of a run and its status, from one reading of its ledger.

    Raises:
        RunFolderError: there is no run in the folder, or it has not begun.
    """
    from budgetsearch.views.report.workers import worker_seconds_of
    from budgetsearch.views.tables import status_dict
    from budgetsearch.views.under_way import under_way

    folder = _folder_of(run)
    history = _begun(folder, read_history(folder.ledger))
    going = folder.goes(history.closed is not None)
    found = status_dict(history, going)
    best = history.incumbent
    if best is not None and not folder.holds_adapter(best.best_checkpoint):
        found["best"]["adapter_path"] = None
    found["now"] = under_way(history, time.time()) if going else None
    found["shortfalls"] = [asdict(one) for one in shortfalls_of(folder, history, going)]
    workers = worker_seconds_of(history.accounts)
    if workers.most_workers > 1:
        found["workers"] = asdict(workers)
    reports = (folder.report_html, folder.report, folder.report_json)
    found["reports"] = [str(path) for path in reports if path.is_file()]
    return history, found


def list_runs(folder: PathLike = "runs") -> Listed:
    """List the runs in and below a folder, newest first, and what cannot be read with the reason.

    Raises:
        RunFolderError: there is no such folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise RunFolderError(f"There is no folder {path}. Name the one in which runs lie.")
    return runs_below(path)


def report(run: PathLike, *, out: PathLike | None = None) -> Reports:
    """Write report.md, report.json and report.html from the ledger again; returns their paths.

    ``out``: the folder that they go to; None: the run's own.

    Raises:
        RunFolderError: there is no run in the folder, or the reports cannot be written.
    """
    folder = _folder_of(run)
    with one_generation():
        entries = list(read_entries(folder.ledger))
        history = _begun(folder, fold(entries))
    try:
        return write_reports(folder, entries, history, Path(out) if out is not None else None)
    except OSError as error:
        raise RunFolderError(
            f"The reports in {out or folder.path} cannot be written ({error.strerror or error}). Make room, "
            "mend the folder's permissions, or name another folder with --out."
        ) from error


def open_history(run: PathLike) -> History:
    """The history of a run, read from its ledger.

    Raises:
        RunFolderError: there is no run in the folder, or it has not begun.
    """
    folder = _folder_of(run)
    return _begun(folder, read_history(folder.ledger))


def _folder_of(run: PathLike) -> RunFolder:
    folder = RunFolder(Path(run))
    folder.check_run()
    return folder


def _begun(folder: RunFolder, history: History) -> History:
    if history.opened is None:
        raise folder.being_prepared() if folder.in_use() else folder.never_began()
    return history
