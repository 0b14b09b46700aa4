"""The Python API: a run as an object, callbacks, spaces as values, and names that stay what they are."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import budgetsearch as bs
from budgetsearch.api.callbacks import METHODS, watcher_of
from budgetsearch.core import errors
from budgetsearch.core.events import Entry, SegmentEnded
from budgetsearch.core.history.history import History
from budgetsearch.run.configuration import load_settings
from budgetsearch.run.settings import Settings
from tests.support.faults import fastrun
from tests.support.faults.kills import preload

SPACE = {
    "dimensions": {
        "quantization": {"kind": "constant", "value": "fp32"},
        "rank": {"kind": "choice", "values": [2, 4], "ordered": True},
        "learning_rate": {"kind": "float", "low": 1e-3, "high": 1e-2, "log": True},
    }
}


class StopsAtOnce:
    """Presses Ctrl-C after the first segment."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_segment_ended(self, entry: Entry, history: History) -> None:
        """Of the first one only."""
        self.seen.append(type(entry.event).__name__)
        if len(self.seen) == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> fastrun.Place:
    """A folder for fast runs."""
    preload()
    return fastrun.Place(tmp_path_factory.mktemp("api") / "place").make()


@pytest.fixture(scope="module")
def told(place: fastrun.Place) -> dict[str, Any]:
    """What a process tells that was stopped by Ctrl-C and went on with its run."""
    out, answer = place.path / "run", place.path / "answer.json"

    def work() -> None:
        os.environ["BUDGETSEARCH_CACHE"] = str(place.path / "cache")
        fastrun.install()
        stops, kinds = StopsAtOnce(), set()
        first = bs.run(**place.arguments(out, space=SPACE, max_trials=4), callbacks=[stops])
        second = first.resume(callbacks=[lambda entry, history: kinds.add(type(entry.event).__name__)])
        found = {"first": first.state, "second": second.state, "seen": stops.seen, "kinds": sorted(kinds)}
        answer.write_text(json.dumps({**found, "loss": second.best and second.best.loss}))

    assert 0 == fastrun.wait_for(fastrun.forked(work, place.log)), place.log.read_text()
    return {**json.loads(answer.read_text()), "out": out}


def test_ctrl_c_returns_a_run_that_can_be_resumed(told: dict[str, Any]) -> None:
    """``interrupted`` first, and ``finished`` with a best adapter after its resume."""
    assert ("interrupted", "finished") == (told["first"], told["second"])
    assert told["loss"] > 0


def test_callbacks_take_the_events_that_they_name_or_all(told: dict[str, Any]) -> None:
    """An object only those of its methods, a function every one."""
    assert {"SegmentEnded"} == set(told["seen"])
    assert {"Resumed", "SegmentStarted", "SegmentEnded", "Closed"} <= set(told["kinds"])


def test_a_space_of_a_mapping_is_written_down(told: dict[str, Any]) -> None:
    """In the ledger, the settings and the manifest, so that resume and reproduce need no file."""
    shown = json.loads((told["out"] / "settings.json").read_text())
    manifest = json.loads((told["out"] / "manifest.json").read_text())
    assert (SPACE, SPACE) == (shown["space"], manifest["settings"]["space"])
    assert {2, 4} >= {trial.params["rank"] for trial in bs.open(told["out"]).trials}


def test_an_opened_run_says_what_came_of_it(told: dict[str, Any]) -> None:
    """Printed in about ten lines; its trials as rows and as a table; its reports again."""
    pandas = pytest.importorskip("pandas")
    run = bs.open(told["out"])
    assert run.best is not None
    assert run.adapter_path == told["out"] / "adapter"
    lines = str(run).splitlines()
    assert 4 <= len(lines) <= 12
    assert "finished" in lines[0]
    assert f"adapter  {run.adapter_path}" in lines
    assert f"<pre>{lines[0].split()[0]}" in run._repr_html_()
    assert repr(run).startswith(f"<Run {told['out']}: finished, loss ")
    table = run.trials.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert [trial.trial_id for trial in run.trials] == list(table.index)
    assert run.best.loss == pytest.approx(table["loss"].min())
    assert {"rank", "learning_rate", "loss_at_0", "status"} <= set(table.columns)
    assert "finished" == run.status["phase"]
    assert run.report().html == told["out"] / "report.html"


def test_a_folder_without_a_run_cannot_be_opened(tmp_path: Path) -> None:
    """It says so, as every command does."""
    with pytest.raises(bs.RunFolderError, match="does not exist"):
        bs.open(tmp_path / "nothing")


def test_only_some_settings_can_change_on_the_way(tmp_path: Path) -> None:
    """Another seed would be another run."""
    with pytest.raises(bs.SettingsError, match="seed cannot be changed; it takes hours"):
        bs.resume(tmp_path, seed=1)  # type: ignore[call-arg]


def test_a_space_may_be_an_object(tmp_path: Path) -> None:
    """A ``Space`` is the mapping that it writes; a broken mapping is told early."""
    space = bs.Space.parse(SPACE, "mine")
    found = load_settings({"gpu": "cpu", "space": space}, cwd=tmp_path)
    assert space == bs.Space.parse(found.space)  # type: ignore[arg-type]
    written = Settings.model_validate(json.loads(json.dumps(found.model_dump(mode="json"))))
    assert found == written
    with pytest.raises(bs.SpaceError, match="unknown key"):
        load_settings({"gpu": "cpu", "space": {"dimensoins": {}}}, cwd=tmp_path)
    (tmp_path / "budgetsearch.yaml").write_text(yaml.safe_dump({"space": SPACE}), encoding="utf-8")
    assert SPACE == load_settings({"gpu": "cpu"}, cwd=tmp_path).space


@pytest.mark.parametrize("callback", [object(), type("Typo", (), {"on_segment_endet": print})()])
def test_what_is_no_callback_is_refused(callback: object) -> None:
    """Before anything is touched; a method of no event names the nearest."""
    with pytest.raises(bs.SettingsError, match="on_segment_ended"):
        bs.run(gpu="cpu", callbacks=[callback])


def test_every_event_has_a_method() -> None:
    """Its name in small letters."""
    assert SegmentEnded == METHODS["on_segment_ended"]
    assert {"on_opened", "on_closed", "on_checkpoint_lost"} <= set(METHODS)
    assert hasattr(watcher_of(print), "see")


def test_help_teaches_every_setting() -> None:
    """The signature has its name and type, the docstring its text and default."""
    for function in (bs.run, bs.plan, bs.doctor):
        signature, text = inspect.signature(function), inspect.getdoc(function) or ""
        for name in Settings.model_fields:
            assert name in signature.parameters
            assert f"    {name}: " in text


def test_every_error_can_be_caught_by_its_name() -> None:
    """What core/errors.py holds is exported."""
    raised = {
        name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)
    }
    assert raised <= set(bs.__all__)


def test_the_function_run_stays_one_whatever_is_imported() -> None:
    """There is a package of the same name behind it."""
    code = (
        "import budgetsearch.run.settings, budgetsearch as bs\n"
        "import budgetsearch.run.driver, budgetsearch.cli\n"
        "from budgetsearch.run import session\n"
        "assert callable(bs.run) and callable(bs.open) and session.start"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr


def test_a_run_without_trials_has_an_empty_table() -> None:
    """A run that has only begun is a table as well, with no line in it."""
    assert 0 == len(bs.Trials().to_pandas())
