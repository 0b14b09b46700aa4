"""What is prepared before the first job: model and data, what the worker works on, what the plan rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from budgetsearch.clock import Timing
from budgetsearch.core.budget import PlanRequest
from budgetsearch.core.errors import ModelError
from budgetsearch.core.ports import Say
from budgetsearch.core.records import WorkerSetup
from budgetsearch.core.space import Space
from budgetsearch.folders import cache_folder
from budgetsearch.runfolder import RunFolder
from budgetsearch.shared import folder_of

if TYPE_CHECKING:
    from budgetsearch.gpu.detect import Card
    from budgetsearch.gpu.shapes import ModelShape
    from budgetsearch.settings import Settings
    from budgetsearch.training.sources import BaseModel
    from budgetsearch.training.tokens import PreparedData


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


def max_held(
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
