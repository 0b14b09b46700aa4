"""The commands around runs: what one needs, the spaces to choose from, the policy on recorded curves."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from budgetsearch.cli.errors import errors
from budgetsearch.cli.options import (
    ConfigOption,
    DataArgument,
    JsonOption,
    SettingsCommand,
    settings_options,
    with_data,
    with_options,
)
from budgetsearch.cli.output import console, heard, say_aside
from budgetsearch.views.terminal import Terminal, echo

commands = typer.Typer()


@commands.command(
    cls=SettingsCommand,
    epilog="Example:  budgetsearch doctor --gpu a100 --model Qwen/Qwen3-8B-Base --out runs/mine",
)
@with_options(settings_options(("model", "revision", "data", "hours", "gpu", "device", "out")))
def doctor(
    file: DataArgument = None, config: ConfigOption = None, as_json: JsonOption = False, **settings: Any
) -> None:
    """Check what a run needs, one line each, with a remedy for each failure. It fetches nothing.

    The exit code is 1 if something fails; notes alone leave it at 0.
    """
    with errors():
        from budgetsearch import api
        from budgetsearch.tools.doctor.check import Check, as_values, exit_code, line, summary

        def tell(check: Check) -> None:
            if not as_json:
                echo(line(check))

        checks = api.doctor(config=config, tell=tell, **with_data(settings, file))
        echo(json.dumps(as_values(checks), indent=2) if as_json else summary(checks))
    raise typer.Exit(exit_code(checks))


@commands.command(epilog="Example:  budgetsearch check my_module:MyRecipe")
def check(
    recipe: Annotated[str, typer.Argument(metavar="MODULE:CLASS", help="The recipe; its code runs.")],
    space: Annotated[str | None, typer.Option(help="Search space.", show_default="the recipe's own")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Try on a recipe of your own what every recipe promises, before it has a budget.

    Pauses and checkpoints change nothing, seeds repeat, other configurations train. The exit code is 1 if a
    promise is broken.
    """
    with errors():
        from budgetsearch import api

        def tell(promise: Any) -> None:
            if not as_json:
                detail = f": {promise.detail}" if promise.detail else ""
                echo(f"{'ok    ' if promise.kept else 'BROKEN'}  {promise.name}{detail}")

        found = api.check(recipe, space=space, device=device, seen=tell)
        if as_json:
            echo(json.dumps([dataclasses.asdict(promise) for promise in found], indent=2))
    raise typer.Exit(0 if all(promise.kept for promise in found) else 1)


INSPECTED = (
    *("model", "revision", "trust_remote_code", "data", "valid", "columns", "bad_rows", "max_length"),
    *("template", "system", "thinking", "train_on", "max_rows", "valid_share", "split_seed", "gpu"),
)


@commands.command(
    cls=SettingsCommand,
    epilog="Example:  budgetsearch inspect train.jsonl --model my-model --rows 5",
)
@with_options(settings_options(INSPECTED))
def inspect(
    file: DataArgument = None,
    rows: Annotated[int, typer.Option(min=0, help="So many rows are shown.")] = 3,
    every: Annotated[bool, typer.Option("--all", help="Show all rows.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    **settings: Any,
) -> None:
    """Show what will be trained: sources, rows that are kept, skipped and cut, and the first of them.

    The data are prepared as a run prepares them, which then finds them in the cache; nothing is trained.
    """
    with errors():
        from budgetsearch import api
        from budgetsearch.tools.inspect.show import show

        number = None if every else rows
        # Fetching a model and making tokens take a while; a program that reads JSON hears nothing.
        with nullcontext() if as_json else heard(say_aside):
            found = api.inspect(rows=number, config=config, **with_data(settings, file))
        if as_json:
            echo(json.dumps(found.to_json()))
            return
        terminal = console()
        for line in show(found, colour=terminal.is_terminal and not terminal.no_color):
            terminal.print(line, soft_wrap=True, highlight=False)


@commands.command(epilog="Example:  budgetsearch unpack openai/gpt-oss-20b models/gpt-oss-20b-bf16")
def unpack(
    model: Annotated[str, typer.Argument(help="A model whose checkpoint is quantized: Hub id or folder.")],
    folder: Annotated[Path, typer.Argument(help="Where the copy goes; it must not exist.")],
    revision: Annotated[str | None, typer.Option(help="Commit of a Hub model.")] = None,
) -> None:
    """Write a copy in 16 bits of a model that is quantized already; give it as --model, and every
    quantization can be had."""
    with errors():
        from budgetsearch import api

        echo(f"--model {api.unpack(model, folder, revision=revision)}")


@commands.command(epilog="Example:  budgetsearch spaces")
def spaces() -> None:
    """List the search spaces that come with the package."""
    with errors():
        from budgetsearch.run.spaces import list_spaces

        for info in list_spaces():
            echo(f"{info.name:<12} {info.description}\n{'':<12} {info.path}")


@commands.command(epilog="Example:  budgetsearch simulate --curves curves/ --budget 4x,10x --seeds 20")
def simulate(
    curves: Annotated[
        list[Path],
        typer.Option(help="Recorded learning curves (.npz, see docs/curves.md), or a folder of them."),
    ],
    budget: Annotated[str, typer.Option(help="Budgets in mean full runs.")] = "4x,10x,30x",
    seeds: Annotated[int, typer.Option(help="Plays of each on each table.", min=1)] = 20,
    jobs: Annotated[
        int | None, typer.Option(help="Processes.", min=1, show_default="one per processor")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write best-so-far over time to this HTML file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Play the policy and random search on recorded learning curves, in virtual time."""
    with errors():
        from rich.progress import Progress

        from budgetsearch import api
        from budgetsearch.tools.simulate import contest, show

        multiples = contest.read_budgets(budget)
        with Progress(console=Terminal(stderr=True), transient=True) as progress:
            task = progress.add_task("simulating", total=None)
            outcomes = api.simulate(
                curves, budgets=multiples, seeds=seeds, jobs=jobs,
                tell=lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
        if plot is not None:
            show.plot(outcomes, plot)
        if as_json:
            echo(json.dumps(contest.as_json(outcomes), indent=2))
        else:
            console().print(show.table(outcomes))
