"""The commands with which a person takes a hand in a run that goes."""

from __future__ import annotations

from typing import Annotated

import typer

from budgetsearch.cli.errors import errors
from budgetsearch.cli.options import RunArgument
from budgetsearch.views.terminal import echo

commands = typer.Typer()
TrialArgument = Annotated[int, typer.Argument(metavar="TRIAL", help="Its number.", show_default=False)]


@commands.command("try", epilog="Example:  budgetsearch try runs/mine rank=16,learning_rate=2e-4")
def try_(
    run: RunArgument,
    configuration: Annotated[str, typer.Argument(metavar="NAME=VALUE,...", show_default=False)],
) -> None:
    """Add a configuration to a run that goes; it is the next new trial."""
    with errors():
        from budgetsearch.api.steering import ask

        echo(ask(run, "try", guess=configuration))


@commands.command(epilog="Example:  budgetsearch drop runs/mine 7")
def drop(run: RunArgument, trial: TrialArgument) -> None:
    """Give a trial up; what it trains now ends with its segment. Its adapter may still be the best."""
    with errors():
        from budgetsearch.api.steering import ask

        echo(ask(run, "drop", trial))


@commands.command(epilog="Example:  budgetsearch promote runs/mine 7")
def promote(run: RunArgument, trial: TrialArgument) -> None:
    """Send a trial one rung up, ahead of the others, as soon as that fits."""
    with errors():
        from budgetsearch.api.steering import ask

        echo(ask(run, "promote", trial))
