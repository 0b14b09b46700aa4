"""A look at the base model's modules before its weights are read, and what cannot be had of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from budgetsearch.core.errors import ModelError
from budgetsearch.machine.anatomy import QUANTIZATIONS

if TYPE_CHECKING:
    from budgetsearch.training.anatomy import Anatomy


@cache
def examined(path: Path, targets: str, trust_remote_code: bool) -> Anatomy:
    """The anatomy of the base model in a folder; found once in a process, for it takes a second or two.

    Raises:
        ModelError: it cannot be trained here at all.
        SettingsError: ``targets`` names no layer of it.
    """
    from budgetsearch.training.anatomy import examine
    from budgetsearch.training.quiet import quiet

    with quiet():
        return examine(path, targets=targets, trust_remote_code=trust_remote_code)


def check_possible(model: str, quantizations: Sequence[str], refused: Mapping[str, str]) -> None:
    """Insist that the base model can be had under one of these quantizations.

    Raises:
        ModelError: under none; it says what works.
    """
    if not quantizations or not refused.keys() >= set(quantizations):
        return
    possible = [name for name in QUANTIZATIONS if name not in refused]
    why = "; ".join(dict.fromkeys(refused[name] for name in quantizations))
    remedy = f" Use a --space with {' or '.join(possible)}." if possible else ""
    raise ModelError(f"{model} cannot be had as {' or '.join(quantizations)}: {why}{remedy}")
