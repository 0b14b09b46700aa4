"""The composition root: from settings to a finished ``Result``. Heavy imports happen here, lazily."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from budgetsearch.clock import RunClock
from budgetsearch.core.budget import PlanRequest
from budgetsearch.core.dimensions import Choice
from budgetsearch.core.errors import RunFolderError, UsageError
from budgetsearch.core.history import History
from budgetsearch.core.ports import Watcher
from budgetsearch.core.records import Opened, Score, WorkerSetup
from budgetsearch.core.space import Space
from budgetsearch.ledger import Ledger, read_entries, read_history
from budgetsearch.runfolder import RunFolder, RunLock

if TYPE_CHECKING:
    from budgetsearch.gpu.profiles import Card
    from budgetsearch.settings import Settings
    from budgetsearch.training.sources import BaseModel
    from budgetsearch.training.tokens import PreparedData

Say = Callable[[str], None]
"""Takes one line about what is going on."""


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


def run(
    *,
    model: str | None = None,
    revision: str | None = None,
    data: str | None = None,
    valid: str | None = None,
    gpu: str | None = None,
    device: int | None = None,
    hours: float | None = None,
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
    eval_share: float | None = None,
    task_examples: int | None = None,
    targets: str | None = None,
    trust_remote_code: bool | None = None,
    keep_checkpoints: bool | None = None,
    storage: str | None = None,
    config: str | os.PathLike[str] | None = None,
    watchers: Sequence[Watcher] = (),
    say: Say = lambda line: None,
    already_seconds: float = 0.0,
) -> Result:
    """Search for the best adapter within the budget; returns before the deadline.

    Every setting that is None comes from ``config`` (or ``budgetsearch.yaml`` in the working folder),
    else from the card's profile, else from its default; ``budgetsearch run --help`` describes each.
    ``watchers`` see every event; ``say`` takes lines about the preparation; ``already_seconds`` of the
    budget are already gone.

    Raises:
        UsageError: a setting, the data, the model, the card or the folder cannot be used; nothing
            was touched.
        BudgetError: the budget is below the measured minimum.
        EngineError: the worker cannot train here.
    """
    from budgetsearch.settings import load_settings

    clock = RunClock(already=already_seconds)
    names = set(run.__annotations__) - {"config", "watchers", "say", "already_seconds", "return"}
    given = {name: value for name, value in locals().items() if name in names and value is not None}
    settings = load_settings(given, Path(config) if config else None)
    return _start(settings, clock, watchers, say)


def resume(
    run: str | os.PathLike[str],
    *,
    watchers: Sequence[Watcher] = (),
    say: Say = lambda line: None,
    already_seconds: float = 0.0,
) -> Result:
    """Go on with an interrupted run, with its own settings and what is left of its budget.

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
            raise RunFolderError(f"{folder.path} was never opened. Delete it and start again.")
        if history.closed is not None and history.closed.state == "finished":
            return _result(folder, history)
        settings = Settings.model_validate(dict(history.opened.settings))
        clock = RunClock(spent=history.spent, already=already_seconds)
        return _drive(settings, folder, lock, clock, watchers, say)
    finally:
        lock.release()


def status(run: str | os.PathLike[str]) -> dict[str, Any]:
    """How a run stands, finished or going, as plain JSON values.

    Raises:
        RunFolderError: there is no run in the folder.
    """
    from budgetsearch.report.tables import status_dict

    return status_dict(open_history(run))


def report(run: str | os.PathLike[str]) -> Path:
    """Write ``report.md`` from the ledger again; returns its path.

    Raises:
        RunFolderError: there is no run in the folder.
    """
    from budgetsearch.report.markdown import write_report

    folder = RunFolder(Path(run))
    folder.check_run()
    entries = list(read_entries(folder.ledger))
    write_report(entries, open_history(run), folder.report)
    return folder.report


def dashboard(run: str | os.PathLike[str], port: int) -> None:
    """Serve the run's study on loopback until the process is interrupted.

    Raises:
        RunFolderError: there is no run in the folder.
    """
    from optuna_dashboard import run_server

    opened = open_history(run).opened
    given = opened.settings.get("storage") if opened else None
    run_server(given or f"sqlite:///{RunFolder(Path(run)).study}", host="127.0.0.1", port=port)


