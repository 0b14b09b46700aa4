"""The Python API: from settings to a finished ``Result``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetsearch.clock import deadline_of, local_time, timing_of_new, timing_of_resumed
from budgetsearch.compose import Say, cache_folder, drive, finish_leaving, start, storage_url
from budgetsearch.core.errors import (
    BudgetsearchError,
    LedgerError,
    RunFolderError,
    SettingsError,
    UsageError,
)
from budgetsearch.core.history import History
from budgetsearch.core.ports import Watcher
from budgetsearch.core.records import Score
from budgetsearch.ledger import read_entries, read_history
from budgetsearch.runfolder import RunFolder, RunLock

if TYPE_CHECKING:
    from budgetsearch.doctor.check import Check
    from budgetsearch.planning.preview import Preview


@dataclass(frozen=True)
class Best:
    """The trial behind the exported adapter."""

    trial_id: int
    params: Mapping[str, Any]
    loss: float
    """Mean validation cross-entropy per completion token (nats)."""
    tokens: int


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    state: str
    """finished, interrupted or failed."""
    reason: str
    run: Path
    best: Best | None
    adapter_path: Path | None
    """A PEFT adapter; ``peft.PeftModel.from_pretrained`` loads it."""
    score: Score | None
    """Base against adapter, under the same quantization."""
    ledger: Path
    """The SQLite file with every event, decision and second."""
    spent_seconds: float
    budget_seconds: float
    signal: str = ""
    """The signal that interrupted it, such as SIGTERM."""


def run(
    *,
    model: str | None = None,
    revision: str | None = None,
    data: str | None = None,
    valid: str | None = None,
    gpu: str | None = None,
    device: int | str | None = None,
    hours: float | None = None,
    deadline: str | None = None,
    space: str | None = None,
    out: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    eta: int | None = None,
    first_rung: float | None = None,
    full_share: float | None = None,
    max_epochs: float | None = None,
    valid_share: float | None = None,
    max_rows: int | None = None,
    max_trials: int | None = None,
    max_gang: int | None = None,
    optimizer: str | None = None,
    torch_compile: bool | None = None,
    eval_share: float | None = None,
    task_examples: int | None = None,
    targets: str | None = None,
    trust_remote_code: bool | None = None,
    grace_seconds: float | None = None,
    keep_checkpoints: bool | None = None,
    storage: str | None = None,
    config: str | os.PathLike[str] | None = None,
    watchers: Sequence[Watcher] = (),
    say: Say = lambda line: None,
    already_seconds: float = 0.0,
    resume: str = "never",
    last_resort: bool = False,
) -> Result:
    """Search for the best adapter within the budget; returns before the deadline.

    Every setting that is None comes from ``config`` (or ``budgetsearch.yaml`` in the working folder),
    else from the card's profile, else from its default; ``budgetsearch run --help`` describes each.
    ``watchers`` see every event; ``say`` takes lines about the preparation; ``already_seconds`` of the
    budget are already gone. ``resume="auto"``: go on with the run in ``out`` if there is one, with its own
    settings. ``last_resort``: end this process when the time is over, whatever hangs in it.

    Raises:
        UsageError: a setting, the data, the model, the card or the folder cannot be used; nothing
            was touched.
        BudgetError: the budget is below the measured minimum.
        EngineError: the worker cannot train here.
    """
    arguments = dict(locals())
    from budgetsearch.settings import Settings, load_settings, names_out

    if resume not in ("never", "auto"):
        raise SettingsError(f"--resume {resume}: use never or auto.")
    given = {
        name: os.fspath(value) if isinstance(value := arguments[name], os.PathLike) else value
        for name in Settings.model_fields
        if arguments[name] is not None
    }
    settings = load_settings(given, Path(config) if config else None)
    folder = settings.out
    assert folder is not None
    if resume == "auto":
        if not (out or names_out(Path(config) if config else None)):
            raise SettingsError("--resume auto needs --out: the folder in which the run is, or will be.")
        if RunFolder(folder).ledger.is_file():
            say(f"going on with the run in {folder}, with its own settings")
            return resume_run(
                folder, deadline=deadline, watchers=watchers, say=say,
                already_seconds=already_seconds, last_resort=last_resort,
            )  # fmt: skip
    until = deadline_of(settings.deadline) if settings.deadline else None
    timing = timing_of_new(settings.hours, until, already_seconds)
    if until is not None:
        settings = settings.model_copy(update={"deadline": local_time(until)})
    start(settings, timing, watchers, say, last_resort=last_resort)
    return _conclude(RunFolder(folder), say)


def plan(
    *,
    slow: float = 1.0,
    probe: bool = False,
    config: str | os.PathLike[str] | None = None,
    say: Say = lambda line: None,
    **settings: Any,
) -> Preview:
    """What ``run`` with the same settings would do: what fits, the ladder, when each phase begins.

    Nothing is spent, and nothing fetched but a Hub model's config.json where it is not known. ``slow``:
    everything takes so many times as long. ``probe``: load the model and measure real steps first.

    Raises:
        UsageError: a setting, the model or the card cannot be used, nothing fits, or the hours are too few.
    """
    from budgetsearch.compose import check_inputs
    from budgetsearch.planning.preview import gather, preview
    from budgetsearch.probing import probe_here
    from budgetsearch.settings import load_settings

    if not 0.1 <= slow <= 100:
        raise UsageError(f"--slow must be from 0.1 to 100; it is {slow:g}.")
    given = {name: value for name, value in settings.items() if value is not None}
    known = load_settings(given, Path(config) if config else None)
    check_inputs(known)
    inputs = gather(known, cache_folder(), need_shape=not probe)
    return preview(inputs, slow, probe_here(known, say) if probe else None)


def doctor(
    *,
    model: str | None = None,
    revision: str | None = None,
    data: str | None = None,
    gpu: str | None = None,
    device: int | str | None = None,
    out: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    say: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Check what a run with these settings needs; fetches and writes nothing.

    Every setting that is None comes from where ``run`` would take it. ``say`` hears of each check as
    soon as it is done.

    Raises:
        UsageError: a setting is unknown or out of range.
    """
    from budgetsearch.doctor.examine import examine

    given = {"model": model, "revision": revision, "data": data, "gpu": gpu, "device": device}
    given["out"] = os.fspath(out) if out is not None else None
    return examine(given, cache=cache_folder(), config=Path(config) if config else None, say=say)


