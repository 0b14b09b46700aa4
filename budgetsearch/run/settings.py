"""The settings of a run: flags over ``budgetsearch.yaml`` over the card's profile over defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from budgetsearch.core.errors import SettingsError, nearest
from budgetsearch.machine.detect import detect
from budgetsearch.machine.nvml import Nvml
from budgetsearch.machine.profiles import CardProfile, profile
from budgetsearch.run.spaces import find_space, read_yaml

CONFIG_NAME = "budgetsearch.yaml"
PLACEHOLDERS: Mapping[str, Any] = {"model": "-", "data": "-", "space": "-", "batch_size": 1, "max_length": 8}
"""What the card's profile fills in; until it is known, these stand there."""
FLAGS = "the flags"

TAKES: Mapping[str, str] = {
    "engine": "local or ray",
    "gpus": "a whole number of at least 1",
    "hours": "more than 0 and finite, for example 0.2 for twelve minutes or 24 for a day",
    "device": "a whole number from 0, as nvidia-smi counts, or a UUID like GPU-1a2b or MIG-1a2b",
    "seed": "a whole number from 0",
    "max_length": "a whole number of at least 8, in tokens",
    "batch_size": "a whole number of at least 1, in sequences",
    "eta": "a whole number of at least 2",
    "first_rung": "more than 0 and at most 1, for example 1/9",
    "full_share": "more than 0 and at most 0.9",
    "max_epochs": "more than 0",
    "valid_share": "more than 0 and at most 0.5",
    "max_rows": "a whole number of at least 2",
    "max_trials": "a whole number of at least 1",
    "max_gang": "a whole number from 1 to 64",
    "optimizer": "adamw or adamw8bit",
    "torch_compile": "true or false",
    "eval_share": "more than 0 and at most 0.5",
    "task_examples": "a whole number from 0 to 32",
    "grace_seconds": "a number of seconds from 0",
    "trust_remote_code": "true or false",
    "keep_checkpoints": "true or false",
    "out": "the path of a folder",
    "shared": "a folder, or a URL like s3://bucket/folder",
}
"""What each setting takes, for its error; the others take text. The bounds stand in the fields."""


