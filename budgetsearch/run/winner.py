"""What a run found, for use: its adapter, or a merged model made of it, and the base that goes with it.

A folder may come from a stranger: nothing of it is unpickled or imported, its sums are checked, and what
would be fetched or run for it has to be allowed now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import LedgerError, ModelError, RunFolderError, UsageError
from budgetsearch.core.history.history import History
from budgetsearch.core.ports import Say
from budgetsearch.core.targets import ALL_LINEAR, EXPERTS
from budgetsearch.machine.detect import Card
from budgetsearch.run.permissions import check_source
from budgetsearch.run.settings import Settings
from budgetsearch.storage.files import cache_folder
from budgetsearch.storage.ledger import read_history
from budgetsearch.storage.runfolder import MANIFEST_FILE, RunFolder, told_by
from budgetsearch.training import sums

MERGED = "merged"
"""Key of ``budgetsearch.json`` in a folder with a whole model: what it was made of."""


@dataclass(frozen=True)
class Winner:
    """A folder with an adapter or a merged model, and how to load it as it was trained."""

    folder: Path
    told: Mapping[str, Any]
    """Its ``budgetsearch.json``."""

    @property
    def merged(self) -> bool:
        """Whether the folder holds a whole model, which needs no base beside it."""
        return MERGED in self.told

    @property
    def quantization(self) -> str:
        """What the base is held in."""
        return str(self.told["quantization"])

    @property
    def name(self) -> str:
        """What it is called: the run, or the folder."""
        whole = self.folder.resolve()
        return whole.parent.name if whole.name == "adapter" and whole.parent.name else whole.name

    def base(self, given: str | None, trusted: bool, say: Say) -> Path:
        """The folder of the base model, the same to the byte as in training; of a merged model its own.

        ``given``: where the user says that it lies; ``trusted``: whether code that came with it may run.

        Raises:
            UsageError: it cannot be found or fetched, or needs code that is not allowed.
            ModelError: it is another one than the adapter was trained on.
        """
        from budgetsearch.training.data.models import resolve_model

        if self.merged:
            return self.folder
        facts = self.told["base"]
        source = str(given or facts["source"])
        if given is None:
            check_source(self.folder, "model", source, given)
        found = resolve_model(
            source, cache_folder(), revision=facts.get("revision"), trust_remote_code=trusted, say=say
        )
        if found.sha256 != facts["sha256"]:
            raise ModelError(
                f"{source} is not the base model that {self.folder} was trained on, or it has changed since "
                f"(sha256 {found.sha256[:12]}, expected {str(facts['sha256'])[:12]}). Name that with --model."
            )
        return found.path

    def load(self, base: Path, card: Card, trusted: bool) -> Any:
        """The model as it was trained, on this card, in eval mode.

        Raises:
            ModelError: it cannot be loaded.
            CheckpointError: the adapter is no plain LoRA adapter.
        """
        from budgetsearch.training.adapters import worn
        from budgetsearch.training.bases import load_base

        kind, half = self.quantization, card.profile.dtype if card.profile.dtype == "fp16" else "bf16"
        if self.merged and card.device == "cpu":
            kind = "fp32"  # where 16 bits are slower than their worth
        model = load_base(
            *(str(base), kind, card.device),
            trust_remote_code=trusted,
            half=half,
            targets=targets_of_base(self.told),
        )
        return model if self.merged else worn(model, self.folder)


def targets_of_base(told: Mapping[str, Any]) -> str:
    """Targets for which a base is loaded as it was in training: where routed experts could wear adapters,
    they are in 16 bits."""
    anatomy = (told.get("base") or {}).get("anatomy") or {}
    return EXPERTS if anatomy.get("packed_experts") == [] else ALL_LINEAR


def winner_of(path: Path) -> Winner:
    """The adapter of a finished run, or what lies in an exported folder.

    Raises:
        RunFolderError: the run is not finished, or neither is there.
        CheckpointError: a file of it is missing or has changed.
    """
    folder = RunFolder(path)
    if not folder.has_ledger() and told_by(path):
        return _whole(path)
    history = finished(path)
    best = history.incumbent
    if best is None or not folder.holds_adapter(best.best_checkpoint):
        raise RunFolderError(
            f"{folder.adapter} does not hold the adapter of the run's best trial. "
            f"`budgetsearch resume {folder.command_word}` writes it again from its checkpoint."
        )
    return _whole(folder.adapter)


def finished(path: Path) -> History:
    """The history of a run that has come to its end.

    Raises:
        RunFolderError: there is none, or it goes on, or was stopped.
        LedgerError: its ledger cannot be read.
    """
    folder = RunFolder(path)
    folder.check_run()
    history = read_history(folder.ledger)
    if history.opened is None:
        raise folder.never_began()
    if history.closed is None or history.closed.state != "finished":
        going = folder.goes(history.closed is not None)
        remedy = "Wait for its end" if going else f"`budgetsearch resume {folder.command_word}` finishes it"
        usable = f"; what it has come to is in {folder.adapter}" if folder.adapter.is_dir() else ""
        raise RunFolderError(f"{path} is not finished. {remedy}{usable}.")
    return history


def settings_of(history: History) -> Settings:
    """The settings that a run began with; of several models with that of the best trial alone.

    Raises:
        LedgerError: another version wrote them.
    """
    assert history.opened is not None
    try:
        settings = Settings.model_validate(dict(history.opened.settings))
    except ValueError as error:
        raise LedgerError(f"The run's settings cannot be used by this version: {error}") from error
    if len(settings.models) == 1:
        return settings
    return settings.model_copy(update={"model": str(history.facts["model"]["source"])})


def _whole(folder: Path) -> Winner:
    """Insist that all files of an exported folder are what they were, and say how to load them."""
    told = told_by(folder)
    if "recipe" in told:
        raise UsageError(
            f"{folder} holds what a recipe of one's own made. That is no LoRA adapter, so it is neither "
            "exported nor served; its README.md says how the recipe loads it."
        )
    sums.check_sums(folder, () if MERGED in told else sums.ADAPTER_FILES)
    if "quantization" not in told or not (MERGED in told or "sha256" in (told.get("base") or {})):
        raise UsageError(
            f"{folder / MANIFEST_FILE} does not say how to load what lies there. Export it again."
        )
    return Winner(folder, told)
