"""Signatures and docstrings made from the settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar, get_type_hints

from budgetsearch.run.settings import RunSettings, Settings, settings_help

P = ParamSpec("P")
T = TypeVar("T")


def explained(function: Callable[P, T]) -> Callable[P, T]:
    """Let the help of a function with ``**settings`` name each of them, as its signature does."""
    own = inspect.signature(function)
    kinds = get_type_hints(RunSettings)
    settings = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kinds[name])
        for name in Settings.model_fields
    ]
    known = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = own.replace(parameters=[*known, *settings])  # type: ignore[attr-defined]
    function.__doc__ = f"{inspect.getdoc(function)}\n\nSettings:\n{settings_help()}"
    return function
