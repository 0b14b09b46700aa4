"""From settings to a driver at work: every part is made here and handed to the others."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetsearch.aftermath import marked
from budgetsearch.clock import Timing
from budgetsearch.core.budget import PlanRequest
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
from budgetsearch.core.ports import Exporter, Watcher
from budgetsearch.core.records import WorkerSetup
from budgetsearch.core.space import Space
from budgetsearch.execution import RunEngine, check_execution, choose
from budgetsearch.ledger import Ledger, read_entries, read_history
from budgetsearch.runfolder import RunFolder, RunLock
from budgetsearch.shared import begin_place, check_shared, folder_of, leave_place, own_place
from budgetsearch.stopping import ended_in_time, stop_signals

if TYPE_CHECKING:
    from budgetsearch.driver import Driver
    from budgetsearch.gpu.detect import Card
    from budgetsearch.gpu.shapes import ModelShape
    from budgetsearch.settings import Settings
    from budgetsearch.study.mirror import StudyMirror
    from budgetsearch.training.sources import BaseModel
    from budgetsearch.training.tokens import PreparedData

LOGGER = logging.getLogger("budgetsearch.compose")
Say = Callable[[str], None]
"""Takes one line about what is going on."""
Conclude = Callable[[RunFolder, Say, Timing], None]
"""What follows a search."""
PACKAGES = ("budgetsearch", "torch", "transformers", "peft", "bitsandbytes", "optuna")
"""Whose versions stand in the ledger; all of them stand in versions.lock."""


def start(
    settings: Settings,
    timing: Timing,
    watchers: Sequence[Watcher],
    say: Say,
    *,
    last_resort: bool = False,
    conclude: Conclude | None = None,
) -> History:
    """Check everything that can be checked without touching anything, then make the run folder.

    Raises:
        UsageError: something cannot be used; a folder that was made is gone again.
    """
    from budgetsearch.room import check_before

    assert settings.out is not None
    folder = RunFolder(settings.out)
    check(settings)
    check_before(settings, timing.budget_seconds, cache_folder(), say)
    settings = _anchored(settings)
    try:
        folder.check_free()
        existed = folder.path.exists()
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
    except OSError as error:
        raise RunFolderError(f"--out {folder.path} cannot be made: {error}. Name another folder.") from error
    try:
        lock.sign()
        with marked(folder.path):
            if settings.shared:
                begin_place(settings.shared)
            return drive(
                settings, folder, lock, timing, watchers, say, last_resort=last_resort, conclude=conclude
            )
    except (UsageError, KeyboardInterrupt):
        if not _has_trials(folder):
            folder.clear(remove=not existed)
            if settings.shared:
                leave_place(settings.shared)
        raise
    finally:
        lock.release()


def _has_trials(folder: RunFolder) -> bool:
    """Whether anything was earned that must be kept."""
    return folder.has_ledger() and bool(read_history(folder.ledger).trials)


def _anchored(settings: Settings) -> Settings:
    """The same settings with absolute paths, so that a resume works from any folder."""
    local: dict[str, Any] = {
        name: str(Path(source).expanduser().absolute())
        for name in ("model", "data", "valid", "space")
        if (source := getattr(settings, name)) and Path(source).expanduser().exists()
    }
    if not Path(settings.space).suffix:
        local.pop("space", None)  # a name that comes with the package
    local["storage"] = anchored_storage(settings.storage)
    if settings.shared:
        assert settings.out is not None
        local["shared"] = own_place(settings.shared, settings.out.name)
    return settings.model_copy(update=local)


def anchored_storage(url: str | None) -> str | None:
    """The same storage with an absolute path."""
    prefix, _, path = (url or "").partition("sqlite:///")
    return f"sqlite:///{Path(path).expanduser().absolute()}" if path and not prefix else url


def check(settings: Settings) -> None:
    """Check everything that can be checked without fetching or writing anything.

    Raises:
        UsageError: the card, the model's source or another input cannot be used.
    """
    from budgetsearch.training.sources import check_source

    check_execution(settings)
    check_source(settings.model)
    check_inputs(settings)


def check_inputs(settings: Settings) -> None:
    """Check what needs neither the card nor the model, and no network.

    Raises:
        UsageError: the space, the targets, the data or the storage cannot be used.
    """
    from budgetsearch.spaces import load_space
    from budgetsearch.study.storage import check_url
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
        check_url(settings.storage)
    if settings.shared:
        check_shared(settings.shared)


def drive(
    settings: Settings,
    folder: RunFolder,
    lock: RunLock,
    timing: Timing,
    watchers: Sequence[Watcher],
    say: Say,
    *,
    last_resort: bool = False,
    conclude: Conclude | None = None,
) -> History:
    """Prepare model and data while the worker starts, then let the driver run to the end, and conclude.

    ``last_resort``: this process may be ended when its time is over, whatever hangs in it. ``conclude`` is
    under the same lock, last resort and signals as the search, but the first signal stops it.
    """
    from budgetsearch.study.follower import Follower

    execution = choose(settings, folder, (lock.fd,), say)
    engine = execution.engine
    drivers: list[Driver] = []

    def planned() -> bool:
        return any(driver.history.plan is not None for driver in drivers)

    watched = ended_in_time(timing, engine, folder, planned) if last_resort else nullcontext()
    with stop_signals() as signals, watched:
        try:
            engine.warm_up()
            base, prepared = prepare_inputs(settings, say)
            card = execution.card()
            engine.prepare(worker_setup(settings, folder, card, base, prepared))
            driver = _driver(settings, folder, card, base, prepared, engine, timing)
            drivers.append(driver)
            driver.stop_requested = signals.gently
            follower = Follower(_mirror(settings.storage, folder, driver.opened), read_entries(folder.ledger))
            for watcher in (*watchers, follower):
                driver.ledger.watch(watcher)
            try:
                history = driver.run()
            finally:
                follower.close()
                driver.ledger.close()
        finally:
            engine.close()
        signals.at_once()
        if conclude is not None:
            conclude(folder, say, timing)
        return history


def _driver(
    settings: Settings,
    folder: RunFolder,
    card: Card,
    base: BaseModel,
    prepared: PreparedData,
    engine: RunEngine,
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
    opened = ledger.history.opened or Opened(timing.budget_seconds, _to_write_down(settings), facts)
    _check_same_inputs(opened, facts)
    request = request_of(settings, timing.budget_seconds, card, space, prepared, base)
    if plan is None:
        request = dataclasses.replace(request, max_held=_max_held(settings, folder, space, base, timing))
    return Driver(
        ledger=ledger,
        engine=engine,
        sampler=OptunaSampler(),
        exporter=_exporter(settings, folder, base, opened),
        clock=timing.clock,
        down_seconds=timing.down_seconds,
        request=request,
        opened=opened,
        quantizations=space.quantizations,
        grace_seconds=settings.grace_seconds,
    )


def _to_write_down(settings: Settings) -> dict[str, Any]:
    """All settings, but no password."""
    from budgetsearch.study.storage import without_password

    written = settings.model_dump(mode="json")
    return {**written, "storage": without_password(settings.storage) if settings.storage else None}


def _mirror(storage: str | None, folder: RunFolder, opened: Opened) -> StudyMirror:
    from budgetsearch.study.mirror import StudyMirror
    from budgetsearch.study.showcase import Showcase

    own = None if storage else folder.study
    showcase = Showcase(folder.path.absolute())
    return StudyMirror(storage_url(storage, folder), str(opened.facts["study"]), own, showcase=showcase)


def finish_leaving(folder: RunFolder, history: History, say: Say, storage: str | None = None) -> None:
    """What the process of a run that is over may not have come to, if it was killed right then: the study's
    last lines, and removing what nobody needs any more. An adapter that was damaged since is written again.
    """
    from budgetsearch.exporter import AdapterExporter, mend
    from budgetsearch.shared_exporter import exporter_for

    opened = history.opened
    assert opened is not None
    try:
        mirror = _mirror(resumed_storage(opened, storage), folder, opened)
        mirror.catch_up(history)
        mirror.close()
    except SettingsError as error:
        LOGGER.warning("The Optuna study is not looked at. %s", error)
    keep = bool(opened.settings.get("keep_checkpoints"))
    model, data = opened.facts.get("model", {}), opened.facts.get("data", {})
    inner = AdapterExporter(folder.path.absolute(), folder.checkpoints, model, data, folder.adapter, keep)
    exporter = exporter_for(inner, opened.settings.get("shared"))
    mend(exporter, history, say, lambda: _tokenizer(opened, say))
    exporter.sweep(history)
    folder.tidy()


def resumed_storage(opened: Opened, given: str | None) -> str | None:
    """The Optuna storage of a run that goes on; ``given``: its URL again, with its password.

    Raises:
        SettingsError: the URL cannot be used, or its password is missing.
    """
    from budgetsearch.study.storage import of_resumed

    written = opened.settings.get("storage")
    if not written:
        return None  # its study lies in its folder
    return of_resumed(str(written), anchored_storage(given), bool(opened.facts.get("storage_password")))


def _tokenizer(opened: Opened, say: Say) -> Path:
    """A folder that holds the base model's tokenizer."""
    from budgetsearch.training.sources import resolve_model

    known = opened.settings
    return resolve_model(
        known["model"],
        cache_folder(),
        revision=known.get("revision"),
        trust_remote_code=bool(known.get("trust_remote_code")),
        say=say,
    ).path


