"""What stands in the ledger before the first job, and that a run goes on with the same."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from budgetsearch.core.errors import RunFolderError
from budgetsearch.core.events import Opened
from budgetsearch.runfolder import RunFolder

if TYPE_CHECKING:
    from budgetsearch.gpu.detect import Card
    from budgetsearch.settings import Settings
    from budgetsearch.training.sources import BaseModel
    from budgetsearch.training.tokens import PreparedData

PACKAGES = ("budgetsearch", "torch", "transformers", "peft", "bitsandbytes", "optuna")
"""Whose versions stand in the ledger; all of them stand in versions.lock."""


def facts_of(
    settings: Settings, folder: RunFolder, card: Card, base: BaseModel, prepared: PreparedData
) -> dict[str, Any]:
    """What was found before the first job, for the ledger, the report and the card."""
    from budgetsearch.study.storage import has_password
    from budgetsearch.training.inputs import input_facts

    # A storage that several runs share holds one study for each.
    study = f"{folder.path.name}-{uuid.uuid4().hex[:8]}" if settings.storage else folder.path.name
    return {
        "study": study,
        "storage_password": has_password(settings.storage),
        "card": {
            "name": card.name,
            "device": card.device,
            "usable_bytes": card.usable_bytes,
            "tflops": card.profile.tflops,
            "profile": card.profile.name,
            "stand_in": card.stand_in,
        },
        "model": {
            "source": base.source,
            "loadable": base.loadable,
            "revision": base.revision,
            "sha256": base.sha256,
            "licence": base.licence,
        },
        "data": {
            "source_sha256": prepared.source_sha256,
            "template": prepared.template,
            "train": dataclasses.asdict(prepared.train_stats),
            "valid": dataclasses.asdict(prepared.valid_stats),
            "prepared": prepared.folder.name,
            **prepared.valid_hashes(),
        },
        "inputs": input_facts(base, prepared, {"data": settings.data, "valid": settings.valid}),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def to_write_down(settings: Settings) -> dict[str, Any]:
    """All settings, but no password."""
    from budgetsearch.study.storage import without_password

    written = settings.model_dump(mode="json")
    return {**written, "storage": without_password(settings.storage) if settings.storage else None}


def check_same_inputs(opened: Opened, facts: Mapping[str, Any]) -> None:
    """A run goes on only with the model and the data that it began with."""
    for what, key in (("model", "sha256"), ("data", "prepared")):
        if opened.facts[what][key] != facts[what][key]:
            raise RunFolderError(
                f"The {what} has changed since this run began, so its trials could not be compared any "
                f"more. Bring the old {what} back, or start a new run with another --out."
            )
