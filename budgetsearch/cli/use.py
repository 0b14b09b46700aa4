"""The commands that bring what a run found to where it is used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from budgetsearch.cli.errors import errors
from budgetsearch.cli.options import PLACES, JsonOption, RunArgument, with_options
from budgetsearch.cli.output import heard, say_aside
from budgetsearch.views.terminal import echo

commands = typer.Typer()
GpuOption = Annotated[
    str | None, typer.Option(help="Card to load on, or cpu.", show_default="that of the run")
]


@commands.command(epilog="Example:  budgetsearch export runs/mine --merged --gguf q8_0")
@with_options({**PLACES, "gpu": GpuOption})
def export(
    run: RunArgument,
    merged: Annotated[bool, typer.Option("--merged", help="Base and adapter as one 16-bit model.")] = False,
    gguf: Annotated[
        str | None, typer.Option(help="One GGUF file: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.")
    ] = None,
    ollama: Annotated[
        bool, typer.Option("--ollama", help="A GGUF file (q8_0 unless --gguf) with a Modelfile.")
    ] = False,
    hub: Annotated[
        str | None, typer.Option(help="Push the adapter, or what is made, to this private repository.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Name what --hub would upload.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the new folders.", show_default="RUN/exports")
    ] = None,
    as_json: JsonOption = False,
    **places: Any,
) -> None:
    """Make of a finished run's adapter what others take; each form is loaded again and its loss compared.

    What does not come back with the adapter's loss on validation rows is not kept; the exit code is 1 then.
    """
    with errors(), heard(say_aside):
        from budgetsearch import api
        from budgetsearch.run.permissions import Places
        from budgetsearch.tools.export.wanted import Wanted

        wanted = Wanted(merged, gguf.lower() if gguf else None, ollama, hub, dry_run, out)
        gpu = places.pop("gpu")
        made = api.export(run, wanted=wanted, places=Places(**places), gpu=gpu)
        if as_json:
            echo(json.dumps([dataclasses.asdict(one) for one in made], indent=2))
            return
        for one in made:
            echo(f"{one.form}: {one.place}")
            if one.compared is not None:
                echo(f"  {one.compared.line}")
            for name, size in one.files if one.form == "dry run" else ():
                echo(f"  would upload {name} ({size} bytes)")


@commands.command(epilog="Example:  budgetsearch serve runs/mine --port 8000")
def serve(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A finished run, its adapter, or a merged model.", show_default=False
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback are open to all.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option(help="Port.", min=0, max=65535, show_default="8000, or the next free one")
    ] = None,
    rows: Annotated[int, typer.Option(help="Answers that are written at once.", min=1)] = 8,
    queue: Annotated[int, typer.Option(help="Answers that may wait; more get a 429.", min=0)] = 64,
    gpu: Annotated[str, typer.Option(help="Card to serve on, or cpu.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Where the base model lies now, or that it may be fetched.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code of the base model run. Read it first.")
    ] = False,
) -> None:
    """Answer over HTTP: the challenge's API (/process) and OpenAI's (/v1). SIGTERM and Ctrl-C drain."""
    with errors(), heard(say_aside):
        from budgetsearch import api
        from budgetsearch.tools.serve.command import Serving

        api.serve(run, how=Serving(host, port, rows, queue, gpu, model, trust_remote_code))


@commands.command(epilog="Example:  budgetsearch submit runs/mine --out submission --check")
@with_options(PLACES)
def submit(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The new folder.")],
    gpu: Annotated[
        str | None, typer.Option(help="Card that it is judged on, or cpu.", show_default="that of the run")
    ] = None,
    copy_base: Annotated[
        bool, typer.Option("--copy-base", help="Put the base model into the folder, too.")
    ] = False,
    licences_checked: Annotated[
        bool,
        typer.Option("--licences-checked", help="You looked at the licences that are not known to be open."),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Run its steps in a fresh virtual environment, and ask it.")
    ] = False,
    as_json: JsonOption = False,
    **places: Any,
) -> None:
    """Make an entry to the NeurIPS LLM Efficiency Challenge: Dockerfiles, pinned versions, adapter, README.

    It is written whole or not at all; with --check only if it answers.
    """
    with errors(), heard(say_aside):
        from budgetsearch import api
        from budgetsearch.run.permissions import Places
        from budgetsearch.tools.submit.entry import Submitting
        from budgetsearch.tools.submit.page import fit_lines

        how = Submitting(gpu, copy_base, licences_checked, check)
        entry = api.submit(run, out, how=how, places=Places(**places))
        if as_json:
            echo(json.dumps(dataclasses.asdict(entry), indent=2))
            return
        echo(f"submission: {entry.folder}")
        for line in (fit_lines(entry.fit)[0], *(f"licence of {said}" for said in entry.licences)):
            echo(f"  {line}")