def resume(
    run: str | os.PathLike[str],
    *,
    deadline: str | None = None,
    watchers: Sequence[Watcher] = (),
    say: Say = lambda line: None,
    already_seconds: float = 0.0,
    last_resort: bool = False,
) -> Result:
    """Go on with an interrupted run, with its own settings and what is left of its budget.

    ``deadline``: another one than before, or the first. ``last_resort``: end this process when the time is
    over, whatever hangs in it.

    Raises:
        RunFolderError: there is no run in the folder, or it is in use.
    """
    from budgetsearch.settings import Settings

    folder = RunFolder(Path(run))
    folder.check_run()
    lock = RunLock(folder)
    lock.sign()
    try:
        history = read_history(folder.ledger)
        if history.opened is None:
            raise _never_began(folder)
        if history.closed is not None and history.closed.state == "finished":
            finish_leaving(folder, history, say)
            return _conclude(folder, say)
        settings = Settings.model_validate(dict(history.opened.settings))
        timing = timing_of_resumed(
            history.spent,
            history.opened.budget_seconds,
            _began(folder) if settings.deadline else None,
            deadline_of(deadline) if deadline else None,
            already_seconds,
        )
        drive(settings, folder, lock, timing, watchers, say, last_resort=last_resort)
        return _conclude(folder, say)
    finally:
        lock.release()


def _never_began(folder: RunFolder) -> BudgetsearchError:
    """What a ledger without an event means: beside what only a search can have left it has lost them."""
    if folder.adapter.exists() or any(folder.checkpoints.glob("trial*")):
        return LedgerError(
            f"The ledger {folder.ledger} holds no event, but there are checkpoints or an adapter beside it. "
            "Restore it from a copy; the adapter can be used as it is."
        )
    return RunFolderError(
        f"{folder.path} was stopped before it began, so there is nothing to go on with. Start it "
        f"again with `budgetsearch run --out {folder.path}` and its other options."
    )


resume_run = resume
"""For ``run``, which has an argument of that name."""


def _began(folder: RunFolder) -> float:
    """When a run began, in seconds since the epoch, by the clock on the wall."""
    first = next(iter(read_entries(folder.ledger)))
    return first.wall - first.at


def status(run: str | os.PathLike[str]) -> dict[str, Any]:
    """How a run stands, finished or going, as plain JSON values.

    Raises:
        RunFolderError: there is no run in the folder.
    """
    from budgetsearch.report.tables import status_dict

    history = open_history(run)
    found = status_dict(history)
    if history.closed is None and not RunFolder(Path(run)).in_use():
        found["phase"] = "stopped"
    return found


def report(run: str | os.PathLike[str]) -> Path:
    """Write ``report.md`` from the ledger again; returns its path.

    Raises:
        RunFolderError: there is no run in the folder.
    """
    from budgetsearch.report.markdown import write_report

    folder = RunFolder(Path(run))
    folder.check_run()
    history = open_history(run)
    write_report(list(read_entries(folder.ledger)), history, folder.report)
    return folder.report


def dashboard(run: str | os.PathLike[str], port: int) -> None:
    """Serve the run's study on loopback until the process is interrupted.

    Raises:
        RunFolderError: there is no run in the folder.
    """
    from optuna_dashboard import run_server

    opened = open_history(run).opened
    given = opened.settings.get("storage") if opened else None
    try:
        run_server(storage_url(given, RunFolder(Path(run))), host="127.0.0.1", port=port)
    except OSError as error:
        raise UsageError(f"Port {port} cannot be used ({error}). Name another one with --port.") from error


def open_history(run: str | os.PathLike[str]) -> History:
    """The history of a run, read from its ledger.

    Raises:
        RunFolderError: there is no run in the folder, or it has not begun.
    """
    folder = RunFolder(Path(run))
    folder.check_run()
    history = read_history(folder.ledger)
    if history.opened is None:
        raise folder.being_prepared() if folder.in_use() else _never_began(folder)
    return history


def _conclude(folder: RunFolder, say: Say) -> Result:
    try:
        report(folder.path)
    except OSError as error:
        say(f"the report cannot be written ({error}); make room, then: budgetsearch report {folder.path}")
    return _result(folder, read_history(folder.ledger))


def _result(folder: RunFolder, history: History) -> Result:
    best = history.incumbent
    closed = history.closed
    assert history.opened is not None
    return Result(
        state=closed.state if closed else "failed",
        reason=closed.reason if closed else "the run did not end",
        run=folder.path,
        best=(
            Best(best.trial_id, dict(best.trial.params), best.best_loss, best.best_tokens)
            if best is not None and best.best_loss is not None
            else None
        ),
        adapter_path=folder.adapter if folder.adapter.is_dir() else None,
        score=history.score,
        ledger=folder.ledger,
        spent_seconds=history.spent,
        budget_seconds=history.opened.budget_seconds,
        signal=closed.signal if closed else "",
    )
