"""From settings to a driver at work: every part is made here and handed to the others."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from budgetsearch.clock import Timing
from budgetsearch.core.budget import OPTIONAL_SHARE, PlanRequest, calibration_job
from budgetsearch.core.errors import (
    DataError,
    ModelError,
    RunFolderError,
    SettingsError,
    SpaceError,
    UsageError,
)
from budgetsearch.core.events import Opened
from budgetsearch.core.history import History
from budgetsearch.core.ports import Engine, Watcher
from budgetsearch.core.records import CalibrateJob, Calibration, JobEnded, WorkerSetup
from budgetsearch.core.space import Space
from budgetsearch.ledger import Ledger, read_history
from budgetsearch.runfolder import RunFolder, RunLock

if TYPE_CHECKING:
    from budgetsearch.core.footprint import Footprint
    from budgetsearch.driver import Driver
    from budgetsearch.engines.local import LocalEngine
    from budgetsearch.exporter import AdapterExporter
    from budgetsearch.gpu.detect import Card
    from budgetsearch.settings import Settings
    from budgetsearch.training.sources import BaseModel
    from budgetsearch.training.tokens import PreparedData

Say = Callable[[str], None]
"""Takes one line about what is going on."""
EXIT_OVERDUE = 3
"""Exit code of a process that hung until its time was over."""
PROBE_SECONDS = 60.0
"""What `plan --probe` may take for its probes, loading aside."""
PACKAGES = ("budgetsearch", "torch", "transformers", "peft", "bitsandbytes", "optuna")
"""Whose versions stand in the ledger; all of them stand in versions.lock."""


def start(
    settings: Settings, timing: Timing, watchers: Sequence[Watcher], say: Say, *, last_resort: bool = False
) -> History:
    """Check everything that can be checked without touching anything, then make the run folder.

    Raises:
        UsageError: something cannot be used; a folder that was made is gone again.
    """
    assert settings.out is not None
    folder = RunFolder(settings.out)
    _check(settings)
    settings = _anchored(settings)
    try:
        folder.check_free()
        existed = folder.path.exists()
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
    except OSError as error:
        raise RunFolderError(f"--out {folder.path} cannot be made: {error}. Name another folder.") from error
    lock.sign()
    try:
        return drive(settings, folder, lock, timing, watchers, say, last_resort=last_resort)
    except (UsageError, KeyboardInterrupt):
        if not _has_trials(folder):
            folder.clear(remove=not existed)
        raise
    finally:
        lock.release()


def _has_trials(folder: RunFolder) -> bool:
    """Whether anything was earned that must be kept."""
    return folder.ledger.exists() and bool(read_history(folder.ledger).trials)


def _anchored(settings: Settings) -> Settings:
    """The same settings with absolute paths, so that a resume works from any folder."""
    local = {
        name: str(Path(source).expanduser().absolute())
        for name in ("model", "data", "valid", "space")
        if (source := getattr(settings, name)) and Path(source).expanduser().exists()
    }
    if not Path(settings.space).suffix:
        local.pop("space", None)  # a name that comes with the package
    prefix, _, path = (settings.storage or "").partition("sqlite:///")
    if path and not prefix:
        local["storage"] = f"sqlite:///{Path(path).expanduser().absolute()}"
    return settings.model_copy(update=local)


def _check(settings: Settings) -> None:
    from budgetsearch.gpu.detect import detect
    from budgetsearch.training.sources import check_source

    detect(settings.gpu, settings.device)
    check_source(settings.model)
    check_inputs(settings)


def check_inputs(settings: Settings) -> None:
    """Check what needs neither the card nor the model, and no network.

    Raises:
        UsageError: the space, the targets, the data or the storage cannot be used.
    """
    from budgetsearch.spaces import load_space
    from budgetsearch.study.mirror import without_password
    from budgetsearch.training.data import check_data

    space = load_space(settings.space)
    if space.extra:
        raise SpaceError(
            f"The search space {settings.space} has dimensions that training does not know: "
            f"{', '.join(space.extra)}. It knows quantization, rank, learning_rate, alpha and dropout."
        )
    if not all(name.strip() for name in settings.targets.split(",")):
        raise SettingsError(
            f"--targets {settings.targets!r} holds an empty name; write q_proj,v_proj or all-linear."
        )
    for source in filter(None, (settings.data, settings.valid)):
        try:
            check_data(source)
        except OSError as error:
            raise DataError(f"{source[:200]} cannot be read: {error.strerror or error}.") from error
    if settings.storage:
        without_password(settings.storage)


def drive(
    settings: Settings,
    folder: RunFolder,
    lock: RunLock,
    timing: Timing,
    watchers: Sequence[Watcher],
    say: Say,
    *,
    last_resort: bool = False,
) -> History:
    """Prepare model and data while the worker starts, then let the driver run to the end.

    ``last_resort``: this process may be ended when its time is over, whatever hangs in it.
    """
    from budgetsearch.engines.local import LocalEngine
    from budgetsearch.gpu.detect import detect

    card = detect(settings.gpu, settings.device)
    if card.note:
        say(card.note)
    engine = LocalEngine(None, folder.worker_log, keep_open=(lock.fd,), environment=card.environment)
    drivers: list[Driver] = []

    def planned() -> bool:
        return any(driver.history.plan is not None for driver in drivers)

    watched = _ended_in_time(timing, engine, folder, planned) if last_resort else nullcontext()
    with _stop_signals() as signals, watched:
        try:
            engine.warm_up()
            base, prepared = _prepare(settings, say)
            engine.prepare(_worker_setup(settings, folder, card, base, prepared))
            driver = _driver(settings, folder, card, base, prepared, engine, timing)
            drivers.append(driver)
            driver.stop_requested = signals.gently
            for watcher in (_mirror(settings.storage, folder, driver.opened, driver.history), *watchers):
                driver.ledger.watch(watcher)
            try:
                return driver.run()
            finally:
                driver.ledger.close()
        finally:
            engine.close()


def probe_here(settings: Settings, say: Say) -> tuple[PlanRequest, dict[str, Calibration]]:
    """Load the base model and measure real steps of each quantization, for a minute in all if that suffices;
    everything that was written is gone afterwards.

    Raises:
        UsageError: the model, the data or the card cannot be used.
    """
    from budgetsearch.engines.local import LocalEngine
    from budgetsearch.gpu.detect import detect
    from budgetsearch.spaces import load_space

    _check(settings)
    card, space = detect(settings.gpu, settings.device), load_space(settings.space)
    with tempfile.TemporaryDirectory(prefix="budgetsearch-probe-") as scratch:
        folder = RunFolder(Path(scratch))
        folder.checkpoints.mkdir()
        engine = LocalEngine(None, folder.worker_log, environment=card.environment)
        try:
            engine.warm_up()
            base, prepared = _prepare(settings, say)
            engine.prepare(_worker_setup(settings, folder, card, base, prepared))
            request = _request(settings, settings.hours * 3600, card, space, prepared, base)
            return request, dict(measure(engine, request, space.quantizations, PROBE_SECONDS, say))
        finally:
            engine.close()


def measure(
    engine: Engine, request: PlanRequest, quantizations: Sequence[str], seconds: float, say: Say
) -> dict[str, Calibration]:
    """Calibrate each quantization outside of a run; what is optional in it stops after its share of the
    seconds."""
    found = {}
    for number, name in enumerate(quantizations):
        job = calibration_job(request, name, number, seconds / len(quantizations) / OPTIONAL_SHARE)
        if isinstance(job, Calibration):
            found[name] = job
            continue
        say(f"measuring {name}")
        engine.submit(job)
        found[name] = _answer(engine, job)
    return found


def _answer(engine: Engine, job: CalibrateJob) -> Calibration:
    """The result of a job, or that it was too slow: then it is ended."""
    until = time.monotonic() + job.limit_seconds
    ended = False
    while True:
        for report in engine.poll(1.0):
            if isinstance(report, JobEnded):
                result = report.results[0]
                assert isinstance(result, Calibration)
                late = f"took more than {job.limit_seconds:.0f} s"
                return dataclasses.replace(result, status="timeout", detail=late) if ended else result
        if time.monotonic() > until and not ended:
            engine.kill(job.job_id)
            ended = True


def _driver(
    settings: Settings,
    folder: RunFolder,
    card: Card,
    base: BaseModel,
    prepared: PreparedData,
    engine: LocalEngine,
    timing: Timing,
) -> Driver:
    from budgetsearch.driver import Driver
    from budgetsearch.spaces import load_space
    from budgetsearch.study.sampler import OptunaSampler

    facts = _facts(settings, folder, card, base, prepared)
    folder.prepare(settings.model_dump(mode="json"))
    ledger = Ledger(folder.ledger)
    plan = ledger.history.plan
    space = Space.parse(plan.space) if plan else load_space(settings.space)
    opened = ledger.history.opened or Opened(timing.budget_seconds, settings.model_dump(mode="json"), facts)
    _check_same_inputs(opened, facts)
    return Driver(
        ledger=ledger,
        engine=engine,
        sampler=OptunaSampler(),
        exporter=_exporter(settings, folder, base, opened),
        clock=timing.clock,
        down_seconds=timing.down_seconds,
        request=_request(settings, timing.budget_seconds, card, space, prepared, base),
        opened=opened,
        quantizations=space.quantizations,
        grace_seconds=settings.grace_seconds,
    )


def _mirror(storage: str | None, folder: RunFolder, opened: Opened, history: History) -> Watcher:
    from budgetsearch.study.mirror import StudyMirror

    mirror = StudyMirror(storage_url(storage, folder), str(opened.facts["study"]))
    mirror.catch_up(history)
    return mirror


def finish_leaving(folder: RunFolder, history: History) -> None:
    """What the process of a run that is over may not have come to, if it was killed right then: the study's
    last lines, and removing what nobody needs any more."""
    from budgetsearch.exporter import AdapterExporter

    opened = history.opened
    assert opened is not None
    _mirror(opened.settings.get("storage"), folder, opened, history)
    keep = bool(opened.settings.get("keep_checkpoints"))
    nowhere = Path()  # nothing is exported any more
    exporter = AdapterExporter(folder.path.absolute(), folder.checkpoints, {}, {}, nowhere, keep)
    exporter.sweep(history)
    folder.tidy()


def storage_url(given: str | None, folder: RunFolder) -> str:
    """The Optuna storage of a run: what ``--storage`` says, else SQLite in its folder."""
    return given or f"sqlite:///{folder.study}"


def cache_folder() -> Path:
    """Where converted models and tokenized data are kept: BUDGETSEARCH_CACHE, or the user's cache."""
    given = os.environ.get("BUDGETSEARCH_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).absolute() if base else Path.home() / ".cache") / "budgetsearch"


def _prepare(settings: Settings, say: Say) -> tuple[BaseModel, PreparedData]:
    from budgetsearch.training.sources import resolve_model
    from budgetsearch.training.tokens import prepare

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
        card_uuid=card.uuid,
        limit_bytes=None if card.device == "cpu" else card.usable_bytes,
        trust_remote_code=settings.trust_remote_code,
        optimizer=settings.optimizer,
        torch_compile=settings.torch_compile,
        half="fp16" if card.profile.dtype == "fp16" else "bf16",
    )


