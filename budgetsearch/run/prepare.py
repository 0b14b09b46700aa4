"""What a run prepares: model and data, the worker's setup, the plan's request, its ledger's first event."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from budgetsearch.core.errors import ModelError, RunFolderError
from budgetsearch.core.events import Opened
from budgetsearch.core.policy.planning import PlanRequest
from budgetsearch.core.ports import Say
from budgetsearch.core.records import WorkerSetup
from budgetsearch.core.space.space import Space
from budgetsearch.machine.clock import Timing
from budgetsearch.machine.memory import footprints
from budgetsearch.machine.shapes import ModelShape
from budgetsearch.run.settings import Settings
from budgetsearch.storage.files import cache_folder
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.storage.shared import folder_of

if TYPE_CHECKING:
    from budgetsearch.machine.detect import Card
    from budgetsearch.machine.shapes import ModelShape
    from budgetsearch.run.settings import Settings
    from budgetsearch.training.data.models import BaseModel
    from budgetsearch.training.data.tokens import PreparedData


def prepare_inputs(settings: Settings, say: Say) -> tuple[BaseModel, PreparedData]:
    """Fetch and convert the base model, tokenize the data; both are cached.

    Raises:
        UsageError: the model or the data cannot be used.
    """
    from budgetsearch.training.data.models import resolve_model
    from budgetsearch.training.data.tokens import Sources, prepare

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
        Sources(settings.data, settings.valid, settings.seed, settings.max_rows, settings.valid_share),
        max_length=settings.max_length,
        cache=cache,
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

    train, shape = prepared.train_stats, _shape(base)
    return request_for(
        settings,
        budget_seconds=budget_seconds,
        card=CardSize(card.profile.name, card.device, card.usable_bytes),
        space=space,
        data=DataSize(train.tokens, train.rows, prepared.valid_stats.rows, train.max_row_tokens),
        shape=shape,
        max_gang=settings.max_gang,
    )


def _shape(base: BaseModel) -> ModelShape | None:
    from budgetsearch.machine.shapes import read_config, shape_of

    try:
        return shape_of(read_config(base.path), base.source)
    except ModelError:
        return None


def max_held(
    settings: Settings, folder: RunFolder, space: Space, base: BaseModel, timing: Timing
) -> int | None:
    """How many trials that wait may keep a checkpoint on the run folder's disk; None: unknown.

    Raises:
        RunFolderError: the disk has no room for the least that a run needs.
    """
    from budgetsearch.run.preflight import check_disks, largest_adapter, run_need

    shape = _shape(base)
    if shape is None:
        return None
    weights = largest_adapter(settings, space, shape)
    need = run_need(settings, weights, timing.budget_seconds, base.path)
    return check_disks(settings, folder.path, need)


PACKAGES = ("budgetsearch", "torch", "transformers", "peft", "bitsandbytes", "optuna")
"""Whose versions stand in the ledger; all of them stand in versions.lock."""


def facts_of(
    settings: Settings, folder: RunFolder, card: Card, base: BaseModel, prepared: PreparedData
) -> dict[str, Any]:
    """What was found before the first job, for the ledger, the report and the card."""
    from budgetsearch.training.data.provenance import input_facts
    from budgetsearch.views.study.storage import has_password

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


def to_write_down(settings: Settings) -> dict[str, Any]:
    """All settings, but no password."""
    from budgetsearch.views.study.storage import without_password

    written = settings.model_dump(mode="json")
    return {**written, "storage": without_password(settings.storage) if settings.storage else None}


def check_same_inputs(opened: Opened, facts: Mapping[str, Any]) -> None:
    """A run goes on only with the model and the data that it began with."""
    for what, key in (("model", "sha256"), ("data", "prepared")):
        if opened.facts[what][key] != facts[what][key]:
            raise RunFolderError(
                f"The {what} has changed since this run began, so its trials could not be compared any "
                f"more. Bring the old {what} back, or start a new run with another --out."
            )


@dataclass(frozen=True)
class DataSize:
    """How much there is to train on."""

    train_tokens: int
    train_rows: int
    valid_rows: int
    longest: int
    """Tokens of the longest training row."""


@dataclass(frozen=True)
class CardSize:
    """What a plan needs to know of a card."""

    name: str
    """Of its profile."""
    device: str
    """cpu or cuda."""
    usable_bytes: int


def request_for(
    settings: Settings,
    *,
    budget_seconds: float,
    card: CardSize,
    space: Space,
    data: DataSize,
    shape: ModelShape | None,
    max_gang: int,
) -> PlanRequest:
    """The request of a run with these settings.

    ``shape``: None where nobody can foresee memory; then the calibration finds out.

    Raises:
        UsageError: the model has no layer of a name in ``targets``.
    """
    foreseen = {}
    if shape is not None:
        shape.check_targets(settings.targets)
        foreseen = footprints(
            shape, space, targets=settings.targets, optimizer=settings.optimizer, device=card.device
        )
    return PlanRequest(
        budget_seconds=budget_seconds,
        gpu=card.name,
        space=space.to_dict(),
        seed=settings.seed,
        eta=settings.eta,
        first_rung=settings.first_rung,
        full_share=settings.full_share,
        max_epochs=settings.max_epochs,
        eval_share=settings.eval_share,
        batch_size=settings.batch_size,
        train_tokens=data.train_tokens,
        train_rows=data.train_rows,
        valid_rows=data.valid_rows,
        task_examples=settings.task_examples,
        max_trials=settings.max_trials,
        max_gang=max_gang if settings.optimizer == "adamw" else 1,
        limit_bytes=card.usable_bytes,
        ranks=space.ranks,
        footprints=foreseen,
        longest=data.longest,
        dropout=max(float(value) for value in space.values_of("dropout")),
    )
