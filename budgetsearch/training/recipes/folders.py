"""Checkpoints of a recipe: what it writes, with the sums of its files, complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import CheckpointError, RecipeError
from budgetsearch.core.records import Params
from budgetsearch.storage.files import fresh_folder
from budgetsearch.training import sums
from budgetsearch.training.recipes.protocol import Recipe, is_exported_apart

EXPORTED = "export."
"""Before the names of the files that are handed out, where these are others than those of the checkpoint."""
UNTAKEN = (sums.META_FILE, sums.SUMS_FILE, "README.md", "budgetsearch.json")
"""What budgetsearch itself writes beside a recipe's files."""


@dataclass(frozen=True)
class Kept:
    """A trial as its checkpoint has it."""

    trial: Any
    units: int
    params: Params
    seed: int


def write(folder: Path, recipe: Recipe, kept: Kept, *, export: bool = True) -> None:
    """Let the recipe save a trial; ``export``: it may become the best, so what is handed out is written too.

    Raises:
        RecipeError: it writes nothing, a folder, a link, or a file of a name that is taken.
        OSError: the disk is full, or the folder around it is gone or cannot be written.
    """
    folder.parent.stat()  # whoever removed the run's folder does not want another one there
    if folder.exists():  # the same trial at the same unit: what is there is what would be written
        shutil.rmtree(folder)
    with fresh_folder(folder) as temporary:
        _collect(temporary, "", lambda inner: recipe.save(kept.trial, inner))
        if export and is_exported_apart(recipe):
            _collect(temporary, EXPORTED, lambda inner: recipe.export(kept.trial, inner))
        names = sorted(path.name for path in temporary.iterdir())
        meta = {
            sums.RECIPE: type(recipe).__qualname__,
            "units": kept.units,
            "params": dict(kept.params),
            "seed": kept.seed,
            **sums.describe(temporary, names),
        }
        (temporary / sums.META_FILE).write_text(json.dumps(meta, indent=2), encoding="utf-8")


def read(folder: Path, recipe: Recipe) -> Kept:
    """Let the recipe load a trial, after its files were compared with their sums.

    Raises:
        CheckpointError: the checkpoint is missing, torn or altered.
        UnreadableError: the system cannot read it now.
    """
    meta = sums.check(folder)
    try:
        units, params, seed = int(meta["units"]), dict(meta["params"]), int(meta["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"The checkpoint {folder} cannot be read: {error!r}") from error
    return Kept(recipe.load(params, seed, folder), units, params, seed)


def handed_out(files: Iterable[str]) -> dict[str, str]:
    """Of the files of a checkpoint those that are handed out, by their names there and in the end."""
    names = list(files)
    apart = {name: name.removeprefix(EXPORTED) for name in names if name.startswith(EXPORTED)}
    return apart or {name: name for name in names}


def _collect(folder: Path, prefix: str, fill: Callable[[Path], None]) -> None:
    inner = folder / ".inner"
    inner.mkdir()
    fill(inner)
    paths = sorted(inner.iterdir())
    if not paths:
        raise RecipeError("The recipe wrote nothing into the folder that it was given; see Recipe.save.")
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise RecipeError(f"The recipe wrote {path.name}, which is no file; it may write files alone.")
        if path.name in UNTAKEN or path.name.startswith((EXPORTED, ".")):
            raise RecipeError(f"The recipe wrote {path.name}, a name that is taken; choose another one.")
        os.replace(path, folder / f"{prefix}{path.name}")
    inner.rmdir()
