"""The three reports of a run: report.md, report.json, report.html."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from budgetsearch.core.events import Entry
from budgetsearch.core.history.history import History
from budgetsearch.core.policy.deadline import ENDING, seconds_behind
from budgetsearch.storage.runfolder import RunFolder

LOGGER = logging.getLogger("budgetsearch.views.report.write")


@dataclass(frozen=True)
class Reports:
    """Where the reports of a run lie."""

    markdown: Path
    json: Path
    html: Path


def write_reports(
    folder: RunFolder, entries: Sequence[Entry], history: History, out: Path | None = None
) -> Reports:
    """Write all three from the ledger, over older ones; report.md, which costs least, first.

    ``out``: a folder for them, made if need be; None: the run's own.
    """
    from budgetsearch.views.report.markdown import write_report

    going = folder.goes(history.closed is not None)
    target = folder
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        target = RunFolder(out)
    write_report(entries, history, target.report, going=going)
    _write_page(target, entries, history, lambda: False, going)
    return Reports(target.report, target.report_json, target.report_html)


def write_in_time(folder: RunFolder, entries: Sequence[Entry], history: History, left: float) -> str:
    """Write report.md, then the others if they are done within the ``left`` seconds; returns what to tell.

    Whatever happens to the others, the run has ended well: they can be written at any time.
    """
    from budgetsearch.views.report.markdown import write_report

    going = folder.goes(history.closed is not None)
    write_report(entries, history, folder.report, going=going)
    failed: list[Exception] = []
    over = threading.Event()

    def work() -> None:
        try:
            _write_page(folder, entries, history, over.is_set, going)
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


def _write_page(
    folder: RunFolder, entries: Sequence[Entry], history: History, over: Callable[[], bool], going: bool
) -> None:
    from budgetsearch.storage.files import replace_text
    from budgetsearch.views.report.html import html_text
    from budgetsearch.views.report.markdown import load_lines
    from budgetsearch.views.report.numbers import as_json, numbers_of
    from budgetsearch.views.study.importance import importances

    numbers = numbers_of(entries, history, importances, going=going)
    if not over():
        replace_text(folder.report_json, as_json(numbers))
        page = html_text(numbers, load_lines(history))
        if not over():
            replace_text(folder.report_html, page)
