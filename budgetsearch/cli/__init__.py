"""The command line: Typer commands without logic of their own."""

from __future__ import annotations

import gc
import traceback
from typing import Annotated

import typer

from budgetsearch.cli import look as looking
from budgetsearch.cli import prepare as helping
from budgetsearch.cli import reproduce as repeating
from budgetsearch.cli import run as running
from budgetsearch.cli import steer as steering
from budgetsearch.cli import use as using
from budgetsearch.cli.errors import EXIT_FAILED

app = typer.Typer(
    name="budgetsearch",
    help="The best LoRA adapter that one GPU and a fixed time can buy.",
    epilog="Start with:  budgetsearch run --gpu cpu --hours 0.2",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Find the best LoRA adapter within a fixed time on one GPU."""
    if version:
        import budgetsearch

        typer.echo(f"budgetsearch {budgetsearch.__version__}")
        raise typer.Exit


for group in (running, steering, looking, using, repeating, helping):
    app.add_typer(group.commands)


def main() -> None:
    """The entry point of the ``budgetsearch`` command."""
    from budgetsearch.run.process import leave, take_process

    take_process()
    # A ledger is read into hundreds of thousands of records that stay: to look through them for garbage again
    # and again takes a fifth of the time.
    gc.set_threshold(50_000)
    code = 0
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILED
    leave(code)
