"""The Optuna study: a view of the ledger on a real SQLite file, reopened and caught up."""

from __future__ import annotations

import logging
from pathlib import Path

import optuna
import pytest

from budgetsearch.core.errors import SettingsError
from budgetsearch.core.events import Closed, Resumed
from budgetsearch.core.history.fold import fold
from budgetsearch.views.study import mirror
from budgetsearch.views.study.mirror import StudyMirror
from tests.support.factories import Story, params, tell_run, whole_run
from tests.support.studies import Watching, snapshot, study, url


@pytest.fixture
def followed(tmp_path: Path) -> Story:
    """A whole run that the mirror followed event by event."""
    story = Story.planned()
    mirror = StudyMirror(url(tmp_path), "run")
    mirror.catch_up(story.history)
    story.watchers.append(Watching(mirror))
    tell_run(story)
    return story


@pytest.mark.usefixtures("followed")
def test_every_configuration_becomes_a_trial_with_its_end(tmp_path: Path) -> None:
    """The full run is complete with its best loss, the dropped are pruned, the failed have failed."""
    trials = study(tmp_path).trials
    assert [t.state.name for t in trials] == ["PRUNED", "PRUNED", "PRUNED", "COMPLETE", "FAIL", "FAIL"]
    assert [t.value for t in trials] == [1.875, 1.75, 1.1, 0.9, None, None]
    assert trials[3].params == {
        "quantization": "fp32",
        "rank": 32,
        "learning_rate": pytest.approx(1.32e-3),
        "dropout": 0.0,
    }
    assert study(tmp_path).best_trial.number == 3


@pytest.mark.usefixtures("followed")
def test_rungs_are_intermediate_values(tmp_path: Path) -> None:
    """One value per rung at the rung's index, and the study says what each rung is."""
    found = study(tmp_path)
    assert found.trials[3].intermediate_values == {0: 1.0, 1: 1.0, 2: 0.9}
    assert found.trials[4].intermediate_values == {}
    assert found.user_attrs["rungs"][1] == {"rung": 1, "seconds": 30.0, "tokens": {"fp32": 3000, "nf4": 1500}}
    assert found.direction.name == "MINIMIZE"


@pytest.mark.usefixtures("followed")
def test_user_attributes_tell_the_rest(tmp_path: Path) -> None:
    """Rung, tokens, seconds, memory, status, origin and the complete configuration are there."""
    attrs = study(tmp_path).trials[3].user_attrs
    assert attrs == {
        "trial_id": 3,
        "origin": "prior",
        "params": {**params(32, attrs["params"]["learning_rate"])},
        "rung_tokens": [1000, 3000, 9000],
        "status": "done",
        "rung": 2,
        "tokens": 9000,
        "seconds": 3.0,
        "peak_bytes": 2**30,
        "loss by rung": "1.0000 at rung 0 (10 s), 1.0000 at rung 1 (30 s), 0.9000 at full run (90 s)",
    }


@pytest.mark.usefixtures("followed")
def test_a_trial_that_fits_nowhere_is_infeasible(tmp_path: Path) -> None:
    """A constraint is broken, by name for Optuna and in the list that the dashboard reads."""
    trial = study(tmp_path).trials[5]
    assert trial.constraints == {"memory": 1.0, "0": 1.0}
    assert trial.user_attrs["status"] == "infeasible"


def test_catching_up_late_gives_the_same_study(tmp_path: Path, followed: Story) -> None:
    """A mirror that sees only the end writes what one wrote that saw every event."""
    (tmp_path / "late").mkdir()
    StudyMirror(url(tmp_path / "late"), "run").catch_up(followed.history)
    assert snapshot(tmp_path / "late") == snapshot(tmp_path)


def test_catching_up_is_idempotent(tmp_path: Path, followed: Story) -> None:
    """A reopened study that is level stays as it is."""
    before = snapshot(tmp_path)
    mirror = StudyMirror(url(tmp_path), "run")
    mirror.catch_up(followed.history)
    mirror.catch_up(followed.history)
    assert snapshot(tmp_path) == before


