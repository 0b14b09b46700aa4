"""What a run prepares: model and data, what its workers work on, what its plan and its ledger begin with."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from budgetsearch.core.errors import ModelError
from budgetsearch.core.events import Opened
from budgetsearch.core.metric import LOSS, read_metric
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.ports import Say
from budgetsearch.core.records import WorkerSetup
from budgetsearch.core.space.space import Space
from budgetsearch.machine.anatomy import table_of
from budgetsearch.machine.configs import read_config
from budgetsearch.machine.memory import footprints
from budgetsearch.machine.shapes import ModelShape, shape_of
from budgetsearch.run.lengths import length_shares
from budgetsearch.run.possible import check_possible, examined
from budgetsearch.run.preflight import check_disks, largest_adapter, run_need
from budgetsearch.run.spaces import following
from budgetsearch.storage.files import cache_folder
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.storage.shared import folder_of
from budgetsearch.views.study.storage import has_password, without_password

if TYPE_CHECKING:
    from budgetsearch.machine.detect import Card
    from budgetsearch.run.settings import Settings
    from budgetsearch.training.anatomy import Anatomy
    from budgetsearch.training.data.models import BaseModel
    from budgetsearch.training.data.templates import Options
    from budgetsearch.training.data.tokens import PreparedData

PACKAGES = ("budgetsearch", "torch", "transformers", "peft", "bitsandbytes", "optuna")
"""Whose versions stand in the ledger; all of them stand in versions.lock."""


class Subject(Protocol):
    """What a run trains, once all that it needs is on this machine."""

    @property
    def settings(self) -> Settings:
        """Those of the run."""
        ...

    def setup(self, folder: RunFolder) -> WorkerSetup:
        """What a worker process works on, whatever its jobs are."""
        ...

    def request(self, space: Space, budget_seconds: float) -> PlanRequest:
        """What the plan rests on, beside what is still to be measured."""
        ...

    def facts(self, run: str) -> dict[str, Any]:
        """What was found before the first job, for the ledger, the report and the card."""
        ...

    def held(self, space: Space, out: Path, budget_seconds: float) -> int | None:
        """How many trials that wait may keep a checkpoint; None: unknown."""
        ...

    @property
    def tokenizer(self) -> Path | Mapping[str, Path] | None:
        """A folder with the tokenizer's files, which go with the adapter; of several models one by label;
        None: there is none."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A base model and data, once they are on this machine: adapters are trained."""

    settings: Settings
    card: Card
    base: BaseModel
    data: PreparedData
    space: Space | None = None
    """None: there is nothing to search, the trials are known."""

    @property
    def targets(self) -> str:
        """Whatever a trial may put adapters on."""
        usual = self.settings.targets
        return self.space.targets(usual) if self.space is not None else usual

    def setup(self, folder: RunFolder) -> WorkerSetup:
        """What a worker process works on, whatever its jobs are."""
        return worker_setup(self, folder)

    def request(self, space: Space, budget_seconds: float) -> PlanRequest:
        """What the plan rests on, beside what is still to be measured."""
        return request_of(self, space, budget_seconds)

    def facts(self, run: str) -> dict[str, Any]:
        """What was found before the first job, for the ledger, the report and the card."""
        return facts_of(self, run)

    def held(self, space: Space, out: Path, budget_seconds: float) -> int | None:
        """How many trials that wait may keep a checkpoint; None: unknown.

        Raises:
            RunFolderError: the disk has no room for the least that a run needs.
        """
        return max_held(self, space, out, budget_seconds)

    @property
    def tokenizer(self) -> Path:
        """A folder with the tokenizer's files, which go with the adapter."""
        return self.base.path

    @property
    def anatomy(self) -> Anatomy:
        """The base model's parts, and where adapters go."""
        return examined(self.base.path, self.targets, self.settings.trust_remote_code)

    @cached_property
    def shape(self) -> ModelShape | None:
        """The base model's shape; None where nobody can foresee memory with it."""
        try:
            config = read_config(self.base.path)
            try:
                return shape_of(config, self.base.source, table_of(self.base.path))
            except ModelError:
                return shape_of(config, self.base.source)
        except ModelError:
            return None


