"""The Optuna study of a run, as another program sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna


def url(path: Path) -> str:
    """The study's database."""
    return f"sqlite:///{path / 'study.sqlite'}"


def study(path: Path) -> Any:
    """The study as another program sees it."""
    return optuna.load_study(study_name="run", storage=url(path))


def snapshot(path: Path) -> list[tuple[Any, ...]]:
    """All that the study says of its trials, times excepted."""
    return [
        (t.number, t.state.name, t.params, t.values, t.intermediate_values, t.user_attrs, t.constraints)
        for t in study(path).trials
    ]