class Settings(BaseModel):
    """Everything that a user can decide about a run; complete and checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(
        min_length=1,
        description="Base model: a local folder, a Hub id, a GGUF file or pypi:PACKAGE==VERSION. "
        "Default: the card profile's. Source: open licences of the NeurIPS LLM Efficiency Challenge.",
    )
    revision: str | None = Field(
        None,
        min_length=1,
        description="Revision of a Hub model. Default: the one that the card's default model is pinned "
        "to, else its main branch.",
    )
    data: str = Field(
        min_length=1,
        description="Training data: a JSONL, JSON, CSV or Parquet file, hub:OWNER/NAME/FILE, or "
        "reasoning-gym:NAME?size=N&seed=S. Default: the card profile's, human-made or procedural.",
    )
    valid: str | None = Field(
        None, min_length=1, description="Validation data. Default: a seeded share of the training data."
    )
    gpu: str = Field(
        "auto", min_length=1, description="Card profile. Default: auto, the largest card or the CPU."
    )
    device: int | str | None = Field(
        None,
        description="The card: its index as nvidia-smi counts, or its UUID or how that begins (GPU-..., "
        "MIG-...). Default: found by --gpu.",
    )
    engine: Literal["local", "ray"] = Field(
        "local",
        description="What runs the jobs: local, one card of this machine, or ray, several on Ray Tune. "
        "Default: local.",
    )
    gpus: int | None = Field(
        None,
        ge=1,
        description="Workers of --engine ray, one GPU each; with --gpu cpu a share of the CPUs each. "
        "Default: every GPU that Ray sees, or one worker without a GPU.",
    )
    address: str | None = Field(
        None,
        min_length=1,
        description="Ray cluster that runs already: auto on one of its machines, or HOST:PORT. Default: a "
        "cluster of this machine alone, which is started and ended with the run.",
    )
    hours: float = Field(
        24.0, gt=0, description="Hours that the whole run may take. Default: 24, as in the challenge."
    )
    deadline: str | None = Field(
        None,
        min_length=1,
        description="When the run must be over, by the clock on the wall, whatever --hours says: "
        "2026-11-24T18:00, or slurm for the end of the Slurm job. Default: none, only --hours counts.",
    )
    space: str = Field(
        min_length=1,
        description="Search space: a name that comes with the package, or a YAML file. "
        "Default: the card profile's.",
    )
    out: Path | None = Field(
        None, description="Run folder. Default: runs/MODEL-TIME below the working folder."
    )
    seed: int = Field(0, ge=0, description="Seed of the split, the sampler and the trials. Default: 0.")
    max_length: int = Field(
        ge=8, description="Longest row in tokens; longer ones are cut. Default: the card profile's."
    )
    batch_size: int = Field(
        ge=1,
        description="Effective batch in sequences. Default: the card profile's. Source: TRL docs, LoRA "
        "wants 8 to 32.",
    )
    eta: int = Field(
        5,
        ge=2,
        description="One trial in eta is promoted. Default: 5. Source: measured, docs/policy.md.",
    )
    first_rung: float | None = Field(
        None,
        gt=0,
        le=1,
        description="First rung as a share of the full run. Default: 1/6, or 1/27 where the "
        "budget holds three full runs or more. Source: recorded curves, docs/policy.md.",
    )
    full_share: float = Field(
        0.4,
        gt=0,
        le=0.9,
        description="Share of the budget that a full run may take. Default: 0.4. Source: the design.",
    )
    max_epochs: float = Field(
        4.0,
        gt=0,
        description="Passes over the data in a full run, at most. Default: 4. Source: winners used 1 to 5.",
    )
    valid_share: float = Field(
        0.1,
        gt=0,
        le=0.5,
        description="Share of the rows kept for validation where --valid is not given. Default: 0.1.",
    )
    max_rows: int | None = Field(
        None, ge=2, description="Rows of the data to use, at most. Default: all of them."
    )
    max_trials: int = Field(200, ge=1, description="Configurations to try, at most. Default: 200.")
    max_gang: int = Field(
        8,
        ge=1,
        le=64,
        description="Adapters to train at once on one base, at most; how many, the calibration decides. "
        "Default: 8. Source: tokens per second saturate before that, benchmarks/training.",
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw",
        description="adamw keeps its state in fp32; adamw8bit saves 6 bytes per adapter weight, one trial "
        "at a time. Default: adamw. Source: with small adapters fp32 costs little.",
    )
    torch_compile: bool = Field(
        False,
        description="Whether torch.compile runs the base's layers in training; it is paid for in the "
        "calibration and for new shapes. Default: false.",
    )
    eval_share: float = Field(
        0.08,
        gt=0,
        le=0.5,
        description="Share of a rung's seconds that its evaluation may take. Default: 0.08.",
    )
    task_examples: int = Field(
        32,
        ge=0,
        le=32,
        description="Examples answered for the task accuracy; more where time is left at the end. "
        "Default: 32.",
    )
    targets: str = Field(
        "all-linear",
        min_length=1,
        description="Layers that get an adapter: all-linear, or names by commas. Default: all-linear. "
        "Source: TRL and torchtune docs, attention alone cannot be repaired by rank.",
    )
    grace_seconds: float = Field(
        30.0, ge=0, description="Seconds that a stopping worker gets to write its checkpoint. Default: 30."
    )
    trust_remote_code: bool = Field(
        False, description="Whether code from the model's repository may run. Default: false."
    )
    keep_checkpoints: bool = Field(
        False, description="Whether the checkpoints of losing trials stay on disk. Default: false."
    )
    storage: str | None = Field(
        None,
        min_length=1,
        description="Optuna storage URL; its password may come from BUDGETSEARCH_STORAGE_PASSWORD instead. "
        "Default: SQLite inside the run folder.",
    )
    shared: str | None = Field(
        None,
        min_length=1,
        description="Where the checkpoints lie if workers on several machines need them: a folder that all "
        "of them mount, or a URL that fsspec knows, such as s3://bucket/folder; each run has a place of its "
        "own in it. Default: the run folder.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `hours: yes` as true, and pydantic reads true as 1.
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind is not bool:
            raise ValueError("a switch is no number")
        return value

    @field_validator("device")
    @classmethod
    def _card(cls, value: int | str | None) -> int | str | None:
        known = value is None or isinstance(value, int) or value.isdigit() or value[:4] in ("GPU-", "MIG-")
        if not known or (isinstance(value, int) and value < 0):
            raise ValueError("neither an index nor a UUID")
        return value

    @field_validator("first_rung", mode="before")
    @classmethod
    def _fraction(cls, value: Any) -> Any:
        if isinstance(value, str) and "/" in value:
            try:
                return float(Fraction(value.replace(" ", "")))
            except ZeroDivisionError as problem:
                raise ValueError("divided by zero") from problem
        return value


def load_settings(
    overrides: Mapping[str, Any],
    config: Path | None = None,
    cwd: Path | None = None,
    nvml: Nvml | None = None,
) -> Settings:
    """The settings of a run: ``overrides`` over the file over the card's profile over defaults.

    Args:
        overrides: the flags that were given; None counts as not given.
        config: a YAML file; None: ``budgetsearch.yaml`` in the working folder, if there is one.
        cwd: the working folder; None: the process's own.
        nvml: the driver that ``gpu: auto`` asks; None: the real one.

    Raises:
        SettingsError: an unknown key or a value that a setting does not take; names key and file.
        DeviceError: ``gpu`` names no profile.
        SpaceError: there is no such search space.
    """
    origin, written = _read_config(config, cwd or Path.cwd())
    given = {key: value for key, value in overrides.items() if value is not None}
    for source, values in ((FLAGS, given), (origin, written)):
        _check_keys(values, source)
    chosen = {**{key: value for key, value in written.items() if value is not None}, **given}
    sources = {key: FLAGS if key in given else origin for key in chosen}
    checked = _validate({**PLACEHOLDERS, **chosen}, sources)
    card = _profile(checked, nvml)
    missing = {key: getattr(card, key) for key in PLACEHOLDERS if key not in chosen}
    if "model" not in chosen and "revision" not in chosen:
        missing["revision"] = card.revision
    settings = checked.model_copy(update=missing)
    find_space(settings.space)
    if settings.out is None:
        return settings.model_copy(update={"out": default_out(settings.model)})
    return settings


def revised(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The same settings with some of them changed; None counts as not given.

    Raises:
        SettingsError: a value that a setting does not take.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    return _validate({**settings.model_dump(mode="json"), **given}, {}) if given else settings


def names_out(config: Path | None, cwd: Path | None = None) -> bool:
    """Whether the settings file names a run folder."""
    return bool(_read_config(config, cwd or Path.cwd())[1].get("out"))


def default_out(model: str, now: datetime | None = None) -> Path:
    """``runs/MODEL-YYYYmmdd-HHMMSS``, with the short name of the model; ``now`` is local time."""
    bare = re.sub(r"^\w+:|==.*$", "", model).rstrip("/\\")
    last = re.split(r"[/\\]", bare)[-1].removesuffix(".gguf")
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "model"
    return Path("runs") / f"{short}-{now or datetime.now():%Y%m%d-%H%M%S}"


def _read_config(config: Path | None, cwd: Path) -> tuple[str, Mapping[str, Any]]:
    path = config if config is not None else cwd / CONFIG_NAME
    if config is None and not path.is_file():
        return "", {}
    return str(path), read_yaml(path, SettingsError)


def _check_keys(values: Mapping[str, Any], source: str) -> None:
    known = Settings.model_fields
    for key in values:
        if key not in known:
            hint = nearest(str(key), known)
            close = re.search(r"'(\w+)'", hint)
            flag = f"; its flag is {_flag(close[1])}" if close else ""
            raise SettingsError(
                f"{source}: unknown setting {key!r}{hint}{flag}. The settings are {', '.join(known)}."
            )


def _profile(settings: Settings, nvml: Nvml | None) -> CardProfile:
    """The profile that fills in what nobody decided; only ``auto`` looks at the machine."""
    found = profile(settings.gpu)
    return detect("auto", settings.device, nvml).profile if found.name == "auto" else found


def _validate(values: Mapping[str, Any], sources: Mapping[str, str]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as problem:
        lines = [_explain(str(error["loc"][0]), error["input"], sources) for error in problem.errors()]
    raise SettingsError("\n".join(dict.fromkeys(lines)))


def _explain(key: str, value: Any, sources: Mapping[str, str]) -> str:
    source = sources.get(key, FLAGS)
    where = _flag(key) if source == FLAGS else f"{source}: {key} ({_flag(key)})"
    return f"{where} must be {TAKES.get(key, 'text')}; it is {value!r}."


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")
