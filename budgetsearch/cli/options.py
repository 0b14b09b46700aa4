"""The options that several commands share, each written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from budgetsearch.cli.errors import errors
from budgetsearch.core.errors import SettingsError
from budgetsearch.run.fields import default_of, flag_of, is_repeated, one_a_line, type_of
from budgetsearch.run.settings import Settings

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
DataArgument = Annotated[
    str | None, typer.Argument(metavar="[DATA]", help="Training data, as --data.", show_default=False)
]
ConfigOption = Annotated[
    Path | None, typer.Option(help="Settings file.", show_default="budgetsearch.yaml, if it is there")
]
LogOption = Annotated[
    str | None,
    typer.Option(
        help="Log scalars to tensorboard, wandb or trackio as well (by commas).", show_default="none"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ManifestArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run, its adapter, or a manifest.json.", show_default=False),
]
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
PLACES: Mapping[str, Any] = {
    "data": Annotated[str | None, typer.Option(help="Where the training data lie now.")],
    "valid": Annotated[str | None, typer.Option(help="Where the validation data lie now.")],
    "model": Annotated[str | None, typer.Option(help="Where the base model lies now.")],
    "trust_remote_code": TrustAgain,
}
"""The fields of ``Places``."""
SHORTER = {"grace_seconds": "--grace", "tries": "--try"}
"""Flags beside that of the setting's name."""

Command = Callable[..., None]


class SettingsCommand(TyperCommand):
    """A command with settings, which knows options of other trainers and says what to give instead."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as any command does, once no option of others is among ``args``."""
        from budgetsearch.run.configuration import said_of_flag

        known = {option for one in self.params for option in (*one.opts, *one.secondary_opts)}
        flags = dict(map(_flag_and_value, args, [*args[1:], "--"]))
        config = Path(flags["--config"]) if "--config" in flags else None
        long = {_plain(name): (name, value) for name, value in flags.items() if name.startswith("--")}
        values = {plain: value for plain, (_, value) in long.items()}
        for plain, (name, _) in long.items():
            if name in known:
                continue
            slip = not get_close_matches(name, known)  # else Click says what is meant
            if (instead := said_of_flag(plain, values, config, slip=slip)) is not None:
                with errors():
                    raise SettingsError(f"{name}: {instead}")
        return super().parse_args(ctx, args)


def _plain(flag: str) -> str:
    return flag[2:].replace("-", "_").lower()


def _flag_and_value(flag: str, following: str) -> tuple[str, str]:
    name, _, value = flag.partition("=")
    return name, value or ("" if following.startswith("--") else following)


def with_data(settings: Mapping[str, Any], data: str | None) -> dict[str, Any]:
    """The settings with the data that were named without a flag.

    Raises:
        SettingsError: --data names others.
    """
    settings = {name: one_a_line(value) if value != [] else None for name, value in settings.items()}
    flagged = settings["data"]
    if data is not None and flagged not in (None, data):
        raise SettingsError(f"the data are given twice: {data} and --data {flagged}. Give one of them.")
    return {**settings, "data": data if data is not None else flagged}


def with_options(options: Mapping[str, Any]) -> Callable[[Command], Command]:
    """Give a command these options beside its own; it takes them as keywords.

    ``options``: the annotation of each by its name; what is not given is None, and a switch is off.
    """

    def widened(command: Command) -> Command:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        own = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        more = [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=False if kind.__origin__ is bool else None,
                annotation=kind,
            )
            for name, kind in options.items()
        ]
        every = sorted([*more, *own], key=lambda parameter: parameter.default is not inspect.Parameter.empty)
        command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        return command

    return widened


def settings_options(
    names: Iterable[str] = tuple(Settings.model_fields), shown: str = ""
) -> Mapping[str, Any]:
    """An option for each of these settings. ``shown``: what becomes of one that is not given."""
    return {name: _option(name, shown) for name in names}


def _option(name: str, shown: str) -> Any:
    field = Settings.model_fields[name]
    kind: Any = list[str] if is_repeated(field) else type_of(field)
    flag = flag_of(name)
    flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag, *filter(None, [SHORTER.get(name)])]
    default = shown or default_of(field)
    return Annotated[kind | None, typer.Option(*flags, help=field.description, show_default=default or False)]
