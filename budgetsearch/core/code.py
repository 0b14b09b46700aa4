"""Where the code of a user's own is that workers run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RecipeCode:
    """Where the code of a training of the user's own is."""

    place: str
    """The absolute path of a Python file, or the name of an installed module."""
    name: str
    """Of the class in it."""
    sha256: str
    """Of the file."""
    params: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """The likeliest configuration, which the calibration measures."""
