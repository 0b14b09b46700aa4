"""Runs on disks that cannot be written: read, reported, compared and shown, and never taken for going."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from budgetsearch import api
from budgetsearch.cli import app
from budgetsearch.core.errors import LedgerError, RunFolderError
from budgetsearch.core.events import Noticed
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.run.manifest_schema import read
from budgetsearch.storage import lock as owner
from budgetsearch.storage.ledger import Ledger, read_entries, survey
from budgetsearch.storage.lock import QUIET_SECONDS, Owner, RunLock
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.dashboard import View
from tests.support.comparable import write_run

KEPT = {"done": ("",), "killed": ("", "-wal", "-shm"), "killed, its index gone": ("", "-wal")}
"""What of the database was copied: SQLite removes its log and the log's index when the last one closes it."""


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """A read-only disk with a finished run, and two whose processes were killed in mid-run."""
    place = Path(tempfile.mkdtemp(prefix="budgetsearch-"))
    write_run(place / "there" / "done")
    for name in list(KEPT)[1:]:
        run = write_run(place / "going" / name, finished=False)
        going = Ledger(run / "ledger.sqlite")
        going.append(Noticed("only in the log"), VirtualClock())
        (place / "there" / name).mkdir()
        for end in KEPT[name]:
            shutil.copyfile(f"{run}/ledger.sqlite{end}", place / "there" / name / f"ledger.sqlite{end}")
        shutil.copyfile(run / "ledger.jsonl", place / "there" / name / "ledger.jsonl")
        going.close()
    for run in (place / "there").iterdir():
        gone = Owner(4_000_000, os.uname().nodename, "", 1.0, 1.0, "budgetsearch run")
        (run / "lock").write_text("" if run.name == "done" else gone.to_json(), encoding="utf-8")
    view = place / "view"
    view.mkdir()
    mount = ["mount", "--bind", str(place / "there"), str(view)]
    again = ["mount", "-o", "remount,bind,ro", str(view)]
    if any(subprocess.run(c, capture_output=True, check=False).returncode for c in (mount, again)):
        subprocess.run(["umount", "-l", str(view)], capture_output=True, check=False)
        shutil.rmtree(place)
        pytest.skip("nothing can be mounted read-only here")
    yield view
    subprocess.run(["umount", "-l", str(view)], check=False)
    shutil.rmtree(place)


@pytest.mark.parametrize("name", KEPT)
def test_a_ledger_on_a_read_only_disk_is_read_whole(
    disk: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With its log and without, and nothing is called damaged."""
    path = disk / name / "ledger.sqlite"
    assert "" == survey(path).problem
    entries = list(read_entries(path))
    assert (name == "done") == (type(entries[-1].event).__name__ == "Closed")
    if name != "done":
        assert entries[-1].event == Noticed("only in the log")
    assert list(read_entries(path, after=3)) == entries[3:]
    assert "" == caplog.text
    with pytest.raises(LedgerError):
        Ledger(path)


@pytest.mark.parametrize("name", KEPT)
def test_no_run_there_is_taken_for_going(disk: Path, name: str) -> None:
    """That its lock cannot be taken says nothing: its owner has ended."""
    assert not RunFolder(disk / name).in_use()
    assert ("finished" if name == "done" else "stopped") == api.status(disk / name)["phase"]


def test_a_run_there_is_reported_compared_and_shown(disk: Path, tmp_path: Path) -> None:
    """The reports go elsewhere; without a folder for them one error names the option."""
    runner = CliRunner()
    refused = runner.invoke(app, ["report", str(disk / "done")])
    assert (2, True) == (refused.exit_code, "--out" in refused.output)
    out = tmp_path / "reports" / "mine"
    written = runner.invoke(app, ["report", str(disk / "done"), "--out", str(out)])
    assert 0 == written.exit_code, written.output
    assert {"report.md", "report.json", "report.html"} == {path.name for path in out.iterdir()}
    assert "stopped" in api.report(disk / "killed", out=tmp_path).markdown.read_text(encoding="utf-8")
    found = api.compare([disk / "done", disk / "killed"])
    assert ["done", "killed"] == [run.name for run in found.runs]
    assert 2 == len(View([RunFolder(disk / name) for name in ("done", "killed")]).storage.get_all_studies())
    with pytest.raises(RunFolderError, match="Read-only file system"):
        RunLock(disk / "done")


def test_verify_looks_for_the_manifest_of_a_stopped_run(disk: Path) -> None:
    """It does not say that the run is still going."""
    with pytest.raises(Exception, match="manifest") as caught:
        read(disk / "killed")
    assert "still going" not in str(caught.value)


# --------------------------------------------------------------------------- the lock


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder whose ledger was written just now."""
    (tmp_path / "ledger.jsonl").touch()
    return RunFolder(tmp_path)


def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock file may not be opened by us."""
    real = os.open

    def refuse(path: Path, *args: int) -> int:
        if str(path).endswith("lock"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize(("age", "expected"), [(0.0, True), (QUIET_SECONDS + 5, False)])
def test_where_the_lock_may_not_be_looked_at_the_age_of_the_ledger_tells(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, age: float, expected: bool
) -> None:
    """A job writes every five seconds."""
    (folder.path / "lock").touch()
    then = (folder.path / "ledger.jsonl").stat().st_mtime - age
    os.utime(folder.path / "ledger.jsonl", (then, then))
    unreadable(monkeypatch)
    assert expected == folder.in_use()


def lockless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks."""

    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


def mine() -> Owner:
    """A process that lives."""
    return Owner.this_process()


def dead() -> Owner:
    """One whose number was given again."""
    return Owner(os.getpid(), os.uname().nodename, mine().boot, 1.0, 1.0, "")


def elsewhere() -> Owner:
    """One of another machine."""
    return Owner(1, "another", "another", 1.0, 1.0, "")


@pytest.mark.parametrize(
    ("who", "age", "expected"),
    [(mine, 900, True), (dead, 0, False), (elsewhere, 0, True), (elsewhere, QUIET_SECONDS + 5, False)],
)
def test_where_no_lock_tells_the_record_and_the_last_sign_of_life_do(
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    who: Callable[[], Owner],
    age: float,
    expected: bool,
) -> None:
    """By number and start on this machine; by the age of what it wrote on another one."""
    lock = folder.path / "lock"
    lock.write_text(who().to_json(), encoding="utf-8")
    then = lock.stat().st_mtime - age
    for path in (lock, folder.path / "ledger.jsonl"):
        os.utime(path, (then, then))
    lockless(monkeypatch)
    assert expected == owner.held(lock, folder.path)


def test_a_lock_that_is_held_is_seen_without_write_permission(folder: RunFolder) -> None:
    """Whoever looks opens it for reading only, and two that look at once do not see each other."""
    lock = RunLock(folder.path)
    assert folder.in_use()
    lock.release()
    with (folder.path / "lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert not folder.in_use()
    assert not folder.in_use()
