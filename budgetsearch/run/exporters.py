"""What exports the best of a run, whatever the run trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from budgetsearch.core.events import Opened
from budgetsearch.run.export import AdapterExporter, exporter_for
from budgetsearch.run.prepare import run_id_of
from budgetsearch.run.recipes import RecipeExporter
from budgetsearch.storage.runfolder import RunFolder


def exporter_of(
    folder: RunFolder, opened: Opened, tokenizer: Path | Mapping[str, Path] | None
) -> AdapterExporter:
    """What exports the adapters of a run, or what its recipe hands out.

    ``tokenizer``: a folder with the files of the base model's tokenizer; of several models one by
    label; None: there is none.
    """
    several = tokenizer if isinstance(tokenizer, Mapping) else {}
    kind = RecipeExporter if "recipe" in opened.facts else AdapterExporter
    inner = kind(
        folder.path.absolute(),
        folder.checkpoints,
        opened.facts.get("model", {}),
        opened.facts.get("data", {}),
        folder.adapter if tokenizer is None or isinstance(tokenizer, Mapping) else tokenizer,
        bool(opened.settings.get("keep_checkpoints")),
        run_id_of(opened),
        several,
    )
    return exporter_for(inner, opened.settings.get("shared"))
