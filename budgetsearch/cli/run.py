"""The commands that search, and the one that says what a search would do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from budgetsearch.cli.errors import errors
from budgetsearch.cli.options import (
    ConfigOption,
    DataArgument,
    JsonOption,
    LogOption,
    RunArgument,
    SettingsCommand,
    settings_options,
    with_data,
    with_options,
)
from budgetsearch.cli.output import conclude, console, heard, say_aside
from budgetsearch.core.ports import Watcher
from budgetsearch.machine.clock import process_age
from budgetsearch.run.settings import Changes, RunSettings
from budgetsearch.views.terminal import echo

if TYPE_CHECKING:
    from budgetsearch.api.runs import Beside

commands = typer.Typer()


@commands.command(
    cls=SettingsCommand,
    epilog="Example:  budgetsearch run train.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct "
    "--gpu cpu --hours 30m --out runs/mine",
)
@with_options(settings_options())
def run(
    file: DataArgument = None,
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
    with errors(), _running():
        from budgetsearch.api.runs import search

        chosen = cast(RunSettings, with_data(settings, file))
        result = search(chosen, config, resume, _beside(log))
    conclude(result)


@commands.command(
    cls=SettingsCommand, epilog="Example:  budgetsearch plan train.jsonl --gpu rtx4090 --hours 8 --slow 2"
)
@with_options(settings_options())
def plan(
    file: DataArgument = None,
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
    with errors(), heard(say_aside):
        from budgetsearch import api

        found = api.plan(slow=slow, probe=probe, config=config, **with_data(settings, file))
        if as_json:
            echo(json.dumps(found.as_json(), indent=2))
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
    with errors(), _running():
        from budgetsearch.api.runs import search_on

        result = search_on(run, cast(Changes, changes), _beside(log))
    conclude(result)


@contextmanager
def _running() -> Iterator[None]:
    """Signals stop the run with their exit codes from here on, and its output does not hold it up."""
    from budgetsearch.run.process import free_output, stop_signals

    with stop_signals():
        free_output()
        yield


def _beside(loggers: str | None) -> Beside:
    """The display, the loggers, and what the process of a command adds."""
    from budgetsearch.api.runs import Beside

    return Beside(_loggers(loggers), progress=True, already_seconds=process_age(), last_resort=True)


def _loggers(names: str | None) -> list[Watcher]:
    if not names:
        return []
    from budgetsearch.views.loggers import logger

    return [logger(name.strip()) for name in names.split(",")]
