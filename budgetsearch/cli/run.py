"""The commands that search, and the one that says what a search would do."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from budgetsearch.cli.errors import errors
from budgetsearch.cli.options import (
    AddressOption,
    CardOption,
    ConfigOption,
    DeviceOption,
    EngineOption,
    GpusOption,
    LogOption,
    ModelOption,
    RevisionOption,
    RunArgument,
    StorageAgain,
)
from budgetsearch.cli.output import conclude, console, progress
from budgetsearch.core.ports import Watcher
from budgetsearch.machine.clock import process_age

commands = typer.Typer()


@commands.command(
    epilog="Example:  budgetsearch run --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl "
    "--gpu cpu --hours 0.5 --out runs/mine"
)
def run(
    model: ModelOption = None,
    revision: RevisionOption = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Training data: JSONL, JSON, CSV or Parquet with messages, prompt/completion, "
            "instruction/input/output or question/answer; or reasoning-gym:NAME?size=N&seed=S."
        ),
    ] = None,
    valid: Annotated[
        str | None, typer.Option(help="Validation data; without it a seeded share of --data.")
    ] = None,
    gpu: CardOption = None,
    device: DeviceOption = None,
    engine: EngineOption = None,
    gpus: GpusOption = None,
    address: AddressOption = None,
    hours: Annotated[
        float | None, typer.Option(help="The whole budget, from start to exit.", show_default="24")
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(help="When it must be over: 2026-11-24T18:00, or slurm for the end of the Slurm job."),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(help="Search space: a name that `budgetsearch spaces` lists, or a YAML file."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder to make.", show_default="runs/MODEL-TIME")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything.", show_default="0")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest row in tokens; the rest is cut and counted.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Effective batch in sequences, the same for all trials.")
    ] = None,
    eta: Annotated[
        int | None, typer.Option(help="One in so many trials is promoted.", show_default="5")
    ] = None,
    first_rung: Annotated[
        float | None,
        typer.Option(
            help="First rung as a share of a full run.",
            show_default="1/6; 1/27 if the budget holds three full runs",
        ),
    ] = None,
    full_share: Annotated[
        float | None,
        typer.Option(help="Full run as a share of the budget, at most.", show_default="0.4"),
    ] = None,
    max_epochs: Annotated[
        float | None, typer.Option(help="Epochs of a full run, at most.", show_default="4")
    ] = None,
    valid_share: Annotated[
        float | None,
        typer.Option(help="Share of --data for validation, without --valid.", show_default="0.1"),
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(help="Use a seeded sample of so many rows of --data.")
    ] = None,
    max_trials: Annotated[
        int | None, typer.Option(help="Configurations to try, at most.", show_default="200")
    ] = None,
    max_gang: Annotated[
        int | None,
        typer.Option(help="Adapters to train at once, at most; the calibration decides.", show_default="8"),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="adamw, or adamw8bit (less memory, one trial at a time).", show_default="adamw"),
    ] = None,
    torch_compile: Annotated[
        bool | None,
        typer.Option(help="Run torch.compile on the base in training.", show_default="no"),
    ] = None,
    eval_share: Annotated[
        float | None,
        typer.Option(help="Evaluation as a share of a first rung, at most.", show_default="0.08"),
    ] = None,
    task_examples: Annotated[
        int | None, typer.Option(help="Answers behind the accuracy; more if time is left.", show_default="32")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Modules with an adapter, by commas.", show_default="all-linear"),
    ] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option(
            "--trust-remote-code/--no-trust-remote-code",
            help="Run code that the model repository brings.",
            show_default="no",
        ),
    ] = None,
    grace_seconds: Annotated[
        float | None,
        typer.Option(
            "--grace-seconds",
            "--grace",
            help="Seconds that a stopping worker gets for its checkpoint.",
            show_default="30",
        ),
    ] = None,
    keep_checkpoints: Annotated[
        bool | None,
        typer.Option(
            "--keep-checkpoints/--no-keep-checkpoints",
            help="Keep the checkpoints of dropped trials too.",
            show_default="no",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Optuna storage URL; its password may come from BUDGETSEARCH_STORAGE_PASSWORD instead.",
            show_default="SQLite in the run folder",
        ),
    ] = None,
    shared: Annotated[
        str | None,
        typer.Option(
            help="Checkpoints for several machines: a folder that all mount, or a URL like s3://bucket/runs.",
            show_default="in the run folder",
        ),
    ] = None,
    config: ConfigOption = None,
    resume: Annotated[
        str,
        typer.Option(help="auto: go on with the run in --out if there is one, as after a requeue."),
    ] = "never",
    log: LogOption = None,
) -> None:
    """Search for the best adapter within the budget, and export it before the deadline.

    What is not given comes from budgetsearch.yaml, then from the card's profile, then from defaults.
    """
    given = dict(locals())
    config_file, loggers = given.pop("config"), given.pop("log")
    with errors(), _running() as (watchers, say):
        from budgetsearch import api

        result = api.run(
            **given, config=config_file, watchers=[*watchers, *_loggers(loggers)], say=say,
            already_seconds=process_age(), last_resort=True,
        )  # fmt: skip
    conclude(result)


OF_RUNS = ("resume", "log")
"""Options of ``run`` that mean nothing where nothing runs."""


def _as_run(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of ``run`` beside its own; it takes them as ``settings``."""
    shared = inspect.signature(run, eval_str=True).parameters
    own = {
        name: parameter
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    every = {**own, **{name: parameter for name, parameter in shared.items() if name not in OF_RUNS}}
    command.__signature__ = inspect.Signature(list(every.values()))  # type: ignore[attr-defined]
    command.__annotations__ = {name: parameter.annotation for name, parameter in every.items()}
    return command


@commands.command(epilog="Example:  budgetsearch plan --gpu rtx4090 --hours 8 --slow 2")
@_as_run
def plan(
    slow: Annotated[float, typer.Option(help="Everything takes so many times as long.")] = 1.0,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the model and measure for a minute first.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **settings: Any,
) -> None:
    """Show what `run` with the same options would do, before it spends anything.

    What fits into the card's memory, the ladder, how many trials each rung gets, when each part begins, what
    the reserve is for, and what all of this rests on. Nothing is trained; the card need not be here.
    """
    with errors():
        from budgetsearch import api

        found = api.plan(slow=slow, probe=probe, say=lambda line: typer.echo(line, err=True), **settings)
        if as_json:
            typer.echo(json.dumps(found.as_json(), indent=2))
        else:
            from budgetsearch.tools.plan.show import show

            console().print(show(found))


@commands.command(epilog="Example:  budgetsearch resume runs/mine")
def resume(
    run: RunArgument,
    hours: Annotated[
        float | None,
        typer.Option(
            help="Hours that the whole run may take, those before included.", show_default="as before"
        ),
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(help="Another deadline: 2026-11-24T18:00, or slurm.")
    ] = None,
    log: LogOption = None,
    storage: StorageAgain = None,
    engine: EngineOption = None,
    gpus: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """Go on with an interrupted run, with what is left of its budget."""
    with errors(), _running() as (watchers, say):
        from budgetsearch import api

        result = api.resume(
            run, hours=hours, deadline=deadline, storage=storage, engine=engine, gpus=gpus, address=address,
            watchers=[*watchers, *_loggers(log)], say=say, already_seconds=process_age(), last_resort=True,
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
