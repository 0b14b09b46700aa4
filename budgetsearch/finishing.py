"""What the process of a run that is over may not have come to."""

from __future__ import annotations

import logging
from pathlib import Path

from budgetsearch.core.errors import SettingsError
from budgetsearch.core.events import Opened
from budgetsearch.core.history import History
from budgetsearch.core.ports import Say
from budgetsearch.folders import cache_folder
from budgetsearch.run_study import mirror_of, resumed_storage
from budgetsearch.runfolder import RunFolder

LOGGER = logging.getLogger("budgetsearch.finishing")


def finish_leaving(folder: RunFolder, history: History, say: Say, storage: str | None = None) -> None:
    """What the process of a run that is over may not have come to, if it was killed right then: the study's
    last lines, and removing what nobody needs any more. An adapter that was damaged since is written again.
    """
    from budgetsearch.exporter import AdapterExporter, mend
    from budgetsearch.shared_exporter import exporter_for

    opened = history.opened
    assert opened is not None
    try:
        mirror = mirror_of(resumed_storage(opened, storage), folder, opened)
        mirror.catch_up(history)
        mirror.close()
    except SettingsError as error:
        LOGGER.warning("The Optuna study is not looked at. %s", error)
    keep = bool(opened.settings.get("keep_checkpoints"))
    model, data = opened.facts.get("model", {}), opened.facts.get("data", {})
    inner = AdapterExporter(folder.path.absolute(), folder.checkpoints, model, data, folder.adapter, keep)
    exporter = exporter_for(inner, opened.settings.get("shared"))
    mend(exporter, history, say, lambda: _tokenizer(opened, say))
    exporter.sweep(history)
    folder.tidy()


def _tokenizer(opened: Opened, say: Say) -> Path:
    """A folder that holds the base model's tokenizer."""
    from budgetsearch.training.sources import resolve_model

    known = opened.settings
    return resolve_model(
        known["model"],
        cache_folder(),
        revision=known.get("revision"),
        trust_remote_code=bool(known.get("trust_remote_code")),
        say=say,
    ).path
