"""The settings of a run from where they come: flags over a file over the card's profile over defaults."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from budgetsearch.core.bases import short_name
from budgetsearch.core.errors import SettingsError, UntrustedCode, UsageError, nearest
from budgetsearch.core.metric import is_code, is_function
from budgetsearch.core.secrets import without_secrets
from budgetsearch.core.space.space import Space
from budgetsearch.machine.detect import detect
from budgetsearch.machine.nvml import Driver
from budgetsearch.machine.profiles import CardProfile, profile
from budgetsearch.run.fields import (
    flag_of,
    takes_of,
)
from budgetsearch.run.other_trainers import KNOB_NAMES, SAID, said_here
from budgetsearch.run.settings import Settings
from budgetsearch.run.spaces import find_space, load_space, read_yaml

LOGGER = logging.getLogger("budgetsearch.run.configuration")
CONFIG_NAME = "budgetsearch.yaml"
PLACEHOLDERS: Mapping[str, Any] = {"model": "-", "data": "-", "space": "-", "batch_size": 1, "max_length": 8}
"""What the card's profile fills in; until it is known, these stand there."""
OF_ADAPTERS = (
    *(
        "model",
        "revision",
        "data",
        "valid",
        "columns",
        "bad_rows",
        "template",
        "metric",
        "direction",
        "system",
        "thinking",
        "train_on",
    ),
    *("max_length", "batch_size", "max_epochs", "valid_share", "max_rows", "max_gang", "optimizer"),
    *("torch_compile", "task_examples", "targets", "trust_remote_code", "split_seed"),
)
"""Settings that mean nothing beside a recipe."""
FLAGS = "the flags"


