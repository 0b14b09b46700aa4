"""What a command prints: progress, tables, and how a run ended."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from budgetsearch.cli.errors import EXIT_FAILED, code_of
from budgetsearch.core.ports import Watcher


@contextmanager
def progress() -> Iterator[tuple[list[Watcher], Any]]:
    """A live display in a terminal, plain lines in a pipe."""
    from budgetsearch.views.progress import LiveProgress, PlainProgress

    if sys.stdout.isatty():
        with LiveProgress(Console()) as live:
            yield [live], live.say
    else:
        plain = PlainProgress(lambda line: print(line, flush=True))
        yield [plain], plain.say


def say_aside(line: str) -> None:
    """Progress, apart from what is asked for."""
    typer.echo(line, err=True)


def console() -> Console:
    """As wide as the terminal; a pipe is wide enough for the table."""
    return Console(width=None if sys.stdout.isatty() else 120)


def show_run(run: Path, found: Mapping[str, Any]) -> None:
    """Print how a run stands; ``found``: its status."""
    from budgetsearch import api
    from budgetsearch.views.card import device_of
    from budgetsearch.views.report.workers import WorkerSeconds, workers_line
    from budgetsearch.views.tables import summary

    history = api.open_history(run)
    console().print(summary(history, found["phase"] != "stopped"))
    if "workers" in found:
        console().print(workers_line(WorkerSeconds(**found["workers"]), device_of(history)), soft_wrap=True)


def conclude(result: Any) -> None:
    """Print how a run ended and where its results are; exits with its code unless it finished."""
    from budgetsearch import api
    from budgetsearch.core.policy.deadline import ENDING
    from budgetsearch.run.process import leave_within

    codes = {"finished": 0, "interrupted": code_of(result.signal)}
    code = codes.get(result.state, EXIT_FAILED)
    if math.isfinite(result.left_seconds):
        leave_within(result.left_seconds - ENDING["exit"], code)
    show_run(result.run, api.status(result.run))
    if result.adapter_path is not None:
        typer.echo(f"adapter  {result.adapter_path}")
    if result.state == "finished":
        page = result.run / "report.html"
        typer.echo(f"report   {page if page.is_file() else result.run / 'report.md'}")
        return
    from budgetsearch.run.failure import after_failure

    for line in (f"{result.state}: {result.reason}", *after_failure(result.run)):
        typer.echo(line)
    raise typer.Exit(code)