@dataclass
class Watch:
    """The time of a preparation."""

    seconds_left: Callable[[], float] | None = None
    """Until the data must be prepared; None: no limit."""
    once: float = 0.0
    """Seconds of what no later run does again: fetching and converting."""


def prepare_inputs(
    settings: Settings, say: Say, watch: Watch | None = None, space: Space | None = None
) -> tuple[BaseModel, PreparedData]:
    """Fetch and convert the base model, look at its modules, tokenize the data; all but the look is cached.

    ``space``: the model must have its targets and at least one of its quantizations.

    Raises:
        UsageError: the model or the data cannot be used.
    """
    from budgetsearch.training.data.models import resolve_model
    from budgetsearch.training.data.tokens import Sources, prepare

    cache, watch, begun = cache_folder(), watch or Watch(), time.monotonic()
    base = resolve_model(
        settings.model,
        cache,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        say=say,
    )
    watch.once += time.monotonic() - begun
    targets = space.targets(settings.targets) if space is not None else settings.targets
    anatomy = examined(base.path, targets, settings.trust_remote_code)
    check_possible(settings.model, space.quantizations if space is not None else (), anatomy.refused)
    say(anatomy.sentence())
    data = prepare(
        base.path,
        Sources(
            settings.data,
            settings.valid,
            settings.split_seed,
            settings.max_rows,
            settings.valid_share,
            settings.columns,
            settings.bad_rows,
        ),
        max_length=settings.max_length,
        cache=cache,
        options=options_of(settings),
        trust_remote_code=settings.trust_remote_code,
        say=say,
        seconds_left=watch.seconds_left,
    )
    return base, data


def options_of(settings: Settings) -> Options:
    """How the rows of a run with these settings become tokens."""
    from budgetsearch.training.data.templates import Options

    return Options(settings.template, settings.system or "", settings.thinking, settings.train_on)


def worker_setup(prepared: Prepared, folder: RunFolder) -> WorkerSetup:
    """What a worker process works on, whatever its jobs are."""
    settings, card = prepared.settings, prepared.card
    return WorkerSetup(
        model_path=str(prepared.base.path),
        model_name=prepared.base.loadable,
        data_path=str(prepared.data.folder),
        checkpoint_path=str((folder_of(settings.shared) or folder.checkpoints).absolute()),
        shared=settings.shared or "",
        device=card.device,
        targets=settings.targets,
        worn=prepared.targets,
        seed=settings.seed,
        card_uuid=card.uuid,
        limit_bytes=None if card.device == "cpu" else card.usable_bytes,
        trust_remote_code=settings.trust_remote_code,
        optimizer=settings.optimizer,
        torch_compile=settings.torch_compile,
        half="fp16" if card.profile.dtype == "fp16" else "bf16",
        metric="" if settings.metric == LOSS else settings.metric,
        metric_folder=os.getcwd(),
    )


# --------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class DataSize:
    """How much there is to train on."""

    train_tokens: int
    train_rows: int
    valid_rows: int
    longest: int
    """Tokens of the longest training row."""
    shares: tuple[tuple[int, float], ...] = ()
    """See ``Plan.length_shares``."""


def request_of(prepared: Prepared, space: Space, budget_seconds: float) -> PlanRequest:
    """What the plan rests on, beside what is still to be measured."""
    train, valid = prepared.data.train_stats, prepared.data.valid_stats
    sizes = train.tokens, train.rows, valid.rows, train.max_row_tokens
    size = DataSize(*sizes, length_shares(prepared.data, space))
    request = request_for(prepared.settings, budget_seconds, prepared.card, space, size, prepared.shape)
    return dataclasses.replace(request, refused=prepared.anatomy.refused)