def _request(
    settings: Settings,
    budget_seconds: float,
    card: Card,
    space: Space,
    prepared: PreparedData,
    base: BaseModel,
) -> PlanRequest:
    return PlanRequest(
        budget_seconds=budget_seconds,
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
        max_gang=settings.max_gang if settings.optimizer == "adamw" else 1,
        limit_bytes=card.usable_bytes,
        ranks=space.ranks,
        footprints=_footprints(settings, card, space, base),
        longest=prepared.train_stats.max_row_tokens,
        dropout=max(float(value) for value in space.values_of("dropout")),
    )


def _footprints(settings: Settings, card: Card, space: Space, base: BaseModel) -> dict[str, Footprint]:
    """Memory as foreseen; nothing for a model whose shape nobody knows: then the calibration finds out."""
    from budgetsearch.gpu.estimate import footprints
    from budgetsearch.gpu.shapes import read_config, shape_of

    try:
        shape = shape_of(read_config(base.path), base.source)
    except ModelError:
        return {}
    shape.check_targets(settings.targets)
    return footprints(
        shape, space, targets=settings.targets, optimizer=settings.optimizer, device=card.device
    )


def _exporter(settings: Settings, folder: RunFolder, base: BaseModel, opened: Opened) -> AdapterExporter:
    from budgetsearch.exporter import AdapterExporter

    return AdapterExporter(
        run_folder=folder.path.absolute(),
        checkpoint_path=folder.checkpoints,
        model_facts=opened.facts["model"],
        data_facts=opened.facts["data"],
        tokenizer_files_from=base.path,
        keep_checkpoints=settings.keep_checkpoints,
    )