def test_a_crash_after_any_event_is_caught_up(tmp_path: Path) -> None:
    """Wherever the first mirror stopped, the next one ends with the same study."""
    story = whole_run()
    StudyMirror(url(tmp_path), "run").catch_up(story.history)
    expected = snapshot(tmp_path)
    for number, cut in enumerate(range(8, len(story.entries), 9)):
        folder = tmp_path / str(number)
        folder.mkdir()
        StudyMirror(url(folder), "run").catch_up(fold(story.entries[:cut]))
        StudyMirror(url(folder), "run").catch_up(story.history)
        assert snapshot(folder) == expected


def test_trials_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    """Whatever other programs put into the study, the ledger's trials are there once."""
    story = Story.planned()
    story.trial()
    StudyMirror(url(tmp_path), "run").catch_up(Story.planned().history)
    study(tmp_path).enqueue_trial({"rank": 8})
    study(tmp_path).ask()
    study(tmp_path).enqueue_trial({"rank": 4})
    for _ in range(2):
        StudyMirror(url(tmp_path), "run").catch_up(story.history)
    trials = study(tmp_path).trials
    assert [None, None, 0] == [trial.user_attrs.get("trial_id") for trial in trials]
    assert ["RUNNING", "WAITING", "RUNNING"] == [trial.state.name for trial in trials]


def test_an_interrupted_run_keeps_its_trials_open(tmp_path: Path) -> None:
    """Only a finished run has final states; one that was interrupted can go on."""
    story = Story.planned()
    story.watchers.append(Watching(StudyMirror(url(tmp_path), "run")))
    story.train(story.trial(), 1.5)
    story.add(Closed("interrupted", "stopped on request"))
    assert [(t.state.name, t.user_attrs["status"]) for t in study(tmp_path).trials] == [("RUNNING", "paused")]
    story.add(Resumed())
    story.train(0, 1.2, 2, "full run starts")
    story.finish()
    assert [(t.state.name, t.value) for t in study(tmp_path).trials] == [("COMPLETE", 1.2)]


def test_without_a_full_run_the_exported_trial_is_complete(tmp_path: Path) -> None:
    """A study always has a best trial when there is an adapter."""
    story = Story.planned()
    story.train(story.trial(params(4)), 1.5)
    story.train(story.trial(params(8)), 1.4)
    story.finish()
    StudyMirror(url(tmp_path), "run").catch_up(story.history)
    assert [t.state.name for t in study(tmp_path).trials] == ["PRUNED", "COMPLETE"]


def test_a_failing_storage_warns_once_and_is_caught_up_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the folder is missing the run goes on; when it is back the study is complete."""
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.0)
    folder = tmp_path / "gone"
    story = Story.planned()
    with caplog.at_level(logging.WARNING, "budgetsearch.study"):
        story.watchers.append(Watching(StudyMirror(url(folder), "run")))
        story.train(story.trial(), 1.5)
        assert len(caplog.records) == 1
    folder.mkdir()
    story.train(story.trial(params(4)), 1.4)
    assert [t.value for t in study(folder).trials] == [None, None]
    assert [t.intermediate_values for t in study(folder).trials] == [{0: 1.5}, {0: 1.4}]


@pytest.mark.parametrize("bad", ["study.sqlite", "nosuchdb://host/name"])
def test_a_url_that_is_none_is_refused(bad: str) -> None:
    """A storage that no database can stand behind is the caller's error."""
    with pytest.raises(SettingsError, match="--storage"):
        StudyMirror(bad, "run")


def test_optuna_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Optuna's own log lines stay out of the terminal, and its verbosity is put back."""
    before = optuna.logging.get_verbosity()
    StudyMirror(url(tmp_path), "run").catch_up(whole_run().history)
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == before
