"""The commands that show what runs have found, and how they stand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from budgetsearch.cli.errors import EXIT_INTERRUPTED, errors
from budgetsearch.cli.options import JsonOption, RunArgument, TrustAgain, with_options
from budgetsearch.cli.output import asking, console, heard, show_run
from budgetsearch.views.shortfalls import shortfall_lines
from budgetsearch.views.terminal import echo
from budgetsearch.views.words import STATE_MEANS, STOPPED

commands = typer.Typer()


@commands.command(epilog="Example:  budgetsearch status runs/mine --json")
def status(
    run: RunArgument,
    as_json: JsonOption = False,
) -> None:
    """Show how a run stands, finished or going."""
    with errors():
        from budgetsearch.api.runs import look

        history, found = look(run)
        if as_json:
            echo(json.dumps(found, indent=2))
        else:
            show_run(history, found)
            for path in found["reports"][:1]:
                echo(f"report  {path}")
            if found["phase"] in STATE_MEANS and found["phase"] != "finished":
                from budgetsearch.run.failure import go_on

                killed = "No process works on it. " if found["phase"] == STOPPED else ""
                echo(f"{killed}Go on with:  {go_on(run, history)}")


@commands.command(epilog="Example:  budgetsearch runs experiments/ --json")
def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where the runs lie.", show_default="runs")
    ] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """List the runs in and below a folder, newest first; what cannot be read is named."""
    with errors():
        from budgetsearch import api

        found = api.list_runs(folder)
        if as_json:
            echo(json.dumps([dataclasses.asdict(row) for row in found.runs], indent=2))
        elif found.runs:
            from budgetsearch.views.runs import runs_table

            console().print(runs_table(found.runs))
        else:
            echo(f"There is no run in {folder}. `budgetsearch run --out FOLDER` makes one.")
    for path, reason in found.skipped:
        echo(f"skipped {path}: {reason}", err=True)


@commands.command(epilog="Example:  budgetsearch report runs/mine")
def report(
    run: RunArgument,
    show: Annotated[bool, typer.Option("--open", help="Open report.html in the browser.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the reports.", show_default="the run's own")
    ] = None,
) -> None:
    """Write report.html, report.md and report.json from the ledger again, and say where they are."""
    with errors():
        from budgetsearch import api

        written = api.report(run, out=out)
        for line in shortfall_lines(written.shortfalls):
            echo(line, err=True)
        for path in (written.html, written.markdown, written.json):
            echo(path)
        if show:
            typer.launch(str(written.html))


ASKED: Mapping[str, Any] = {
    "names": Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Ask bases and adapters too: names of lm-eval (gsm8k,arc_easy), data files, or "
            "reasoning-gym:NAME?size=N&seed=S, with commas; challenge: the challenge's open scenarios.",
        ),
    ],
    "limit": Annotated[int | None, typer.Option(help="Examples of each task at most.")],
    "folder": Annotated[
        Path | None,
        typer.Option(
            "--task-data",
            help="Folder of lm-eval task definitions (YAML). They can run code: only trusted ones.",
        ),
    ],
    "chat_template": Annotated[
        bool, typer.Option("--chat-template", help="Let lm-eval use the model's chat template.")
    ],
    "gpu": Annotated[
        str | None, typer.Option(help="Card to ask on, or cpu.", show_default="that of the first run")
    ],
    "trust_remote_code": TrustAgain,
    "model": Annotated[
        str | None, typer.Option(help="Base of a run that was begun elsewhere, again: it may be fetched.")
    ],
}
"""The fields of ``Tasks``."""


@commands.command(epilog="Example:  budgetsearch compare runs/short runs/long --out compare")
@with_options(ASKED)
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.", show_default=False)
    ],
    baseline: Annotated[
        Path | None, typer.Option(help="Run that each other one is paired with.", show_default="all pairs")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write compare.html and compare.json into this folder.", show_default="no files"),
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="What an hour of the card costs: adds what each run cost.", min=0)
    ] = None,
    as_json: JsonOption = False,
    **asked: Any,
) -> None:
    """Put runs side by side: paired differences on the same validation rows, and what each run cost.

    Reads ledgers alone, so it takes seconds, also while a run is going. What cannot be compared (other data,
    another split) is named and not averaged.
    """
    with errors():
        from budgetsearch import api
        from budgetsearch.tools.compare.comparison import as_json as values
        from budgetsearch.tools.compare.page import write
        from budgetsearch.tools.compare.tasks import Tasks

        with asking() as (say, tick), heard(say):
            found = api.compare(runs, tasks=Tasks(**asked), baseline=baseline, price=price, tick=tick)
        written = write(found, out) if out is not None else []
        if as_json:
            echo(json.dumps(values(found), indent=2, allow_nan=False))
        else:
            from budgetsearch.tools.compare.table import show

            console().print(show(found))
            echo(
                "\n".join(map(str, written))
                or "No file was written: --out FOLDER writes a page with plots, and JSON."
            )
    if found.interrupted:
        echo("interrupted: what was answered is kept; the same command asks the rest", err=True)
        raise typer.Exit(EXIT_INTERRUPTED)


@commands.command(epilog="Example:  budgetsearch dashboard runs/mine runs/other --port 8080")
def dashboard(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The folders of runs.", show_default=False)
    ],
    port: Annotated[
        int | None,
        typer.Option(
            help="Port on this machine.", min=1, max=65535, show_default="8080, or the next free one"
        ),
    ] = None,
) -> None:
    """Show runs in optuna-dashboard, on loopback only; going runs are followed. Ctrl-C ends it.

    It reads their ledgers and changes nothing in them.
    """
    with errors():
        from budgetsearch import api

        api.dashboard(*runs, port=port)
