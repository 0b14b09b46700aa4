"""``manifest.json``: everything that the exported adapter came from, typed. docs/reproduce.md explains it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import UsageError
from budgetsearch.storage.runfolder import RunFolder

FORMAT = 1
MANIFEST = "manifest.json"


class Part(BaseModel):
    """A part of the manifest; what a later version adds is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class File(Part):
    """A file as it was."""

    name: str
    bytes: int
    sha256: str


class Base(Part):
    """The base model."""

    source: str = Field(description="As it was given; of a local path its last part.")
    path: str | None = Field(description="Where a local one lies, from the run folder.")
    revision: str | None = Field(description="Commit of a Hub model.")
    licence: str | None
    origin: dict[str, Any] | None = Field(description="What a converted model was made of.")
    anatomy: dict[str, Any] | None = Field(
        None,
        description="Its class, the layers with adapters by kind, the share that a quantization shrinks.",
    )
    sha256: str = Field(description="Over the hashes of its files.")
    files: tuple[File, ...] = Field(description="Weights, configuration and tokenizer.")


class Source(Part):
    """Where rows come from."""

    role: str = Field(description="data or valid.")
    source: str = Field(description="As it was given; of a local path its last part.")
    path: str | None = Field(description="Where a local one lies, from the run folder.")
    file: File | None = Field(description="None where the rows are generated.")


class Rows(Part):
    """One side of the split, in its order."""

    sha256: str = Field(description="Of the token ids, row by row in their order.")
    stats: dict[str, Any] = Field(description="Rows, tokens, completion tokens, what was cut.")


class Data(Part):
    """Rows, and how they became tokens."""

    sources: tuple[Source, ...]
    source_sha256: str = Field(description="Of all rows, before they are split and shuffled.")
    template: str = Field(description="chat (the tokenizer's own) or plain.")
    train: Rows
    valid: Rows
    left_out: tuple[int, ...] | None = Field(
        None,
        description="Of a run with several models: validation rows that not all of them have as a whole and "
        "nobody was measured on; losses are then in nats per byte of the completion.",
    )


class Link(Part):
    """One job in which the winner took a step of its way."""

    job_id: int
    segments: tuple[dict[str, Any], ...] = Field(
        description="Segment records (core/records.py) of all that took part, in their order in the batch: "
        "trial, configuration, seed, tokens, schedule, batch, gradient checkpointing."
    )
    course: tuple[dict[str, Any], ...] = Field(
        description="Stint records: who trained side by side, with which micro-batches, for how many passes."
    )
    tokens: int = Field(description="Tokens that the winner had seen at the end of it.")
    steps: int = Field(description="Optimizer steps that it took in it.")
    status: str
    train_loss: float | None = Field(description="Mean of its last eight steps.")
    seconds: float
    computed_on: dict[str, str] = Field(description="Processor or card, threads, versions.")


class Scores(Part):
    """The evaluation; the rows are the first ones of the validation rows."""

    final: bool = Field(description="Scored by itself at the end, not in passing at the end of a segment.")
    quantization: str
    micro_batch: int
    base_loss: float | None
    adapter_loss: float | None
    base_example_losses: tuple[float, ...]
    adapter_example_losses: tuple[float, ...]
    base_accuracy: float | None = None
    adapter_accuracy: float | None = None
    task_examples: int = Field(0, description="Answers behind the accuracies.")
    first_answers: int = Field(0, description="So many were asked for; the others filled idle seconds.")
    computed_on: dict[str, str] = Field(default_factory=dict)


class Adapter(Part):
    """The exported adapter."""

    trial_id: int
    params: dict[str, Any]
    seed: int
    tokens: int
    files: tuple[File, ...]
    tensors_sha256: str = Field(description="Of names, types, shapes and bytes of its tensors.")
    norm: float = Field(description="Euclidean norm of all its weights.")


class Manifest(Part):
    """From this file alone the winner can be trained again."""

    format: int = FORMAT
    adapter: Adapter
    base: Base
    data: Data
    settings: dict[str, Any] = Field(description="Every setting, defaults included; no password.")
    seed: int = Field(
        description="Of the sampler, the trials and the order of the data; the split has its own."
    )
    card: dict[str, Any] = Field(description="Name, device, usable bytes.")
    machine: dict[str, Any] = Field(description="Python, system, driver.")
    versions: dict[str, str] = Field(description="Every installed package.")
    training: tuple[Link, ...] = Field(description="The winner's way, from its first token on.")
    scores: Scores | None
    ledger_results: int = Field(description="Segments that the ledger held when this was written.")


@dataclass(frozen=True)
class Found:
    """A manifest on disk."""

    path: Path
    manifest: Manifest
    expected: str
    """SHA-256 of its content, as it says itself."""
    found: str
    """... and as it is."""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.path.parent


def to_text(manifest: Manifest) -> str:
    """The file's text, its own hash included."""
    body = manifest.model_dump(mode="json")
    return json.dumps({**body, "sha256": digest(body)}, indent=1, ensure_ascii=False) + "\n"


def digest(body: Mapping[str, Any]) -> str:
    """Hash of a manifest's content, whatever its layout; its own hash does not count."""
    rest = {name: value for name, value in body.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read(where: Path) -> Found:
    """The manifest of a run, of an adapter, or by its own path.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    path = where / MANIFEST if where.is_dir() else where
    if not path.is_file():
        folder = RunFolder(where)
        if folder.has_ledger() and folder.in_use():
            raise UsageError(
                f"{where} is still going: it writes its {MANIFEST} when it stops. Try again then."
            )
        what = "has no manifest.json" if where.is_dir() else "does not exist"
        raise UsageError(
            f"{where} {what}. Name the folder of a run, of its adapter, or a manifest.json. A run writes it "
            "when it stops; `budgetsearch resume RUN` finishes one that was killed."
        )
    try:
        body = read_json(path.read_text(encoding="utf-8"))
        if isinstance(body, dict) and int(body.get("format", 0)) > FORMAT:
            raise UsageError(f"{path} was written by a newer budgetsearch (format {body['format']}).")
        return Found(path, Manifest.model_validate(body), str(body.get("sha256")), digest(body))
    except (OSError, ValueError, TypeError) as error:
        why = error.errors()[0] if isinstance(error, ValidationError) else error
        raise UsageError(f"{path} cannot be read as a manifest: {why}. Restore it from a copy.") from error
