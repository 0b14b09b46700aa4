"""Checkpoints: safetensors and JSON in a folder that appears complete or not at all.

A checkpoint is itself a PEFT adapter: ``PeftModel.from_pretrained(base, folder)`` loads the averaged
weights. Beside them lies what training needs to go on. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from budgetsearch.core.errors import CheckpointError
from budgetsearch.folders import fresh_folder

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
STATE_FILE = "trainer.safetensors"
META_FILE = "state.json"
SUMMED = (ADAPTER_FILE, STATE_FILE, CONFIG_FILE)
"""Whose sums stand in ``state.json``."""


@dataclass(frozen=True)
class Progress:
    """Where a trial stands in its data and its optimizer."""

    tokens: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside the exportable adapter."""

    progress: Progress
    tensors: dict[str, torch.Tensor]
    """``weight/NAME``, ``average/NAME``, ``optimizer/STATE/NAME``."""
    config: dict[str, Any]
    """PEFT's, from ``adapter_config.json``."""


def save(
    folder: Path,
    *,
    adapter: dict[str, torch.Tensor],
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    progress: Progress,
) -> None:
    """Write a checkpoint to a temporary folder, sync it, rename it to ``folder``."""
    if folder.exists():  # the same trial at the same token: what is there is what would be written
        shutil.rmtree(folder)
    with fresh_folder(folder) as temporary:
        save_file(adapter, temporary / ADAPTER_FILE, metadata={"format": "pt"})
        save_file(tensors, temporary / STATE_FILE)
        text = json.dumps(config, indent=2, sort_keys=True)
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        sums = {name: _sha256(temporary / name) for name in SUMMED}
        meta = {**asdict(progress), "sha256": sums}
        (temporary / META_FILE).write_text(json.dumps(meta, indent=2), encoding="utf-8")


def load(folder: Path) -> Saved:
    """Read a checkpoint and check it against its own sums.

    Raises:
        CheckpointError: it is missing, torn or altered.
    """
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        if set(meta["sha256"]) != set(SUMMED):  # names of a stranger's choice are no files to open
            raise CheckpointError(f"The checkpoint {folder} is damaged: {META_FILE} lists other files.")
        for name in SUMMED:
            if _sha256(folder / name) != meta["sha256"][name]:
                raise CheckpointError(f"The checkpoint {folder} is damaged: {name} has changed.")
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        progress = Progress(int(meta["tokens"]), int(meta["steps"]))
        with safe_open(folder / ADAPTER_FILE, framework="pt"):
            pass  # PEFT reads it when it is scored
        return Saved(progress, load_file(folder / STATE_FILE), config)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {folder} cannot be read: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