def open_history(run: str | os.PathLike[str]) -> History:
    """The history of a run, read from its ledger.

    Raises:
        RunFolderError: there is no run in the folder.
    """
    folder = RunFolder(Path(run))
    folder.check_run()
    return read_history(folder.ledger)


def cache_folder() -> Path:
    """Where converted models and tokenized data are kept: BUDGETSEARCH_CACHE, or the user's cache."""
    given = os.environ.get("BUDGETSEARCH_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "budgetsearch"


# ------------------------------------------------------------------------ composition


def _start(settings: Settings, clock: RunClock, watchers: Sequence[Watcher], say: Say) -> Result:
    """Check everything that can be checked without touching anything, then open the run folder."""
    from budgetsearch.gpu.profiles import detect
    from budgetsearch.spaces import load_space
    from budgetsearch.training.data import check_data
    from budgetsearch.training.sources import check_source

    assert settings.model and settings.data and settings.space and settings.out
    detect(settings.gpu, settings.device)
    load_space(settings.space)
    check_source(settings.model)
    for source in filter(None, (settings.data, settings.valid)):
        check_data(source)
    folder = RunFolder(Path(settings.out))
    folder.check_free()

    existed = folder.path.exists()
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    lock.sign()
    try:
        return _drive(settings, folder, lock, clock, watchers, say)
    except UsageError:
        if not folder.ledger.exists() and not existed:
            folder.remove()
        raise
    finally:
        lock.release()


def _drive(
    settings: Settings,
    folder: RunFolder,
    lock: RunLock,
    clock: RunClock,
    watchers: Sequence[Watcher],
    say: Say,
) -> Result:
    """Prepare model and data while the worker starts, then let the driver run."""
    from budgetsearch.driver import Driver
    from budgetsearch.engines.local import LocalEngine
    from budgetsearch.gpu.profiles import detect
    from budgetsearch.spaces import load_space
    from budgetsearch.study.mirror import StudyMirror
    from budgetsearch.study.sampler import OptunaSampler

    assert settings.space
    card = detect(settings.gpu, settings.device)
    if card.note:
        say(card.note)
    space = load_space(settings.space)
    engine = LocalEngine(None, folder.worker_log, keep_open=(lock.fd,))
    with _stop_signals() as stop_requested:
        try:
            engine.warm_up()
            base, prepared = _prepare(settings, say)
            engine.prepare(_worker_setup(settings, folder, card, base, prepared))
            folder.write_settings(settings.model_dump(mode="json"))
            folder.write_lockfile_of_versions()
            folder.checkpoints.mkdir(exist_ok=True)
            facts = _facts(card, base, prepared)
            ledger = Ledger(folder.ledger)
            _check_same_inputs(ledger.history, facts)
            mirror = StudyMirror(settings.storage or f"sqlite:///{folder.study}", folder.path.name)
            mirror.catch_up(ledger.history)
            for watcher in (mirror, *watchers):
                ledger.watch(watcher)
            driver = Driver(
                ledger=ledger,
                engine=engine,
                sampler=OptunaSampler(),
                exporter=_exporter(settings, folder, base, prepared, facts),
                clock=clock,
                request=_request(settings, card, space, prepared),
                opened=Opened(settings.hours * 3600, settings.model_dump(mode="json"), facts),
                quantizations=_quantizations(space),
                calibration_rank=_largest_rank(space),
                stop_requested=stop_requested,
            )
            try:
                history = driver.run()
            finally:
                ledger.close()
        finally:
            engine.close()
    report(folder.path)
    return _result(folder, history)


def _prepare(settings: Settings, say: Say) -> tuple[BaseModel, PreparedData]:
    from budgetsearch.training.sources import resolve_model
    from budgetsearch.training.tokens import prepare

    assert settings.model and settings.data and settings.max_length
    cache = cache_folder()
    base = resolve_model(
        settings.model,
        cache,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        say=say,
    )
    prepared = prepare(
        base.path,
        settings.data,
        settings.valid,
        seed=settings.seed,
        max_length=settings.max_length,
        cache=cache,
        max_rows=settings.max_rows,
        valid_share=settings.valid_share,
        say=say,
    )
    return base, prepared


def _worker_setup(
    settings: Settings, folder: RunFolder, card: Card, base: BaseModel, prepared: PreparedData
) -> WorkerSetup:
    return WorkerSetup(
        model_path=str(base.path),
        model_name=base.loadable,
        data_path=str(prepared.folder),
        checkpoint_path=str(folder.checkpoints.absolute()),
        device=card.device,
        targets=settings.targets,
        seed=settings.seed,
        limit_bytes=None if card.device == "cpu" else card.usable_bytes,
        trust_remote_code=settings.trust_remote_code,
    )


def _request(settings: Settings, card: Card, space: Space, prepared: PreparedData) -> PlanRequest:
    assert settings.batch_size
    return PlanRequest(
        budget_seconds=settings.hours * 3600,
        gpu=card.profile.name,
        space=space.to_dict(),
        seed=settings.seed,
        eta=settings.eta,
        first_rung=settings.first_rung,
        full_share=settings.full_share,
        max_epochs=settings.max_epochs,
        eval_share=settings.eval_share,
        batch_size=settings.batch_size,
        train_tokens=prepared.train_stats.tokens,
        train_rows=prepared.train_stats.rows,
        valid_rows=prepared.valid_stats.rows,
        task_examples=settings.task_examples,
        max_trials=settings.max_trials,
        limit_bytes=None if card.device == "cpu" else card.usable_bytes,
    )


def _exporter(
    settings: Settings, folder: RunFolder, base: BaseModel, prepared: PreparedData, facts: Mapping[str, Any]
) -> Any:
    from budgetsearch.exporter import AdapterExporter

    return AdapterExporter(
        run_folder=folder.path,
        checkpoint_path=folder.checkpoints,
        model_facts=facts["model"],
        data_facts=facts["data"],
        tokenizer_files_from=base.path,
        keep_checkpoints=settings.keep_checkpoints,
    )


def _facts(card: Card, base: BaseModel, prepared: PreparedData) -> dict[str, Any]:
    """What was measured and found before the first job, for the ledger, the report and the card."""
    import dataclasses
    import importlib.metadata

    packages = ("budgetsearch", "torch", "transformers", "peft", "bitsandbytes", "optuna")
    return {
        "card": {"name": card.name, "device": card.device, "usable_bytes": card.usable_bytes},
        "model": {
            "source": base.source,
            "loadable": base.loadable,
            "revision": base.revision,
            "sha256": base.sha256,
            "licence": base.licence,
        },
        "data": {
            "source_sha256": prepared.source_sha256,
            "template": prepared.template,
            "train": dataclasses.asdict(prepared.train_stats),
            "valid": dataclasses.asdict(prepared.valid_stats),
            "prepared": prepared.folder.name,
        },
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _check_same_inputs(history: History, facts: Mapping[str, Any]) -> None:
    """A run goes on only with the model and the data that it began with."""
    if history.opened is None:
        return
    before = history.opened.facts
    for what, key in (("model", "sha256"), ("data", "prepared")):
        if before[what][key] != facts[what][key]:
            raise RunFolderError(
                f"The {what} has changed since this run began, so its trials could not be compared any "
                f"more. Bring the old {what} back, or start a new run with another --out."
            )


def _quantizations(space: Space) -> list[str]:
    """The quantizations that the space can ask for."""
    dimension = space["quantization"]
    values = dimension.values if isinstance(dimension, Choice) else (space.default()["quantization"],)
    return [str(value) for value in values]


def _largest_rank(space: Space) -> int:
    """The rank that the calibration measures: the most expensive one."""
    dimension = space["rank"]
    if isinstance(dimension, Choice):
        return max(int(value) for value in dimension.values)
    return int(space.from_unit(dict.fromkeys(space.searched, 1.0))["rank"])


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Inside, the first SIGINT or SIGTERM asks the run to stop cleanly; a second SIGINT stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            signal.default_int_handler(number, frame)
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    )
