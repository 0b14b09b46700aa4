"""Checkpoints: safetensors and JSON in a folder that appears complete or not at all.

A checkpoint is itself a PEFT adapter: ``PeftModel.from_pretrained(base, folder)`` loads the averaged
weights. Beside them lies what training needs to go on. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import CheckpointError
from budgetsearch.storage.files import fresh_folder
from budgetsearch.training import sums
from budgetsearch.training.sums import ADAPTER_FILE, CONFIG_FILE, META_FILE, STATE_FILE


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
    """``weight/NAME``, ``optimizer/STATE/NAME``."""
    adapter: dict[str, torch.Tensor]
    """The average of the weights, under PEFT's names: it is stored as the adapter and nowhere else."""
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
    """Write a checkpoint to a temporary folder, sync it, rename it to ``folder``.

    Raises:
        OSError: the disk is full, or the folder around it is gone or cannot be written.
    """
    folder.parent.stat()  # whoever removed the run's folder does not want another one there
    if folder.exists():  # the same trial at the same token: what is there is what would be written
        shutil.rmtree(folder)
    with fresh_folder(folder) as temporary:
        try:
            save_file(adapter, temporary / ADAPTER_FILE, metadata={"format": "pt"})
            save_file(tensors, temporary / STATE_FILE)
        except SafetensorError as error:  # what the system said is in its text alone
            raise OSError(str(error)) from error
        text = json.dumps(config, indent=2, sort_keys=True)
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        meta = {**asdict(progress), **sums.describe(temporary)}
        (temporary / META_FILE).write_text(json.dumps(meta, indent=2), encoding="utf-8")


def load(folder: Path) -> Saved:
    """Read a checkpoint and check it against its own sums.

    Raises:
        CheckpointError: it is missing, torn or altered.
        UnreadableError: the system cannot read it now.
    """
    meta = sums.check(folder)
    try:
        return sums.patiently(lambda: _read(folder, meta), f"The checkpoint {folder}")
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {folder} cannot be read: {error}") from error


def _read(folder: Path, meta: Mapping[str, Any]) -> Saved:
    try:
        config = read_json((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        progress = Progress(int(meta["tokens"]), int(meta["steps"]))
        adapter = load_file(folder / ADAPTER_FILE)
        return Saved(progress, load_file(folder / STATE_FILE), adapter, config)
    except SafetensorError as error:
        if "(os error " in str(error):  # what the system said is in its text alone
            raise OSError(str(error)) from error
        raise
