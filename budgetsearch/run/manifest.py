"""From the ledger's history to the manifest: what the winner saw, step by step, and nothing else."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from budgetsearch.core.bases import facts_for
from budgetsearch.core.codec import encode
from budgetsearch.core.errors import LedgerError, UsageError
from budgetsearch.core.history.history import History
from budgetsearch.core.records import Score, SegmentResult
from budgetsearch.core.secrets import shown_settings
from budgetsearch.run.manifest_schema import (
    MANIFEST,
    Adapter,
    Base,
    Data,
    File,
    Link,
    Manifest,
    Rows,
    Scores,
    Source,
    read,
    to_text,
)
from budgetsearch.storage.files import replace_text
from budgetsearch.storage.runfolder import RunFolder, told_by
from budgetsearch.storage.shared import url_of
from budgetsearch.training.data.origins import origins_of
from budgetsearch.training.data.provenance import file_facts

LOGGER = logging.getLogger("budgetsearch.reproduction")
UNSUMMED = (MANIFEST, "README.md")
"""Files of an adapter's folder that no one computes with."""
LOCAL = ("model", "space")
"""Settings that may name a path."""


def write_manifest(folder: RunFolder, history: History) -> Path | None:
    """Write the manifest into the run folder and into its adapter's; None where there is nothing to tell of.

    One that tells of this very adapter already is left alone: what was changed since must not become true.
    A manifest that cannot be written costs nothing that was earned.
    """
    target = folder.path / MANIFEST
    try:
        if _is_current(target, history) and (folder.adapter / MANIFEST).is_file():
            return target
        manifest = build(history, folder)
        if manifest is None:
            return None
        text = to_text(manifest)
        for path in (folder.adapter / MANIFEST, target):
            replace_text(path, text)
    except (OSError, ValueError, KeyError, LedgerError):
        LOGGER.warning("%s could not be written.", target, exc_info=True)
        return None
    return target


def _is_current(path: Path, history: History) -> bool:
    with suppress(UsageError):
        known, done = read(path), history.exported
        return (
            known.expected == known.found
            and done is not None
            and known.manifest.adapter.trial_id == done.trial_id
            and known.manifest.ledger_results == len(history.results)
            and _scores(history, history.results[_chain(history, done.checkpoint)[-1]][1])
            == known.manifest.scores
        )
    return False


def build(history: History, folder: RunFolder, adapter: Adapter | None = None) -> Manifest | None:
    """The manifest of the adapter that stands in ``folder``, or of a known one; None if there is none, or an
    older version began the run and did not write down enough.

    Raises:
        LedgerError: the ledger does not tell how the adapter came to be.
    """
    done, opened = history.exported, history.opened
    if done is None or opened is None:
        return None
    facts = facts_for(opened.facts, history.trials[done.trial_id].trial.params)
    if "inputs" not in facts:
        return None
    if adapter is None and told_by(folder.adapter).get("checkpoint") != done.checkpoint:
        return None  # none stands there, or another one than the ledger knows
    inputs = facts["inputs"]
    indices = _chain(history, done.checkpoint)
    last = history.results[indices[-1]][1]
    settings = _settings(opened.settings, folder.path)
    return Manifest(
        adapter=adapter or _adapter(history, folder, last.tokens),
        base=Base(**{**facts["model"], **inputs["base"], **_placed(facts["model"], folder.path)}),
        data=_data(facts["data"], inputs, folder.path, facts.get("left_out")),
        settings=settings,
        seed=int(settings["seed"]),
        card=dict(facts["card"]),
        machine=dict(inputs["machine"]),
        versions=_versions(folder.versions),
        training=tuple(_link(history, index) for index in indices),
        scores=_scores(history, last),
        ledger_results=len(history.results),
    )


def _adapter(history: History, folder: RunFolder, tokens: int) -> Adapter:
    assert history.exported is not None
    trial = history.trials[history.exported.trial_id].trial
    weights = load(folder.adapter / ADAPTER_FILE)
    return Adapter(
        trial_id=trial.trial_id,
        params=dict(trial.params),
        seed=trial.seed,
        tokens=tokens,
        files=tuple(_files(folder.adapter)),
        tensors_sha256=tensors_sha256(weights),
        norm=norm(weights),
    )


# ------------------------------------------------------------------------ the winner's way


def _chain(history: History, checkpoint: str) -> list[int]:
    """The results, by their index and in order, that lead from nothing to a checkpoint."""
    wanted: str | None = checkpoint
    found: list[int] = []
    for index in range(len(history.results) - 1, -1, -1):
        segment, result = history.results[index]
        if result.checkpoint_out == wanted and segment.checkpoint_in != wanted:
            found.append(index)
            wanted = segment.checkpoint_in
            if wanted is None:
                return found[::-1]
    raise LedgerError(f"No segment of the ledger wrote the checkpoint {wanted}.")