def storage_url(given: str | None, folder: RunFolder) -> str:
    """The Optuna storage of a run: what ``--storage`` says, else SQLite in its folder."""
    # Optuna fills in what stands in braces.
    return given or f"sqlite:///{folder.study}".replace("{", "{{").replace("}", "}}")


def cache_folder() -> Path:
    """Where converted models and tokenized data are kept: BUDGETSEARCH_CACHE, or the user's cache."""
    given = os.environ.get("BUDGETSEARCH_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).absolute() if base else Path.home() / ".cache") / "budgetsearch"


def prepare_inputs(settings: Settings, say: Say) -> tuple[BaseModel, PreparedData]:
    """Fetch and convert the base model, tokenize the data; both are cached.

    Raises:
        UsageError: the model or the data cannot be used.
    """
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
        trust_remote_code=settings.trust_remote_code,
        say=say,
    )
    return base, prepared


def worker_setup(
    settings: Settings, folder: RunFolder, card: Card, base: BaseModel, prepared: PreparedData
) -> WorkerSetup:
    """What a worker process works on, whatever its jobs are."""
    return WorkerSetup(
        model_path=str(base.path),
        model_name=base.loadable,
        data_path=str(prepared.folder),
        checkpoint_path=str((folder_of(settings.shared) or folder.checkpoints).absolute()),
        shared=settings.shared or "",
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


def request_of(
    settings: Settings,
    budget_seconds: float,
    card: Card,
    space: Space,
    prepared: PreparedData,
    base: BaseModel,
) -> PlanRequest:
    """What the plan rests on, beside what is still to be measured."""
    from budgetsearch.request import DataSize, request_for

    train, shape = prepared.train_stats, _shape(base)
    return request_for(
        settings,
        budget_seconds=budget_seconds,
        card=card.profile.name,
        device=card.device,
        usable_bytes=card.usable_bytes,
        space=space,
        data=DataSize(train.tokens, train.rows, prepared.valid_stats.rows, train.max_row_tokens),
        shape=shape,
        max_gang=settings.max_gang,
    )


def _shape(base: BaseModel) -> ModelShape | None:
    from budgetsearch.gpu.shapes import read_config, shape_of

    try:
        return shape_of(read_config(base.path), base.source)
    except ModelError:
        return None


def _max_held(
    settings: Settings, folder: RunFolder, space: Space, base: BaseModel, timing: Timing
) -> int | None:
    """How many trials that wait may keep a checkpoint on the run folder's disk; None: unknown.

    Raises:
        RunFolderError: the disk has no room for the least that a run needs.
    """
    from budgetsearch.needs import largest_adapter, run_need
    from budgetsearch.room import check_disks

    shape = _shape(base)
    if shape is None:
        return None
    weights = largest_adapter(settings, space, shape)
    need = run_need(settings, weights, timing.budget_seconds, base.path)
    return check_disks(settings, folder.path, need)


def _exporter(settings: Settings, folder: RunFolder, base: BaseModel, opened: Opened) -> Exporter:
    from budgetsearch.exporter import AdapterExporter
    from budgetsearch.shared_exporter import exporter_for

    inner = AdapterExporter(
        run_folder=folder.path.absolute(),
        checkpoint_path=folder.checkpoints,
        model_facts=opened.facts["model"],
        data_facts=opened.facts["data"],
        tokenizer_files_from=base.path,
        keep_checkpoints=settings.keep_checkpoints,
    )
    return exporter_for(inner, settings.shared)


def _facts(
    settings: Settings, folder: RunFolder, card: Card, base: BaseModel, prepared: PreparedData
) -> dict[str, Any]:
    """What was found before the first job, for the ledger, the report and the card."""
    from budgetsearch.study.storage import has_password
    from budgetsearch.training.inputs import input_facts

    # A storage that several runs share holds one study for each.
    study = f"{folder.path.name}-{uuid.uuid4().hex[:8]}" if settings.storage else folder.path.name
    return {
        "study": study,
        "storage_password": has_password(settings.storage),
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
            **prepared.valid_hashes(),
        },
        "inputs": input_facts(base, prepared, {"data": settings.data, "valid": settings.valid}),
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
