"""What follows a search: manifest and reports, and what a process that was killed did not come to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import SettingsError, UsageError
from budgetsearch.core.history.history import History
from budgetsearch.core.ports import Say
from budgetsearch.core.secrets import without_secrets
from budgetsearch.machine.clock import Timing
from budgetsearch.run.exporters import exporter_of
from budgetsearch.run.failure import keep_traceback
from budgetsearch.run.permissions import check_permitted, check_sources
from budgetsearch.run.settings import Changes
from budgetsearch.storage.files import cache_folder
from budgetsearch.storage.ledger import one_generation, read_entries, read_history
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.report.write import write_in_time
from budgetsearch.views.study.storage import resumed_storage

LOGGER = logging.getLogger("budgetsearch.run.conclusion")
AMPLE_SECONDS = 600.0
"""For the reports of a run that was over before this process began."""


def conclude(
    folder: RunFolder,
    say: Say,
    timing: Timing | None = None,
    history: History | None = None,
    changed: bool = True,
) -> None:
    """Write manifest and reports within what is left of the time; what cannot be written is said.

    A signal ends it: the run is over, and reports can be written at any time. ``history``: what the ledger
    tells, of whoever has read it. ``changed``: there is something that reports of before do not tell.
    """
    command = f"budgetsearch report {folder.command_word}"
    try:
        _write(folder, say, timing, history or read_history(folder.ledger), changed)
    except KeyboardInterrupt:
        say(f"stopped before the reports were written; `{command}` writes them")
    except OSError as error:
        say(f"the reports cannot be written ({error}); make room, then: {command}")
    except Exception as error:
        kept = keep_traceback(error, folder.path)
        where = f" (the traceback is in {kept})" if kept else ""
        what = without_secrets(f"{type(error).__name__}: {error}")
        say(f"the reports could not be written: {what}{where}; `{command}` writes them")


def _write(folder: RunFolder, say: Say, timing: Timing | None, history: History, changed: bool) -> None:
    from budgetsearch.run.manifest import write_manifest

    write_manifest(folder, history)
    if not changed and folder.reports_stand():
        return
    left = timing.seconds_left() if timing else AMPLE_SECONDS
    with one_generation():
        entries = list(read_entries(folder.ledger))
    if untold := write_in_time(folder, entries, history, left):
        say(untold)


def make_up(folder: RunFolder, history: History, changes: Changes, say: Say) -> bool:
    """What the process of a run that is over may not have come to, if it was killed right then: the study's
    last lines, and removing what nobody needs any more. An adapter that was damaged since is written again.

    Returns whether something was missing.
    """
    from budgetsearch.run.export import mend
    from budgetsearch.views.study.mirror import mirror_of

    opened = history.opened
    assert opened is not None
    try:
        check_permitted({**opened.settings, "recipe": None}, changes)  # whose code has nothing to do any more
        check_sources(folder.path, opened.settings, changes)
    except UsageError as error:
        say(f"nothing of the finished run is made up: {error}")
        return False
    behind = not folder.study_is_level(history.seq)
    try:
        if behind:
            mirror = mirror_of(resumed_storage(opened, changes.get("storage")), folder, opened)
            mirror.catch_up(history)
            level = mirror.level
            mirror.close()
            folder.note_study(level, history.seq)
    except SettingsError as error:
        LOGGER.warning("The Optuna study is not looked at. %s", error)
    exporter = exporter_of(folder, opened, folder.adapter)
    own = "recipe" in opened.facts  # then there is no tokenizer
    source = str(history.facts.get("model", {}).get("source", ""))
    tokenizer = (lambda: folder.adapter) if own else lambda: _tokenizer(source, opened.settings, say)
    mended = mend(exporter, history, say, tokenizer)
    exporter.sweep(history)
    folder.tidy()
    return behind or mended


def _tokenizer(source: str, known: Mapping[str, Any], say: Say) -> Path:
    """A folder that holds the tokenizer of this base model; ``known``: the settings of the run."""
    from budgetsearch.training.data.models import resolve_model

    return resolve_model(
        source,
        cache_folder(),
        revision=known.get("revision"),
        trust_remote_code=bool(known.get("trust_remote_code")),
        say=say,
    ).path
