"""The lock of a run folder: who has it, since when, and what is left behind by whom."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetsearch import api
from budgetsearch.core.errors import RunFolderError
from budgetsearch.run import session
from budgetsearch.run.result import Result
from budgetsearch.storage import lock as owner
from budgetsearch.storage.lock import MAX_SECONDS, QUIET_SECONDS, Owner, RunLock, lock_in_time, read_owner
from budgetsearch.storage.runfolder import RunFolder

HOLDER = """
import sys
from pathlib import Path
from budgetsearch.storage.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.sign()
print("ready", flush=True)
input()
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """An empty run folder."""
    return RunFolder(tmp_path)


@pytest.fixture
def holder(folder: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.path), "--storage", "mysql://me:s3cret@db/x"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def dead_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave(folder: RunFolder, who: Owner) -> None:
    """A lock file that nobody holds any more."""
    (folder.path / "lock").write_text(who.to_json(), encoding="utf-8")


def elsewhere() -> Owner:
    """A process of another machine."""
    return replace(Owner.this_process(), host="node7", boot="another")


def age(folder: RunFolder, seconds: float) -> None:
    """Let everything in the folder have been written so long ago."""
    then = time.time() - seconds
    for path in folder.path.iterdir():
        os.utime(path, (then, then))


def test_a_held_lock_names_process_host_command_and_time(
    folder: RunFolder, holder: subprocess.Popen[str]
) -> None:
    """All that is needed to find the process, and what to do; no password of its command."""
    with pytest.raises(RunFolderError) as caught:
        RunLock(folder.path)
    message = str(caught.value)
    assert f"in use by process {holder.pid} on {socket.gethostname()} (" in message
    assert "--storage" in message
    assert "s3cret" not in message
    assert f"since {time.strftime('%Y-%m-%d')}" in message
    assert "Ctrl-C" in message


def test_the_lock_of_a_process_that_was_killed_is_taken_and_said(
    folder: RunFolder, holder: subprocess.Popen[str]
) -> None:
    """The kernel let go of it; the record says whose it was."""
    holder.kill()
    holder.wait()
    lock = RunLock(folder.path)
    assert lock.left_behind is not None
    assert holder.pid == lock.left_behind.pid
    assert not lock.left_behind.lives()
    lock.release()


def test_a_lock_that_was_let_go_of_names_nobody(folder: RunFolder) -> None:
    """After a clean end there is nothing to say."""
    lock = RunLock(folder.path)
    lock.sign()
    record = json.loads((folder.path / "lock").read_text(encoding="utf-8"))
    assert {"pid", "host", "boot", "started", "taken", "command"} == set(record)
    assert os.getpid() == record["pid"]
    lock.release()
    lock.release()
    again = RunLock(folder.path)
    assert again.left_behind is None
    again.release()


def test_looking_does_not_change_who_is_named(folder: RunFolder) -> None:
    """``status`` takes the lock for a moment; the record of a dead process stays."""
    leave(folder, replace(Owner.this_process(), pid=dead_pid()))
    before = (folder.path / "lock").read_bytes()
    assert not folder.in_use()
    assert before == (folder.path / "lock").read_bytes()


@given(
    st.text()
    | st.from_type(dict).map(str)
    | st.sampled_from(["{}", "[]", '{"pid": "x"}', "4711", "-3", "1e999"])
)
def test_whatever_stands_in_a_lock_file_is_read(content: str) -> None:
    """It names somebody, or nobody; it is never an error."""
    found = read_owner(content)
    assert found is None or found.pid > 0


def test_a_number_that_was_given_again_is_another_process() -> None:
    """What counts is when the process began."""
    mine = Owner.this_process()
    assert mine.lives()
    assert not replace(mine, started=mine.started - 1000).lives()
    assert not replace(mine, pid=dead_pid()).lives()


def test_a_worker_that_outlives_its_driver_is_said_to_end_soon(folder: RunFolder) -> None:
    """The record names the dead driver, the lock is still held."""
    leave(folder, replace(Owner.this_process(), pid=dead_pid()))
    with (folder.path / "lock").open() as worker:
        fcntl.flock(worker, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match="its worker has not yet; try again in a moment"):
            RunLock(folder.path)


def full(*arguments: object) -> int:
    """A disk without room."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_the_lock_is_said_and_leaves_it_free(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where, why, what to do; and nobody is kept out afterwards."""
    lock = RunLock(folder.path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunFolderError, match=r"cannot be written \(No space left on device\): make room"):
        lock.sign()
    monkeypatch.undo()
    again = RunLock(folder.path)
    assert again.left_behind is None
    again.release()