def request_for(
    settings: Settings,
    budget_seconds: float,
    card: Card,
    space: Space,
    data: DataSize,
    shape: ModelShape | None,
) -> PlanRequest:
    """The request of a run with these settings.

    ``shape``: None where nobody can foresee memory; then the calibration finds out.

    Raises:
        UsageError: the model has no layer of a name in ``targets``, or none of the space's quantizations.
    """
    foreseen = {}
    if shape is not None:
        targets = space.targets(settings.targets)
        shape.check_targets(targets)
        check_possible(settings.model, space.quantizations, shape.refused)
        foreseen = footprints(
            *(shape, space),
            targets=targets,
            optimizer=settings.optimizer,
            device=card.device,
            half=card.profile.dtype,
        )
    return PlanRequest(
        budget_seconds=budget_seconds,
        gpu=card.profile.name,
        space=following(space, shape).to_dict(),
        seed=settings.seed,
        eta=settings.eta,
        first_rung=settings.first_rung,
        full_share=settings.full_share,
        max_epochs=space.largest("epochs", settings.max_epochs),
        eval_share=settings.eval_share,
        batch_size=int(space.largest("batch_size", settings.batch_size)),
        train_tokens=data.train_tokens,
        train_rows=data.train_rows,
        valid_rows=data.valid_rows,
        task_examples=settings.task_examples,
        max_trials=settings.max_trials,
        max_gang=settings.max_gang if settings.optimizer == "adamw" else 1,
        limit_bytes=card.usable_bytes,
        ranks=space.ranks,
        refused=shape.refused if shape is not None else {},
        footprints=foreseen,
        longest=data.longest,
        length_shares=data.shares,
        dropout=max(float(value) for value in space.values_of("dropout")),
        metric=read_metric(settings.metric, settings.direction),
    )


def max_held(prepared: Prepared, space: Space, out: Path, budget_seconds: float) -> int | None:
    """How many trials that wait may keep a checkpoint on the disk of the run folder; None: unknown.

    Raises:
        RunFolderError: the disk has no room for the least that a run needs.
    """
    settings = prepared.settings
    if prepared.shape is None:
        return None
    weights = largest_adapter(settings.targets, space, prepared.shape)
    need = run_need(settings, weights, budget_seconds, prepared.base.path)
    return check_disks(settings.shared, out, need)


# ------------------------------------------------------------------------------- the ledger


def opened_by(prepared: Subject, run: str, budget_seconds: float) -> Opened:
    """The first event of the run of this name."""
    return Opened(budget_seconds, to_write_down(prepared.settings), prepared.facts(run))


def run_id_of(opened: Opened) -> str:
    """What the run calls itself in the sign of its checkpoints' folder."""
    return str(opened.facts.get("run", ""))


def facts_of(prepared: Prepared, run: str) -> dict[str, Any]:
    """What was found before the first job, for the ledger, the report and the card."""
    from budgetsearch.training.data.provenance import input_facts, licences

    settings, card, base, data = prepared.settings, prepared.card, prepared.base, prepared.data
    return {
        **common_facts(settings, card, run),
        "model": {
            "source": base.source,
            "loadable": base.loadable,
            "revision": base.revision,
            "sha256": base.sha256,
            "licence": base.licence,
            "anatomy": prepared.anatomy.facts(),
        },
        "data": {
            "source_sha256": data.source_sha256,
            "template": data.template,
            "chat_template": data.facts["chat_template"],
            "stops": data.facts["stops"],
            "train": dataclasses.asdict(data.train_stats),
            "valid": dataclasses.asdict(data.valid_stats),
            "prepared": data.folder.name,
            "licences": licences(settings.data, settings.valid),
            **data.valid_hashes(),
        },
        "inputs": input_facts(base, data, {"data": settings.data, "valid": settings.valid}),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def common_facts(settings: Settings, card: Card, run: str) -> dict[str, Any]:
    """Those that every run has, whatever it trains."""
    return {
        "run": uuid.uuid4().hex,
        # A storage that several runs share holds one study for each.
        "study": f"{run}-{uuid.uuid4().hex[:8]}" if settings.storage else run,
        "storage_password": has_password(settings.storage),
        "card": {
            "name": card.name,
            "device": card.device,
            "usable_bytes": card.usable_bytes,
            "tflops": card.profile.tflops,
            "profile": card.profile.name,
            "stand_in": card.stand_in,
        },
    }


def to_write_down(settings: Settings) -> dict[str, Any]:
    """All settings, but no password."""
    written = settings.model_dump(mode="json")
    return {**written, "storage": without_password(settings.storage) if settings.storage else None}
