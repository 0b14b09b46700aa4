"""The Optuna study of a run, as another program sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna

from budgetsearch.core.events import Closed, Entry
from budgetsearch.core.history.history import History
from budgetsearch.views.study.follower import SILENT
from budgetsearch.views.study.mirror import RETRY_SECONDS, StudyMirror


class Watching:
    """Brings a mirror level with every event, in the thread that tells of it."""

    def __init__(self, mirror: StudyMirror) -> None:
        self.mirror = mirror

    def see(self, entry: Entry, history: History) -> None:
        """As a follower does, whose last attempt is at once."""
        if isinstance(entry.event, Closed):
            self.mirror.hurry(RETRY_SECONDS)
        if not isinstance(entry.event, SILENT):
            self.mirror.catch_up(history)


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