def _facts(
    settings: Settings, folder: RunFolder, card: Card, base: BaseModel, prepared: PreparedData
) -> dict[str, Any]:
    """What was found before the first job, for the ledger, the report and the card."""
    # A storage that several runs share holds one study for each.
    study = f"{folder.path.name}-{uuid.uuid4().hex[:8]}" if settings.storage else folder.path.name
    return {
        "study": study,
        "card": {
            "name": card.name,
            "device": card.device,
            "usable_bytes": card.usable_bytes,
            "tflops": card.profile.tflops,
            "profile": card.profile.name,
            "stand_in": card.stand_in,
        },
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
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _check_same_inputs(opened: Opened, facts: Mapping[str, Any]) -> None:
    """A run goes on only with the model and the data that it began with."""
    for what, key in (("model", "sha256"), ("data", "prepared")):
        if opened.facts[what][key] != facts[what][key]:
            raise RunFolderError(
                f"The {what} has changed since this run began, so its trials could not be compared any "
                f"more. Bring the old {what} back, or start a new run with another --out."
            )


LAST_SECONDS = 1.0
"""So long before the end a process that hangs is ended: what it has earned is on disk."""
WATCH_SECONDS = 0.5
PREPARATION_SECONDS = 180.0
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is how schedulers announce that a job will be preempted."""


@contextmanager
def _ended_in_time(
    timing: Timing, engine: LocalEngine, folder: RunFolder, planned: Callable[[], bool]
) -> Iterator[None]:
    """Inside, this process ends before its time is over, whatever hangs in it: a download, a disk, a lock.

    The driver keeps the deadline by itself; this is for what it cannot see. Before the run is ``planned`` it
    gets PREPARATION_SECONDS in any case: a budget that is too small is to be refused with what would do.
    """
    over = threading.Event()

    def watch() -> None:
        while True:
            limit = timing.budget_seconds - LAST_SECONDS
            left = (limit if planned() else max(limit, PREPARATION_SECONDS)) - timing.clock.now()
            if left <= 0:
                break
            if over.wait(min(left, WATCH_SECONDS)):
                return
        engine.end()
        message = (
            f"error: the time is over and the process hangs, so it ends here. What was earned is safe in "
            f"{folder.path}; `budgetsearch status {folder.path}` shows it.\n"
        )
        os.write(2, message.encode())
        os._exit(EXIT_OVERDUE)

    threading.Thread(target=watch, name="last-resort", daemon=True).start()
    try:
        yield
    finally:
        over.set()


class _Signals:
    """What a signal means: at once while preparing, gently once the driver runs."""

    def __init__(self) -> None:
        self._asked = ""
        self._gentle = False

    def gently(self) -> str:
        """The signal that asked to stop, if any; from the first call on, the first one is only a request."""
        self._gentle = True
        return self._asked

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler; a second signal stops at once as well."""
        if self._asked or not self._gentle:
            raise KeyboardInterrupt
        self._asked = signal.Signals(number).name


@contextmanager
def _stop_signals() -> Iterator[_Signals]:
    """Inside, the stopping signals are handled; outside the main thread they are left alone."""
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.handle) for number in STOPPING}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
