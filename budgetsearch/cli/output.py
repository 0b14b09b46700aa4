"""What a command prints: progress, tables, and how a run ended."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from budgetsearch.cli.errors import EXIT_FAILED, code_of
from budgetsearch.core.ports import Say
from budgetsearch.views.terminal import Terminal, echo

Tick = Callable[[str, int, int], None]
"""(what is asked, answers so far, answers in all)."""

if TYPE_CHECKING:
    from budgetsearch.core.history.history import History


@contextmanager
def heard(say: Say) -> Iterator[None]:
    """Let ``say`` take what is logged about progress, and warnings go where they would have gone."""
    logger, handler = logging.getLogger("budgetsearch"), _Progress(say)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


class _Progress(logging.Handler):
    def __init__(self, say: Say) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "budgetsearch":
            self._say(record.getMessage())
        elif record.levelno >= logging.WARNING and logging.lastResort is not None:
            echo(logging.lastResort.format(record), err=True)


@contextmanager
def asking() -> Iterator[tuple[Say, Tick]]:
    """Show what is being asked: a bar in a terminal, lines in a pipe; yields what takes either."""
    from rich.markup import escape
    from rich.progress import Progress, TaskID

    aside, seen = Terminal(stderr=True), dict[str, TaskID]()
    with Progress(console=aside, transient=True, disable=not aside.is_terminal) as progress:

        def tick(what: str, done: int, total: int) -> None:
            if what not in seen:
                for task in seen.values():
                    progress.remove_task(task)
                seen.clear()
                seen[what] = progress.add_task(escape(what), total=None)
                if not aside.is_terminal:
                    aside.print(f"asking {what}", highlight=False, soft_wrap=True)
            if total:
                progress.update(seen[what], completed=done, total=total)

        yield lambda line: aside.print(line, highlight=False, soft_wrap=True), tick


def say_aside(line: str) -> None:
    """Print progress apart from what is asked for."""
    echo(line, err=True)


def console() -> Terminal:
    """As wide as the terminal, or as COLUMNS says; a pipe is wide enough for the table."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Terminal(width=None if known else 120)


def show_run(history: History, found: Mapping[str, Any]) -> None:
    """Print how a run stands, what is missing first; ``found``: its status."""
    from budgetsearch.views.report.workers import WorkerSeconds, workers_line
    from budgetsearch.views.shortfalls import Shortfall, shortfall_lines
    from budgetsearch.views.tables import summary
    from budgetsearch.views.under_way import under_way_lines

    for line in shortfall_lines(Shortfall(**one) for one in found["shortfalls"]):
        echo(line)
    console().print(summary(history, found["phase"] != "stopped"))
    if found["best"] and found["best"]["adapter_path"]:
        echo(f"adapter  {found['best']['adapter_path']}")
    for line in under_way_lines(found["now"]) if found["now"] else ():
        echo(line)
    if "workers" in found:
        console().print(workers_line(WorkerSeconds(**found["workers"]), history), soft_wrap=True)


def conclude(result: Any) -> None:
    """Print how a run ended and where its results are; exits with its code unless it finished."""
    from budgetsearch.api.runs import look
    from budgetsearch.core.policy.deadline import ENDING
    from budgetsearch.run.process import leave_within

    codes = {"finished": 0, "interrupted": code_of(result.signal)}
    code = codes.get(result.state, EXIT_FAILED)
    if math.isfinite(result.left_seconds):
        leave_within(result.left_seconds - ENDING["exit"], code)
    show_run(*look(result.path))
    if result.state == "finished":
        page = result.path / "report.html"
        echo(f"report   {page if page.is_file() else result.path / 'report.md'}")
        return
    from budgetsearch.run.failure import after_failure

    for line in (f"{result.state}: {result.reason}", *after_failure(result.path)):
        echo(line)
    raise typer.Exit(code)