def _link(history: History, index: int) -> Link:
    job_id, result = history.result_jobs[index], history.results[index][1]
    members = [pair for job, pair in zip(history.result_jobs, history.results, strict=True) if job == job_id]
    wanted = {result.trial_id, *(number for stint in result.course for number in stint.trial_ids)}
    return Link(
        job_id=job_id,
        # What their clocks decided is written down as decided.
        segments=tuple(
            encode(replace(segment, landing=None, revisions=found.revisions))
            for segment, found in members
            if segment.trial_id in wanted
        ),
        course=tuple(encode(stint) for stint in result.course),
        tokens=result.tokens,
        steps=result.steps,
        status=result.status,
        train_loss=result.train_loss,
        seconds=sum(sum(r.seconds.values()) for _, r in members),
        computed_on=dict(result.computed_on),
    )


def _scores(history: History, last: SegmentResult) -> Scores | None:
    """The final scores where they are this adapter's, else what its last segment measured."""
    done, best, score = history.exported, history.incumbent, history.score
    assert done is not None
    state = history.trials[done.trial_id]
    common: dict[str, Any] = {
        "quantization": str(state.trial.params["quantization"]),
        "micro_batch": state.micro_batch,
    }
    scored = best is not None and best.best_checkpoint == done.checkpoint and _measured(score)
    if score is not None and scored:
        first = history.plan.task_examples if history.plan else 0
        return Scores(final=True, first_answers=first, **{**vars(score), **common})
    if last.loss is None:
        return None
    return Scores(
        final=False,
        base_loss=None,
        adapter_loss=last.loss,
        base_example_losses=(),
        adapter_example_losses=last.example_losses,
        computed_on=dict(last.computed_on),
        **common,
    )


def _measured(score: Score | None) -> bool:
    return score is not None and score.status == "ok" and bool(score.adapter_example_losses)


# --------------------------------------------------------------------------------- inputs


def _data(
    data: Mapping[str, Any], inputs: Mapping[str, Any], folder: Path, left_out: list[int] | None
) -> Data:
    rows = inputs["rows"]
    return Data(
        sources=tuple(Source(**{**found, **_placed(found, folder)}) for found in inputs["sources"]),
        source_sha256=data["source_sha256"],
        template=data["template"],
        train=Rows(sha256=rows["train_sha256"], stats=data["train"]),
        valid=Rows(sha256=rows["valid_sha256"], stats=data["valid"]),
        left_out=None if left_out is None else tuple(left_out),
    )


def _placed(facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The source of which these facts tell, as the manifest names it."""
    source = facts["source"]
    path = _path(source, folder)
    return {"source": source if path is None else Path(source).name, "path": path}


def _settings(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings as others may see them: no password, and no path that says whose machine it was."""
    shown = shown_settings(settings)
    for name in LOCAL:
        if isinstance(shown.get(name), str):
            lines = shown[name].split("\n")
            shown[name] = "\n".join(_path(line, folder) or line for line in lines)
    for name in ("data", "valid"):
        lines = origins_of(shown.get(name) or "")
        if lines:
            shown[name] = "\n".join(one.at(_path(one.source, folder) or one.source) for one in lines)
    shown["out"] = folder.name
    if shown.get("storage"):
        shown["storage"] = str(shown["storage"]).partition(":")[0]
    if shared := shown.get("shared"):
        shown["shared"] = url_of(shared).partition(":")[0] or "folder"
    return shown


def _path(source: str, folder: Path) -> str | None:
    """A local source as it is seen from the run folder, whatever links lead to the two, so that a project may
    move as a whole; None for others. A run keeps local paths absolute.

    ``..`` is what lies above the folder itself, not above a link to it.
    """
    if not Path(source).is_absolute():
        return None
    above, name = os.path.split(source)
    return os.path.relpath(os.path.join(os.path.realpath(above), name), os.path.realpath(folder))


def _versions(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==", 1) for line in lines if "==" in line and not line.startswith("#")]
    return dict(pairs)


def _files(folder: Path) -> Iterator[File]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in UNSUMMED and not path.name.startswith("."):
            yield File(**file_facts(path))


ADAPTER_FILE = "adapter_model.safetensors"
Tensors = Mapping[str, Any]


@dataclass(frozen=True)
class Apart:
    """How far two adapters lie apart."""

    largest: float
    """Largest difference of two weights."""
    relative: float
    """Norm of the difference, as a share of the first one's norm."""


def load(path: Path) -> dict[str, Any]:
    """The tensors of a file.

    Raises:
        ValueError: it is not one of tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Any] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return found


def tensors_sha256(tensors: Tensors) -> str:
    """Hash of names, types, shapes and bytes, whatever the file's layout."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def norm(tensors: Tensors) -> float:
    """Euclidean norm of all weights together."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for _, tensor in sorted(tensors.items())))


def apart(one: Tensors, other: Tensors) -> Apart | None:
    """How far they lie apart; None where names or shapes differ."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (one, other)]
    if shapes[0] != shapes[1]:
        return None
    differences = {name: one[name].double() - other[name].double() for name in one}
    largest = max((float(d.abs().max()) for d in differences.values() if d.numel()), default=0.0)
    whole = norm(one)
    return Apart(largest, norm(differences) / whole if whole else float(largest > 0))