def load_settings(
    overrides: Mapping[str, Any],
    config: Path | None = None,
    cwd: Path | None = None,
    nvml: Driver | None = None,
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
    given = {key: _plain(value) for key, value in overrides.items() if value is not None}
    if config is None and "recipe" in given and "recipe" not in written:
        written = _without_adapters(written, origin)
    chosen = {**{key: value for key, value in written.items() if value is not None}, **given}
    for source, values in ((FLAGS, given), (origin, written)):
        _check_keys(values, source, chosen)
    sources = {key: FLAGS if key in given else origin for key in chosen}
    checked = _validate({**PLACEHOLDERS, **chosen}, sources)
    _check_models(checked)
    if config is None and checked.trust_remote_code and "trust_remote_code" not in given:
        raise UntrustedCode(
            f"{origin} lets code of a base model run, and it was not named: such a file comes with a folder. "
            f"Allow it with --trust-remote-code, or name the file with --config."
        )
    if config is None and checked.recipe is not None and "recipe" not in given:
        raise UntrustedCode(
            f"{origin} names a recipe, whose code would run, and it was not named: such a file comes with a "
            f"folder. Allow it with --recipe {checked.recipe}, or name the file with --config."
        )
    if checked.recipe is not None:
        return _with_recipe(checked, sources)
    if config is None and is_code(checked.metric) and "metric" not in given:
        kind = "function" if is_function(checked.metric) else "task"
        raise UntrustedCode(
            f"{origin} lets the {kind} {checked.metric} run, and it was not named: such a file comes with "
            f"a folder. Allow it with --metric {checked.metric}, or name the file with --config."
        )
    card = _profile(checked, nvml)
    missing = {key: getattr(card, key) for key in PLACEHOLDERS if key not in chosen}
    if "model" not in chosen and "revision" not in chosen:
        missing["revision"] = card.revision
    settings = checked.model_copy(update=missing)
    load_space(settings.space) if isinstance(settings.space, dict) else find_space(settings.space)
    if settings.out is None:
        return settings.model_copy(update={"out": default_out(settings.model)})
    return settings


def _check_models(settings: Settings) -> None:
    """Insist that several base models are several.

    Raises:
        SettingsError: one is named twice or not at all, or a revision says nothing of which it means.
    """
    models = settings.models
    if twice := [name for place, name in enumerate(models) if name in models[:place]]:
        raise SettingsError(f"--model names {twice[0]} twice; name each base model once.")
    if not all(name.strip() for name in models):
        raise SettingsError("--model names an empty base model; leave it out.")
    if len(models) > 1 and settings.revision is not None:
        raise SettingsError(
            f"--revision {settings.revision} does not say which of {', '.join(models)} it means; fetch that "
            "one and name its folder."
        )


def check_one_model(settings: Settings) -> None:
    """Insist on one base model.

    Raises:
        SettingsError: there are several.
    """
    if len(settings.models) > 1:
        raise SettingsError(
            f"--model names {len(settings.models)} base models ({', '.join(settings.models)}); this takes "
            "one. `run` searches over several, and `plan` says which suits the card and the hours."
        )


def _without_adapters(written: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
    """What the folder's own file says, less what it says of adapters: the command line names a recipe."""
    unused = [key for key in (*OF_ADAPTERS, "space") if written.get(key) is not None]
    if unused:
        LOGGER.warning("%s: %s not used, for a recipe has its own.", origin, ", ".join(unused))
    return {key: value for key, value in written.items() if key not in unused}


def _with_recipe(settings: Settings, sources: Mapping[str, str]) -> Settings:
    """Settings of a run with a recipe, which has neither model nor data. ``sources``: who gave a setting.

    Raises:
        SettingsError: something was given that only adapters have.
    """
    useless = [
        flag_of(key) if sources[key] == FLAGS else f"{key} in {sources[key]}"
        for key in OF_ADAPTERS
        if key in sources
    ]
    if useless:
        raise SettingsError(
            f"{', '.join(useless)}: a recipe has model and data of its own, so there is no use for "
            f"{'it' if len(useless) == 1 else 'them'} beside --recipe {settings.recipe}."
        )
    if isinstance(settings.space, str) and settings.space != PLACEHOLDERS["space"]:
        find_space(settings.space)
    if settings.out is None:
        return settings.model_copy(update={"out": default_out(str(settings.recipe).replace(":", "."))})
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
    short = "-".join(map(short_name, model.split("\n")))[:80]
    return Path("runs") / f"{short}-{now or datetime.now():%Y%m%d-%H%M%S}"


def _read_config(config: Path | None, cwd: Path) -> tuple[str, Mapping[str, Any]]:
    path = config if config is not None else cwd / CONFIG_NAME
    if config is None and not path.is_file():
        return "", {}
    return str(path), read_yaml(path, SettingsError)


def _plain(value: Any) -> Any:
    if isinstance(value, Space):
        return value.to_dict()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _check_keys(values: Mapping[str, Any], source: str, chosen: Mapping[str, Any]) -> None:
    known = Settings.model_fields
    for key in values:
        if key in known:
            continue
        if (instead := said_here(str(key), str(values[key]), _dimensions(chosen))) is not None:
            raise SettingsError(f"{source}: {key}: {instead if source == FLAGS else _as_keys(instead)}")
        hint = nearest(str(key), known)
        close = re.search(r"'(\w+)'", hint)
        flag = f"; its flag is {flag_of(close[1])}" if close else ""
        raise SettingsError(
            f"{source}: unknown setting {key!r}{hint}{flag}. The settings are {', '.join(known)}."
        )


def _as_keys(answer: str) -> str:
    """The same answer for a file, which has keys where the command line has flags."""

    def key(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return f"use `{name}: {found[2]}`" if name in Settings.model_fields else found[0]

    return re.sub(r"use --([a-z-]+) (\S+?)(?=[.:]?(\s|$))", key, answer)


def said_of_flag(
    name: str, flags: Mapping[str, str], config: Path | None = None, *, slip: bool = False
) -> str | None:
    """What to give instead of a flag of other trainers, in the space that the other flags and the file ask
    for; None: no such flag is known.

    ``flags``: all that were given, by their names with underscores; this one is among them.
    ``slip``: it may be one of them that was not typed quite right.
    """
    if said_here(name, flags[name]) is None:
        close = get_close_matches(name, (*KNOB_NAMES, *SAID), n=1, cutoff=0.75)
        if not (slip and close):
            return None
        meant = said_of_flag(close[0], {**flags, close[0]: flags[name]}, config)
        return f"there is no such option. Did you mean --{close[0].replace('_', '-')}? Then {meant}"
    try:
        written = _read_config(config, Path.cwd())[1]
    except UsageError:
        written = {}
    given = {one: flags[one] for one in ("space", "gpu") if one in flags}
    return said_here(name, flags[name], _dimensions({**written, **given}), flags)


def _dimensions(chosen: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Those that a run with these settings would search; None if that cannot be told."""
    try:
        card = profile(str(chosen.get("gpu") or "auto"))
        space = chosen.get("space") or (detect("auto").profile if card.name == "auto" else card).space
        found = load_space(space).to_dict()["dimensions"]
    except UsageError:
        return None
    left_out = ("name", "source")
    return {one["name"]: {key: one[key] for key in one if key not in left_out} for one in found}


def _profile(settings: Settings, nvml: Driver | None) -> CardProfile:
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
    where = flag_of(key) if source == FLAGS else f"{source}: {key} ({flag_of(key)})"
    return f"{where} must be {takes_of(Settings.model_fields[key])}; it is {without_secrets(repr(value))}."
