"""The composition root: what a stop or an error leaves, what a resume insists on, what a wheel holds."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.errors import DataError, RunFolderError
from budgetsearch.core.events import Opened
from budgetsearch.engines.local import LocalEngine
from budgetsearch.machine.clock import RunClock, Timing
from budgetsearch.run import process as stopping
from budgetsearch.run import session as compose
from budgetsearch.run.configuration import load_settings
from budgetsearch.run.models import check_same_inputs
from budgetsearch.run.preflight import anchored
from budgetsearch.run.settings import Settings
from budgetsearch.storage.lock import RunLock
from budgetsearch.storage.runfolder import RunFolder
from tests.support.processes import check_gone


@pytest.fixture
def settings(tiny_model: Path, rows_file: Path, tmp_path: Path) -> Settings:
    """A run that would work."""
    given = {"model": str(tiny_model), "data": str(rows_file), "gpu": "cpu", "out": tmp_path / "out"}
    return load_settings(given, cwd=tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError("a row is broken")])
@pytest.mark.parametrize("existed", [True, False])
def test_a_run_that_never_began_leaves_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, error: BaseException, existed: bool
) -> None:
    """Ctrl-C or a bad row during the preparation: the folder is as it was before."""
    folder = RunFolder(Path(str(settings.out)))
    if existed:
        folder.path.mkdir()

    def prepare(*arguments: Any, **options: Any) -> None:
        folder.worker_log.touch()
        folder.prepare({}, "mine")
        raise error

    monkeypatch.setattr(compose, "search", prepare)
    with pytest.raises((KeyboardInterrupt, DataError)):
        compose.start(settings, compose.Caller())
    assert existed == folder.path.exists()
    assert not existed or not list(folder.path.iterdir())


def test_what_a_killed_preparation_left_does_not_block_the_next_run(tmp_path: Path) -> None:
    """kill -9 before the first event leaves a lock and a log: the folder may be used again."""
    folder = RunFolder(tmp_path / "out")
    folder.path.mkdir()
    RunLock(folder.path).release()
    folder.worker_log.touch()
    folder.prepare({}, "mine")
    folder.check_free()
    assert not folder.in_use()


def test_the_first_signal_is_a_request_only_once_the_driver_runs() -> None:
    """While preparing it stops at once; then the first one asks and the second one stops."""
    signals = stopping.Signals()
    with pytest.raises(stopping.Stopped, match="SIGUSR1"):
        signals.handle(signal.SIGUSR1, None)
    assert signals.gently() == ""
    signals.handle(signal.SIGTERM, None)
    assert signals.gently() == "SIGTERM"
    with pytest.raises(stopping.Stopped, match="SIGTERM"):
        signals.handle(signal.SIGINT, None)


@pytest.mark.parametrize(("what", "key"), [("model", "sha256"), ("data", "prepared")])
def test_a_run_goes_on_only_with_what_it_began_with(what: str, key: str) -> None:
    """Another model or other rows would make its trials incomparable."""
    facts = {"model": {"sha256": "a"}, "data": {"prepared": "b"}}
    check_same_inputs(Opened(1.0, {}, facts), facts)
    with pytest.raises(RunFolderError, match=f"The {what} has changed"):
        check_same_inputs(Opened(1.0, {}, facts), {**facts, what: {key: "other"}})


def test_settings_are_anchored_to_absolute_paths(
    settings: Settings, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume from another folder finds model, data and study; names that ship stay names."""
    monkeypatch.chdir(rows_file.parent)
    relative = settings.model_copy(
        update={"data": rows_file.name, "storage": "sqlite:///study.db", "shared": "ckpt"}
    )
    found = anchored(relative)
    assert found.data == str(rows_file)
    assert found.storage == f"sqlite:///{rows_file.parent / 'study.db'}"
    assert found.space == "lora_small"
    assert settings.out is not None
    assert str(found.shared).startswith(f"{rows_file.parent / 'ckpt' / settings.out.name}-")


def test_the_wheel_holds_the_search_spaces_and_the_type_marker(tmp_path: Path) -> None:
    """What an installed package needs beside its modules."""
    root = Path(__file__).parents[2]
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, str(root)], check=True, timeout=300, capture_output=True)
    (wheel,) = tmp_path.glob("budgetsearch-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"budgetsearch/search_spaces/{path.name}" for path in (root / "search_spaces").glob("*.yaml")}
    assert shipped
    assert shipped | {"budgetsearch/py.typed", "budgetsearch/tools/compare/compare.html.j2"} <= names


def test_a_process_that_hangs_is_ended_when_its_time_is_over(tmp_path: Path) -> None:
    """A download that never comes back: the process ends before its time, and its worker with it."""
    code = f"""
import subprocess, sys, time
from pathlib import Path
from budgetsearch.machine.clock import RunClock, Timing
from budgetsearch.engines.local import LocalEngine
from budgetsearch.run import process as stopping
from budgetsearch.run.models import check_same_inputs
from budgetsearch.storage.runfolder import RunFolder

engine = LocalEngine(None, Path({str(tmp_path / "worker.log")!r}))
engine._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], text=True)
print(engine._process.pid, flush=True)
with stopping.ended_in_time(
    Timing(RunClock(), 2.0), engine, RunFolder(Path({str(tmp_path)!r})), lambda: True
):
    time.sleep(600)
"""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == stopping.EXIT_OVERDUE
    assert time.monotonic() - started < 30
    assert f"budgetsearch status {tmp_path}" in done.stderr
    check_gone(int(done.stdout), "the worker outlived its process")


def test_a_budget_that_is_too_small_gets_the_time_to_be_refused(tmp_path: Path) -> None:
    """Before there is a plan the last resort waits: the user is to hear what would do."""
    engine = LocalEngine(None, tmp_path / "worker.log")
    ended: list[int] = []
    engine.end = lambda: ended.append(1)  # type: ignore[method-assign]
    with stopping.ended_in_time(Timing(RunClock(), 0.1), engine, RunFolder(tmp_path), lambda: False):
        time.sleep(1.0)  # the thread would have looked twice
    assert not ended


def test_work_that_ends_in_time_is_left_alone(tmp_path: Path) -> None:
    """The last resort goes when it is not needed any more."""
    engine = LocalEngine(None, tmp_path / "worker.log")
    with stopping.ended_in_time(Timing(RunClock(), 60.0), engine, RunFolder(tmp_path), lambda: True):
        assert "last-resort" in {thread.name for thread in threading.enumerate()}
    deadline = time.monotonic() + 10
    while "last-resort" in {thread.name for thread in threading.enumerate()}:
        assert time.monotonic() < deadline
