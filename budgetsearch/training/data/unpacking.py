"""A copy in 16 bits of a base model whose checkpoint is quantized: every quantization can be had of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from budgetsearch.core.errors import ModelError
from budgetsearch.core.ports import Say
from budgetsearch.machine.anatomy import PACKED, checkpoint_of
from budgetsearch.storage.files import fresh_folder
from budgetsearch.training.classes import class_of, config_of, short
from budgetsearch.training.quiet import quiet

UNPACKED = frozenset({"nf4", "fp4", "int8", *PACKED})
"""Quantizations that transformers unpacks."""
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".gguf")
"""How the names of files end that hold the packed weights."""


def unpack(source: Path, folder: Path, say: Say = lambda _: None) -> Path:
    """Write an unpacked copy of the model in ``source`` to ``folder``, which must not exist; returns it.

    Raises:
        ModelError: it is not quantized, or in a way that transformers does not unpack.
    """
    config = config_of(str(source))
    kind = checkpoint_of(config.to_dict())
    if kind not in UNPACKED:
        what = f"quantized with {kind}, which is not unpacked here" if kind else "not quantized"
        raise ModelError(
            f"{source} is {what}: {'use the model that it was made from' if kind else 'use it as it is'}."
        )
    if folder.exists():
        raise ModelError(f"{folder} is there already; name a folder that is not.")
    say(f"unpacking {source} ({kind}) into {folder}")
    try:
        with quiet(), fresh_folder(folder) as fresh:
            _written(_unpacked(source, config, kind), source, fresh)
    except (OSError, ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        raise ModelError(
            f"{source} ({kind}) cannot be unpacked: {short(error)}. Use the model it was made from."
        ) from error
    return folder


def _unpacked(source: Path, config: Any, kind: str) -> Any:
    """The model in bfloat16, on the CPU."""
    from transformers import FineGrainedFP8Config, Mxfp4Config

    packed = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    given = {"quantization_config": packed[kind](dequantize=True)} if kind in packed else {}
    found = class_of(config, str(source))
    model = found.from_pretrained(source, dtype=torch.bfloat16, device_map={"": "cpu"}, **given)
    return model if kind in packed else model.dequantize(torch.bfloat16)


def _written(model: Any, source: Path, folder: Path) -> None:
    """The model as if it had never been packed, and what lies beside its weights."""
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS) and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        clean = type(model)._from_config(config, dtype=torch.bfloat16)
    clean.load_state_dict(model.state_dict(), assign=True)
    clean.tie_weights()
    clean.generation_config = model.generation_config
    clean.save_pretrained(folder)
