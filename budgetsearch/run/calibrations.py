"""What a calibration depends on: where all of it is the same, an earlier one is used again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import encode
from budgetsearch.core.metric import LOSS, TASK, is_task_file
from budgetsearch.core.ports import Calibrations
from budgetsearch.core.space.space import Space
from budgetsearch.machine.detect import Card
from budgetsearch.machine.host import processor
from budgetsearch.run.jobs import NothingKept
from budgetsearch.run.prepare import PACKAGES
from budgetsearch.run.settings import Settings
from budgetsearch.storage.calibrations import KeptCalibrations, KeptSeconds, file_of
from budgetsearch.storage.files import cache_folder
from budgetsearch.training.recipes.loading import find_recipe

SETTINGS = (
    "revision",
    "max_rows",
    "split_seed",
    "valid_share",
    "max_length",
    "batch_size",
    "targets",
    "optimizer",
    "torch_compile",
    "max_gang",
    "trust_remote_code",
)
"""Those that decide what is measured, beside model and data."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def calibrations_of(
    settings: Settings, space: Space, card: Card | None, budget_seconds: float
) -> Calibrations:
    """What earlier runs measured under the same conditions. Nothing holds for a cluster, whose workers may be
    on any machine, nor for checkpoints that lie elsewhere."""
    if settings.engine != "local" or card is None or settings.shared:
        return NothingKept()
    limit = None if card.device == "cpu" else card.usable_bytes
    return KeptCalibrations(
        cache_folder() / "calibrations",
        _conditions(settings, space, card),
        budget_seconds,
        limit,
        fresh=settings.fresh_calibration,
    )


def preparation_of(settings: Settings) -> KeptSeconds:
    """What it took the last run with this model and these data to begin here."""
    names = ("revision", "max_rows", "max_length", "targets", "engine", "columns", "template")
    conditions = {
        **{name: getattr(settings, name) for name in names},
        **{name: _source(getattr(settings, name)) for name in ("data", "valid")},
        "model": _models(settings),
        "machine": [platform.node(), os.cpu_count()],
        "version": importlib.metadata.version("budgetsearch"),
    }
    return KeptSeconds(cache_folder() / "preparations" / file_of(conditions))


def _conditions(settings: Settings, space: Space, card: Card) -> dict[str, Any]:
    if settings.recipe is not None:
        trained: dict[str, Any] = {
            "recipe": encode(find_recipe(settings.recipe)),
            "params": dict(space.default()),
        }
    else:
        trained = {
            **{name: getattr(settings, name) for name in SETTINGS},
            **{name: _source(getattr(settings, name)) for name in ("data", "valid")},
            "model": _models(settings),
            "ranks": space.ranks,
            "worn": space.targets(settings.targets),
            "dropout": max(float(value) for value in space.values_of("dropout")),
            "answers": settings.task_examples > 0,
        }
    return {
        **trained,
        **({} if settings.metric == LOSS else {"metric": settings.metric}),
        **({"definition": _definition(settings.metric)} if is_task_file(settings.metric) else {}),
        "card": [card.name, card.uuid, card.device, card.profile.name, card.profile.dtype],
        "machine": [platform.node(), processor(), os.cpu_count(), len(os.sched_getaffinity(0))],
        "threads": [os.environ.get(name) for name in THREADS],
        "versions": [platform.python_version(), *map(importlib.metadata.version, PACKAGES)],
    }


def _definition(metric: str) -> list[Any]:
    """Of a task whose definition lies here, with whatever lies beside it."""
    return _source(str(Path(metric.removeprefix(TASK)).parent))


def _models(settings: Settings) -> list[Any]:
    """The base model, or each of several."""
    if len(settings.models) == 1:
        return _source(settings.model)
    return [_source(name) for name in settings.models]


def _source(source: str | None) -> list[Any]:
    """A model or data: of what lies here also sizes and times, which tell whether it is still the same."""
    path = Path(source or "").expanduser().absolute()
    if not source or not path.exists():
        return [source]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [(file.name, file.stat()) for file in files if file.is_file()]
    return [str(path), *([name, state.st_size, state.st_mtime_ns] for name, state in states)]
