"""Scalars for TensorBoard and its like."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from budgetsearch.core.errors import SettingsError
from budgetsearch.core.events import Opened, Planned
from budgetsearch.views import loggers
from budgetsearch.views.loggers import ScalarLogger, logger
from tests.support.factories import FACTS, Story, plan, tell_run

LONG = 60.0
"""Seconds that nothing here takes, however busy the machine is."""


def told(watcher: ScalarLogger, out: Path, closing: float = LONG) -> Story:
    """A whole run that a logger saw, and waited for so long."""
    story = Story(watchers=[watcher])
    settings = {"out": str(out), "storage": "postgresql://me:hush@db/x"}
    story.add(Opened(720.0, settings, {**FACTS, "study": "mine"}), Planned(plan()))
    tell_run(story)
    watcher.close(closing)
    return story


def test_tensorboard_finds_the_losses_of_every_trial(tmp_path: Path) -> None:
    """Read back by TensorBoard itself: the best loss and each trial's, at the second they were measured."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = told(logger("tensorboard"), out=tmp_path).history
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    measured = {f"validation_loss/trial{t.trial_id}" for t in history.trials.values() if t.losses}
    assert measured
    assert measured | {"best_loss", "score/adapter_loss"} <= names
    best = history.incumbent
    assert best is not None
    assert best.best_loss == pytest.approx(events.Scalars("best_loss")[-1].value)
    assert events.Scalars("best_loss")[-1].step <= history.spent


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_settings_scalars_and_an_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of the study's name, without a password, and steps that never go back."""
    calls: list[tuple[str, Any]] = []
    package = SimpleNamespace(
        init=lambda **given: calls.append(("init", given)),
        log=lambda values, step: calls.append(("log", step)),
        finish=lambda: calls.append(("finish", None)),
    )
    monkeypatch.setitem(sys.modules, name, package)
    told(logger(name), out=tmp_path)
    assert ("init", "mine") == (calls[0][0], calls[0][1]["name"])
    assert "hush" not in str(calls)
    assert "***" in calls[0][1]["config"]["storage"]
    assert ("finish", None) == calls[-1]
    steps = [step for call, step in calls if call == "log"]
    assert len(steps) > 3
    assert sorted(steps) == steps


def test_an_unknown_logger_is_refused_with_those_that_there_are() -> None:
    """Before anything is touched."""
    with pytest.raises(SettingsError, match=r"--log tensorbord: unknown logger .*tensorboard"):
        logger("tensorbord")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(SettingsError, match="pip install trackio"):
        logger("trackio")


class Hung:
    """A sink whose server never answers."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def write(self, values: Any, step: int) -> None:
        """It never comes back."""
        self.released.wait(60)

    def close(self) -> None:
        """Never reached."""


def test_a_logger_that_hangs_holds_neither_the_run_nor_its_end_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it did not take is counted and said, with whose fault it is."""
    monkeypatch.setattr(loggers, "HELD", 3)
    hung = Hung()
    began = time.monotonic()
    told(ScalarLogger(lambda opened: hung, "wandb"), out=tmp_path, closing=0.1)
    assert time.monotonic() - began < 20
    (line,) = [record.getMessage() for record in caplog.records if "--log wandb" in record.getMessage()]
    assert "did not take the last" in line
    hung.released.set()


def test_a_logger_that_fails_is_said_and_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before its first value, as where nobody is logged in."""

    def refuse(opened: Opened) -> Any:
        raise ConnectionError("not logged in")

    told(ScalarLogger(refuse, "wandb"), out=tmp_path)
    assert "--log wandb failed" in caplog.text