def test_settings_and_versions_are_whole_or_as_before(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up while they are written: the old ones stand, and the next run is not kept out."""
    folder.prepare({"seed": 1}, "mine")
    before = {path: path.read_bytes() for path in (folder.settings, folder.versions)}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match="make room"):
        folder.prepare({"seed": 2}, "mine")
    assert before == {path: path.read_bytes() for path in before}
    monkeypatch.undo()
    RunLock(folder.path).release()
    folder.check_free()


# ---------------------------------------------------------------------- other machines


def test_a_fresh_lock_of_another_machine_is_not_taken(folder: RunFolder) -> None:
    """Its kernel's locks may not be seen here: while the folder is written somebody may be at work."""
    leave(folder, elsewhere())
    age(folder, QUIET_SECONDS + 60)
    folder.ledger.touch()
    with pytest.raises(RunFolderError) as caught:
        RunLock(folder.path)
    assert "on node7" in str(caught.value)
    assert "another machine" in str(caught.value)
    assert f"remove {folder.path / 'lock'}" in str(caught.value)
    assert {"lock", "ledger.sqlite"} == {path.name for path in folder.path.iterdir()}


def test_a_lock_of_another_machine_is_taken_once_its_run_is_quiet(folder: RunFolder) -> None:
    """A job that a scheduler starts again on another node goes on."""
    leave(folder, elsewhere())
    folder.ledger.touch()
    age(folder, QUIET_SECONDS + 60)
    lock = RunLock(folder.path)
    assert lock.left_behind is not None
    assert lock.left_behind.host == "node7"
    lock.release()


@pytest.fixture
def passing(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass where somebody sleeps."""
    began, slept = time.time(), [0.0]
    monkeypatch.setattr(owner, "_server_time", lambda folder: began + sum(slept))
    return slept


def test_a_requeued_job_waits_until_the_killed_one_s_lock_is_old_enough(
    folder: RunFolder, passing: list[float]
) -> None:
    """No longer than that, and it is said once."""
    leave(folder, elsewhere())
    folder.ledger.touch()
    age(folder, 30.0)
    said: list[str] = []
    lock_in_time(folder.path, said.append, passing.append).release()
    assert sum(passing) == pytest.approx(QUIET_SECONDS - 30.0, abs=2.0)
    assert len(said) == 1
    assert "on node7" in said[0]


def test_run_resume_auto_is_the_patient_one(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that starts a job again does not read what it would have to wait for."""
    folder.ledger.touch()
    given: dict[str, object] = {}

    def resume(*arguments: object, **more: object) -> Result:
        given.update(more)
        return Result("finished", "", folder.path, None, None, None, folder.ledger, 0.0, 0.0)

    monkeypatch.setattr(session, "resume", resume)
    api.run(out=folder.path, resume="auto")
    assert given["patient"] is True


def test_a_requeued_job_gives_way_to_one_that_goes_on_writing(
    folder: RunFolder, passing: list[float]
) -> None:
    """After a bounded time; and at once to a process of this machine."""
    leave(folder, elsewhere())
    began = time.time()

    def sleep(seconds: float) -> None:
        passing.append(seconds)
        now = began + sum(passing)
        os.utime(folder.path / "lock", (now, now))

    with pytest.raises(RunFolderError, match="another machine"):
        lock_in_time(folder.path, lambda line: None, sleep)
    assert MAX_SECONDS <= sum(passing) < MAX_SECONDS + 10
    mine = Owner.this_process()
    leave(folder, mine)
    with (folder.path / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match=f"in use by process {mine.pid}"):
            lock_in_time(
                folder.path, print, lambda seconds: pytest.fail("nobody waits for a process that lives")
            )


def test_another_container_of_this_machine_is_no_other_machine(folder: RunFolder) -> None:
    """It has another host name and the same kernel, whose lock can be trusted at once."""
    leave(folder, replace(Owner.this_process(), host="c0ffee", pid=dead_pid()))
    RunLock(folder.path).release()


# ------------------------------------------------------------- a file system without locks


@pytest.fixture
def lockless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows no locks."""

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize(
    ("who", "free"),
    [
        (Owner.this_process, False),
        (elsewhere, False),
        (lambda: replace(Owner.this_process(), pid=dead_pid()), True),
        (lambda: replace(Owner.this_process(), started=1.0), True),
    ],
)
@pytest.mark.usefixtures("lockless")
def test_without_locks_the_record_decides(folder: RunFolder, who: Callable[[], Owner], free: bool) -> None:
    """A process of this machine can be looked up; of another one nothing is known, so it has the run."""
    leave(folder, who())
    age(folder, QUIET_SECONDS + 60)
    if free:
        RunLock(folder.path).release()
    else:
        with pytest.raises(RunFolderError, match="If it has ended, remove"):
            RunLock(folder.path)
