"""The commands that search, and the one that says what a search would do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from budgetsearch.cli.errors import errors
from budgetsearch.cli.options import (
    ConfigOption,
    JsonOption,
    LogOption,
    RunArgument,
    settings_options,
    with_options,
)
from budgetsearch.cli.output import conclude, console, progress
from budgetsearch.core.ports import Watcher
from budgetsearch.machine.clock import process_age
from budgetsearch.run.settings import Changes

commands = typer.Typer()


@commands.command(
    epilog="Example:  budgetsearch run --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl "
    "--gpu cpu --hours 0.5 --out runs/mine"
)
@with_options(settings_options())
def run(
    config: ConfigOption = None,
    resume: Annotated[
        str,
        typer.Option(help="auto: go on with the run in --out if there is one, as after a requeue."),
    ] = "never",
    log: LogOption = None,
    **settings: Any,
) -> None:
    """Search for the best adapter within the budget, and export it before the deadline.

    What is not given comes from budgetsearch.yaml, then from the card's profile, then from defaults.
    """
    with errors(), _running() as (watchers, say):
        from budgetsearch import api

        result = api.run(
            **settings, config=config, resume=resume, watchers=[*watchers, *_loggers(log)], say=say,
            already_seconds=process_age(), last_resort=True,
        )  # fmt: skip
    conclude(result)


@commands.command(epilog="Example:  budgetsearch plan --gpu rtx4090 --hours 8 --slow 2")
@with_options(settings_options())
def plan(
    slow: Annotated[float, typer.Option(help="Everything takes so many times as long.")] = 1.0,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the model and measure for a minute first.")
    ] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    **settings: Any,
) -> None:
    """Show what `run` with the same options would do, before it spends anything.

    What fits into the card's memory, the ladder, how many trials each rung gets, when each part begins, what
    the reserve is for, and what all of this rests on. Nothing is trained; the card need not be here.
    """
    with errors():
        from budgetsearch import api

        found = api.plan(
            slow=slow, probe=probe, config=config, say=lambda line: typer.echo(line, err=True), **settings
        )
        if as_json:
            typer.echo(json.dumps(found.as_json(), indent=2))
        else:
            from budgetsearch.tools.plan.show import show

            console().print(show(found))


@commands.command(epilog="Example:  budgetsearch resume runs/mine")
@with_options(settings_options(Changes.__annotations__, "as before"))
def resume(run: RunArgument, log: LogOption = None, **changes: Any) -> None:
    """Go on with an interrupted run, with what is left of its budget.

    --hours is what the whole run may take, those before included; --storage is its URL again, with its
    password, which is not written down.
    """
    with errors(), _running() as (watchers, say):
        from budgetsearch import api

        result = api.resume(
            run, **changes, watchers=[*watchers, *_loggers(log)], say=say, already_seconds=process_age(),
            last_resort=True,
        )  # fmt: skip
    conclude(result)


@contextmanager
def _running() -> Iterator[tuple[list[Watcher], Any]]:
    """Signals stop the run with their exit codes from here on, and its output does not hold it up."""
    from budgetsearch.run.process import free_output, stop_signals

    with stop_signals():
        free_output()
        with progress() as shown:
            yield shown


def _loggers(names: str | None) -> list[Watcher]:
    if not names:
        return []
    from budgetsearch.views.loggers import logger

    return [logger(name.strip()) for name in names.split(",")]
