"""The commands that do a run's work again: train its winner, or check what it left."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from budgetsearch.cli.errors import EXIT_FAILED, code_of, errors
from budgetsearch.cli.options import PLACES, JsonOption, ManifestArgument, ToleranceOption, with_options
from budgetsearch.cli.output import console, heard, say_aside
from budgetsearch.views.terminal import echo

commands = typer.Typer()


@commands.command(epilog="Example:  budgetsearch reproduce runs/mine --out runs/mine-again")
@with_options(PLACES)
def reproduce(
    run: ManifestArgument,
    out: Annotated[Path | None, typer.Option(help="Keep the reproduced adapter in this new folder.")] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Train without the trials that trained beside the winner.")
    ] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Go on although an input has changed.")] = False,
    tolerance: ToleranceOption = None,
    as_json: JsonOption = False,
    **places: Any,
) -> None:
    """Train a run's winner again from its manifest alone, and say what agrees and what differs.

    The same tokens in the same order beside the same neighbours. The exit code is 1 if it differs beyond the
    tolerance, 2 if an input has changed.
    """
    with errors(), _unfinished(), heard(say_aside):
        from budgetsearch import api
        from budgetsearch.run.permissions import Places

        outcome = api.reproduce(
            run, out=out, alone=alone, anyway=anyway, tolerance=tolerance, places=Places(**places),
        )  # fmt: skip
        if as_json:
            echo(json.dumps(dataclasses.asdict(outcome), indent=2, default=str))
        else:
            from budgetsearch.tools.reproduce.show import show_reproduced

            console().print(show_reproduced(outcome))
    raise typer.Exit(0 if outcome.agrees else EXIT_FAILED)


@commands.command(epilog="Example:  budgetsearch verify runs/mine --no-score")
@with_options(PLACES)
def verify(
    run: ManifestArgument,
    score: Annotated[bool, typer.Option("--score/--no-score", help="Score the adapter again.")] = True,
    tolerance: ToleranceOption = None,
    as_json: JsonOption = False,
    **places: Any,
) -> None:
    """Check the hashes of adapter, base, data, ledger and manifest, and score the adapter again.

    Whatever has changed is named. The exit code is 1 then.
    """
    with errors(), _unfinished(), heard(say_aside):
        from budgetsearch import api
        from budgetsearch.run.permissions import Places

        outcome = api.verify(
            run, score=score, tolerance=tolerance, places=Places(**places)
        )  # fmt: skip
        if as_json:
            echo(json.dumps(dataclasses.asdict(outcome), indent=2))
        else:
            from budgetsearch.tools.reproduce.show import show_verified

            console().print(show_verified(outcome))
    raise typer.Exit(0 if outcome.passes else EXIT_FAILED)


@contextmanager
def _unfinished() -> Iterator[None]:
    """Ctrl-C ends a check, and nothing of it remains."""
    try:
        yield
    except KeyboardInterrupt as error:
        echo("stopped; nothing was kept", err=True)
        raise typer.Exit(code_of(getattr(error, "signal", "SIGINT"))) from None
