"""The three reports of a run: report.md, report.json, report.html."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from budgetsearch.core.events import Entry
from budgetsearch.core.history.history import History
from budgetsearch.core.policy.deadline import ENDING, seconds_behind
from budgetsearch.storage.files import replace_text
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.shortfalls import Shortfall, shortfalls_of

if TYPE_CHECKING:
    from budgetsearch.views.report.numbers import Numbers

LOGGER = logging.getLogger("budgetsearch.views.report.write")


@dataclass(frozen=True)
class Reports:
    """Paths of a run's reports."""

    markdown: Path
    json: Path
    html: Path
    shortfalls: tuple[Shortfall, ...] = ()
    """What stands in them first: what the run lost or never measured."""


def write_reports(
    folder: RunFolder, entries: Sequence[Entry], history: History, out: Path | None = None
) -> Reports:
    """Write all three from the ledger, over older ones; report.md, which costs least, first.

    ``out``: a folder for them, made if need be; None: the run's own.
    """
    going = folder.goes(history.closed is not None)
    target = folder
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        target = RunFolder(out)
    numbers = _write_text(target, entries, history, going, folder)
    _write_page(target, history, numbers, lambda: False)
    return Reports(target.report, target.report_json, target.report_html, numbers.shortfalls)


def write_in_time(folder: RunFolder, entries: Sequence[Entry], history: History, left: float) -> str:
    """Write report.md, then the others if they are done within the ``left`` seconds; returns what to tell.

    Whatever happens to the others, the run has ended well: they can be written at any time.
    """
    numbers = _write_text(folder, entries, history, folder.goes(history.closed is not None), folder)
    failed: list[Exception] = []
    over = threading.Event()

    def work() -> None:
        try:
            _write_page(folder, history, numbers, over.is_set)
        except Exception as error:
            LOGGER.warning("report.html could not be written", exc_info=True)
            failed.append(error)

    later = f"`budgetsearch report {folder.command_word}` writes it."
    seconds = left - seconds_behind("reports")
    if seconds < ENDING["reports"]:
        return f"There was no time left for report.html; {later}"
    # A thread, for nothing else lets go of a library that takes its time.
    thread = threading.Thread(target=work, name="report", daemon=True)
    thread.start()
    thread.join(seconds)
    over.set()
    if thread.is_alive():
        return f"The time was over before report.html was written; {later}"
    return f"report.html could not be written ({failed[0]}); {later}" if failed else ""


def _write_text(
    folder: RunFolder, entries: Sequence[Entry], history: History, going: bool, of: RunFolder
) -> Numbers:
    """Write report.md, which needs no library that takes its time; returns what stands there. ``of``: the
    run's own folder."""
    from budgetsearch.views.report.markdown import text_of
    from budgetsearch.views.report.numbers import numbers_of

    # Those that are not there yet are being written.
    missing = tuple(one for one in shortfalls_of(of, history, going) if one.kind != "report")
    numbers = replace(numbers_of(entries, history, going=going), shortfalls=missing)
    replace_text(folder.report, text_of(numbers))
    return numbers


def _write_page(folder: RunFolder, history: History, numbers: Numbers, over: Callable[[], bool]) -> None:
    from budgetsearch.views.report.html import html_text
    from budgetsearch.views.report.numbers import as_json, importance_of
    from budgetsearch.views.study.importance import importances

    numbers = replace(numbers, importance=importance_of(history, importances))
    if not over():
        replace_text(folder.report_json, as_json(numbers))
        page = html_text(numbers)
        if not over():
            replace_text(folder.report_html, page)
