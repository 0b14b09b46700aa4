"""What a run needs on disk, from its settings and the shape of its model: for a run, for its preview and for
an examination.
"""

from __future__ import annotations

from pathlib import Path

from budgetsearch.core.disk import DiskNeed, most_held, need_of
from budgetsearch.core.ladders import DEEP
from budgetsearch.core.space import Space
from budgetsearch.gpu.shapes import ModelShape
from budgetsearch.settings import Settings
from budgetsearch.training.sources import BIG_MODEL

FULL_RUNS = 8
"""Before anything is measured nobody knows how many full runs the budget holds: so many are assumed, and
where it holds more, fewer trials than that wait for one."""
TOKENIZER_BYTES = 32 * 2**20
"""Of a tokenizer that is not here yet: an allowance."""
ROW_BYTES = 12
"""Of a tokenized row beside its tokens."""


def largest_adapter(settings: Settings, space: Space, shape: ModelShape) -> int:
    """Weights of an adapter of the largest rank that the space can ask for."""
    return shape.weights_per_rank(settings.targets) * max(space.ranks)


def run_need(settings: Settings, weights: int, budget_seconds: float, base: Path | None = None) -> DiskNeed:
    """The need of the run folder with so many weights in the largest adapter.

    ``base``: the folder of the base model, where it is known.
    """
    workers = settings.gpus or 1
    held = most_held(eta=settings.eta, top_rung=len(DEEP) - 1, full_runs=FULL_RUNS, workers=workers)
    return need_of(
        weights,
        tokenizer_bytes=_tokenizer_bytes(base) if base is not None else TOKENIZER_BYTES,
        budget_seconds=budget_seconds,
        held=min(held, workers * settings.max_trials),
        gang=workers * (settings.max_gang if settings.optimizer == "adamw" else 1),
    )


def cache_need(model: str, shape: ModelShape | None, rows: int, tokens: float) -> dict[str, int | None]:
    """Bytes that a run adds to the cache, by what they are; None: unknown. A folder is used where it lies."""
    tokenized = int(4 * tokens) + ROW_BYTES * rows
    path = Path(model).expanduser()
    if path.is_dir():
        return {"tokenized data": tokenized}
    converted = None
    if path.suffix == ".gguf" and shape is not None:
        converted = shape.weights * (2 if shape.weights > BIG_MODEL else 4)
    return {"tokenized data": tokenized, "model": converted}


def _tokenizer_bytes(base: Path) -> int:
    """Every small file of the model's folder: the tokenizer is among them."""
    files = [path for path in base.iterdir() if path.is_file() and path.suffix != ".safetensors"]
    return sum(path.stat().st_size for path in files)
