"""Each fault by itself, done to real parts: processes that hang, files that tear, disks that are full."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from budgetsearch import api
from budgetsearch.cli import app
from budgetsearch.core.errors import LedgerError, RunFolderError
from budgetsearch.core.events import Charged, Entry, Exported, SegmentEnded, SegmentStarted
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.retention import needed_checkpoints
from budgetsearch.core.records import Segment
from budgetsearch.storage.database import SCHEMA
from budgetsearch.storage.ledger import read_entries, read_history
from budgetsearch.storage.lock import RunLock
from budgetsearch.storage.ownership import SIGN
from budgetsearch.storage.runfolder import RunFolder
from tests.support.faults import fastrun, killing
from tests.support.faults.killing import Shot
from tests.support.faults.kills import RESUMED, preload
from tests.support.faults.proofs import check_adapter, check_after_kill, check_end, check_loads

TRIALS = {"max_trials": 6}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fastrun.Place]:
    """A folder for fast runs that another user may read as well."""
    preload()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    folder.chmod(0o755)
    yield fastrun.Place(folder).make()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(place: fastrun.Place, request: pytest.FixtureRequest) -> Path:
    """The folder of a run of the test's own."""
    return place.path / "runs" / request.node.name.replace("[", "-").rstrip("]")


def statuses(run: Path, trial: int) -> list[str]:
    """How the segments of a trial ended."""
    return [
        result.status for _, result in read_history(run / "ledger.sqlite").results if result.trial_id == trial
    ]


# -------------------------------------------------------------------------- processes


def stopped(segment: Segment) -> None:
    """The whole worker process stands still."""
    if segment.trial_id == 1 and segment.attempt == 0:
        os.kill(os.getpid(), signal.SIGSTOP)


def asleep(segment: Segment) -> None:
    """The worker's main thread never comes back, but its inbox still reads."""
    while segment.trial_id == 1 and segment.attempt == 0:
        time.sleep(60)


@pytest.mark.parametrize("during", [stopped, asleep])
def test_a_worker_that_hangs_is_told_then_killed_and_its_segment_issued_again(
    place: fastrun.Place, run: Path, tmp_path: Path, during: Callable[[Segment], None]
) -> None:
    """Stopped by SIGSTOP, or stuck for good and deaf: the run ends in time and the trial goes on."""

    hanging = tmp_path / "hanging"

    def mark(segment: Segment) -> None:
        if segment.trial_id == 1 and segment.attempt == 0:
            hanging.write_text(str(os.getpid()), encoding="utf-8")
        during(segment)

    def patience(engine: fastrun.FastEngine) -> float:
        # Time is leapt over only while the worker really hangs: one that a loaded machine slows is awaited.
        process = engine._process
        hangs = process is not None and hanging.exists() and hanging.read_text() == str(process.pid)
        return 0.005 if hangs else 0.5

    def arrange() -> None:
        fastrun.BEHAVIOUR.during = mark
        fastrun.FastEngine.empty_poll = property(patience)  # type: ignore[assignment]

    assert place.whole_life(run, arrange, **TRIALS) == 0, place.log.read_text(encoding="utf-8")[-2000:]
    check_end(run)
    assert statuses(run, 1)[:2] == ["crashed", "ok"]


def test_a_forward_pass_that_sleeps_cannot_hold_the_device(place: fastrun.Place, tmp_path: Path) -> None:
    """Real training whose data never arrive: it does not hear the cancel, the kill ends it, and the next
    job has a new process."""

    def work() -> None:
        from budgetsearch.core.records import WorkerSetup
        from budgetsearch.core.reports import JobEnded
        from budgetsearch.engines.contract import await_end, segment, train_job
        from budgetsearch.training.data.tokens import Sources, prepare

        fastrun.install(workshop_too=False)
        fastrun.FastEngine.empty_poll = 0.5
        fastrun.ForkedProcess.before_work = staticmethod(lambda: _sleep_in_forward(tmp_path / "slept"))
        data = prepare(
            place.model.resolve(), Sources(str(place.path / "train.jsonl")), max_length=128,
            cache=place.path / "cache",
        )  # fmt: skip
        model = str(place.model)
        setup = WorkerSetup(model, model, str(data.folder), str(tmp_path), "cpu", "all-linear", 0)
        fastrun.LeapClock()
        engine = fastrun.FastEngine(setup, tmp_path / "worker.log")
        job = train_job(segment(0, 400))
        engine.submit(job)
        while not (tmp_path / "slept").exists():
            engine.poll(0.1)
        engine.cancel(job.job_id)
        assert not [r for r in engine.poll(1.0) if isinstance(r, JobEnded)]
        engine.kill(job.job_id)
        (result,) = await_end(engine, job.job_id).results
        assert result.status == "crashed"
        again = train_job(segment(0, 400))
        engine.submit(again)
        (result,) = await_end(engine, again.job_id).results
        assert result.status == "ok", result
        engine.close()

    log = tmp_path / "log"
    assert fastrun.wait_for(fastrun.forked(work, log)) == 0, log.read_text(encoding="utf-8")[-3000:]


def _sleep_in_forward(marker: Path) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    forward, passes = LlamaModel.forward, iter(range(10**9))

    def stuck(*arguments: object, **more: object) -> object:
        if next(passes) == 3 and not marker.exists():
            marker.touch()
            time.sleep(3600)
        return forward(*arguments, **more)

    LlamaModel.forward = stuck


def test_two_processes_on_one_run_the_second_is_refused_and_the_first_not_disturbed(
    place: fastrun.Place, run: Path, tmp_path: Path
) -> None:
    """``resume`` and ``run`` name the process that has it, exit with 2, and change nothing."""

    def arrange() -> None:
        # The first waits in its first segment until the others have been refused.
        def wait(segment: Segment) -> None:
            while not (tmp_path / "refused").exists():
                time.sleep(0.01)

        fastrun.BEHAVIOUR.during = wait
        fastrun.FastEngine.empty_poll = 0.5

    pid = place.live(run, arrange, **TRIALS)
    until = time.monotonic() + 30
    while not _began(run):
        assert time.monotonic() < until
        time.sleep(0.01)
    for arguments in (["resume", str(run)], ["run", "--out", str(run), "--gpu", "cpu", *_inputs(place)]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2, result.output
        assert f"in use by process {pid}" in result.output.replace("\n", " ")
    (tmp_path / "refused").touch()
    assert fastrun.wait_for(pid) == 0
    check_end(run)


def _inputs(place: fastrun.Place) -> list[str]:
    return ["--model", str(place.model), "--data", str(place.path / "train.jsonl")]


def _began(run: Path) -> bool:
    ledger = run / "ledger.sqlite"
    return ledger.is_file() and any(isinstance(e.event, SegmentStarted) for e in read_entries(ledger))


def test_the_lock_file_of_a_dead_process_locks_nobody_out(place: fastrun.Place, run: Path) -> None:
    """What counts is the kernel's lock, not a file with a number: also where the number lives again."""
    killed_run(place, run)
    (run / "lock").write_text(str(os.getpid()), encoding="utf-8")
    assert not RunFolder(run).in_use()
    assert place.whole_life(run, **TRIALS) == 0
    check_end(run)


def test_the_lock_is_held_until_the_worker_is_gone_too(tmp_path: Path) -> None:
    """A child that inherited the lock keeps the run in use after its parent has let go."""
    folder = RunFolder(tmp_path)
    lock = RunLock(folder.path)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.fd,))
    lock.release()
    assert folder.in_use()
    child.communicate(b"\n")
    assert not folder.in_use()


# -------------------------------------------------------------------------- checkpoints


def killed_run(place: fastrun.Place, run: Path, passes: int = 14) -> None:
    """A run whose driver was killed in the middle of its search."""

    def arrange() -> None:
        killing.arm(Shot("driver", "driver", RESUMED, passes))

    assert place.whole_life(run, arrange, **TRIALS) == -signal.SIGKILL
    until = time.monotonic() + 20
    while RunFolder(run).in_use():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_was_not_charged_when_the_driver_was_killed_is_charged_as_a_crash(
    place: fastrun.Place, run: Path
) -> None:
    """Killed between a segment's result and its seconds: they are charged once, by the process after it."""
    killed_run(place, run, passes=13)
    before = list(read_entries(run / "ledger.sqlite"))
    history = fold(before)
    gap = history.spent - sum(history.charged.values())
    assert isinstance(before[-1].event, SegmentEnded)
    assert gap > 1.0
    assert place.whole_life(run, **TRIALS) == 0
    check_end(run)
    charges = [e.event for e in read_entries(run / "ledger.sqlite") if isinstance(e.event, Charged)]
    after = charges[sum(isinstance(e.event, Charged) for e in before) :]
    assert after[0] == Charged("crash", pytest.approx(gap))


def cut(name: str) -> Callable[[Path], None]:
    """A power cut left half of a file in a folder that had its name already."""

    def tear(checkpoint: Path) -> None:
        file = checkpoint / name
        os.truncate(file, file.stat().st_size // 2)

    tear.__name__ = f"half-{name}"
    return tear


def emptied(checkpoint: Path) -> None:
    """All files are there and none has a byte."""
    for file in checkpoint.iterdir():
        os.truncate(file, 0)


DAMAGE = [
    shutil.rmtree,
    emptied,
    *map(cut, ("trainer.safetensors", "adapter_model.safetensors", "state.json")),
]


@pytest.mark.parametrize("damage", DAMAGE[:3], ids=lambda d: d.__name__)
def test_a_damaged_checkpoint_costs_its_trial_and_never_the_run(
    place: fastrun.Place, run: Path, damage: Callable[[Path], None]
) -> None:
    """Whatever became of the checkpoint of the trial that goes on next: the run ends with an adapter that
    loads, and no segment continues from what is broken."""
    killed_run(place, run)
    history = read_history(run / "ledger.sqlite")
    best = history.incumbent
    assert best is not None
    kept = (best.best_checkpoint, SIGN)
    torn = [p for p in (run / "checkpoints").iterdir() if p.name not in kept and p.name[0] != "."]
    for checkpoint in torn:
        damage(checkpoint)
    assert place.whole_life(run, **TRIALS) == 0, place.log.read_text(encoding="utf-8")[-2000:]
    history = read_history(run / "ledger.sqlite")
    assert history.closed is not None
    assert history.closed.state == "finished"
    check_adapter(run / "adapter")
    check_loads(run / "adapter")


@pytest.mark.parametrize("damage", DAMAGE[2:], ids=lambda d: d.__name__)
def test_damage_to_the_best_checkpoint_never_reaches_the_exported_adapter(
    place: fastrun.Place, run: Path, damage: Callable[[Path], None]
) -> None:
    """The adapter that stands is whole; a broken checkpoint does not take its place."""
    killed_run(place, run)
    history = read_history(run / "ledger.sqlite")
    best = history.incumbent
    assert best is not None
    check_adapter(run / "adapter")
    damage(run / "checkpoints" / str(best.best_checkpoint))
    code = place.whole_life(run, **TRIALS)
    assert code == 0, place.log.read_text(encoding="utf-8")[-2000:]
    check_adapter(run / "adapter")
    check_loads(run / "adapter")


# --------------------------------------------------------------------------- the disk


def test_a_full_disk_stops_the_run_with_a_message_and_room_lets_it_finish(
    place: fastrun.Place, request: pytest.FixtureRequest
) -> None:
    """A real file system without room: one error that says what to do, nothing torn; with room again the
    run goes on and ends as if nothing had been."""
    disk = place.path / "small"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(disk)], check=False))
    run = disk / "run"
    log = place.log
    before = log.stat().st_size if log.exists() else 0

    def unchecked() -> None:  # what is too small from the beginning would be refused
        from budgetsearch.run import preflight, session

        session.check_room = lambda *arguments: None
        preflight.check_run_folder = lambda out, need, *more: need.held

    codes = [place.whole_life(run, unchecked, **TRIALS)]
    said = log.read_bytes()[before:].decode()
    assert codes == [70], "it must have noticed"
    assert "BudgetsearchError" in said or "LedgerError" in said or "CheckpointError" in said, said[-3000:]
    seen = check_after_kill(run, [])
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    assert place.whole_life(run, **TRIALS) == 0, log.read_text(encoding="utf-8")[-3000:]
    check_end(run)
    assert list(read_entries(run / "ledger.sqlite"))[: len(seen)] == seen


def bound_by_permissions() -> None:
    """From now on file permissions bind this process, root's as well."""
    libc = ctypes.CDLL(None)
    version = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert libc.capset(version, (ctypes.c_uint32 * 6)()) == 0


@pytest.mark.parametrize("command", ["resume", "run"])
def test_a_folder_without_write_permission_is_refused_and_left_alone(
    place: fastrun.Place, run: Path, command: str
) -> None:
    """One error that names the folder, no traceback; whoever can write goes on."""
    killed_run(place, run)
    listing = sorted(p.name for p in run.iterdir())
    closed = place.path / f"closed-{command}"
    closed.mkdir()
    closed.chmod(0o555)
    (run / "lock").chmod(0o444)
    run.chmod(0o555)

    def work() -> None:
        bound_by_permissions()
        os.environ["BUDGETSEARCH_CACHE"] = str(place.path / "cache")
        target = (
            ["resume", str(run)]
            if command == "resume"
            else ["run", "--out", str(closed / "x"), *_inputs(place)]
        )
        if command == "resume":
            shown = CliRunner().invoke(app, ["status", str(run)])
            assert shown.exit_code == 0, shown.output
            assert "No process works on it" in shown.output
        result = CliRunner().invoke(app, target + (["--gpu", "cpu"] if command == "run" else []))
        print(result.output)
        if not isinstance(result.exception, SystemExit):
            raise AssertionError(result.output) from result.exception
        assert result.exit_code == 2
        assert result.output.count("error:") == 1

    log = place.path / f"bound-{command}.log"
    code = fastrun.wait_for(fastrun.forked(work, log))
    run.chmod(0o755)
    (run / "lock").chmod(0o644)
    assert code == 0, log.read_text(encoding="utf-8")[-3000:]
    assert "run" in log.read_text(encoding="utf-8")
    assert listing == sorted(p.name for p in run.iterdir())
    assert place.whole_life(run, **TRIALS) == 0
    check_end(run)


# ------------------------------------------------------------------------- the ledger


@pytest.mark.parametrize("share", [0.13, 0.61, 0.999])
def test_power_that_fails_while_the_ledger_writes_costs_the_last_events_alone(
    place: fastrun.Place, run: Path, share: float
) -> None:
    """The write-ahead log torn at any byte, and no backup: what was there before the tear is read, and the
    run goes on from there to its end."""
    killed_run(place, run)
    whole = list(read_entries(_copy(run, "whole") / "ledger.sqlite"))
    tear_log(run, share)
    (run / "ledger.jsonl").unlink()
    kept = list(read_entries(_copy(run, "torn") / "ledger.sqlite"))
    assert _anywhere(whole[: len(kept)]) == _anywhere(kept)
    if share > 0.3:
        assert kept
    assert place.whole_life(run, **TRIALS) == 0, place.log.read_text(encoding="utf-8")[-2000:]
    check_end(run, mended=True)


def _anywhere(entries: list[Entry]) -> list[Entry]:
    """The same, wherever the run's folder lies: that is where its adapter is."""
    return [
        replace(e, event=replace(e.event, path=Path(e.event.path).name))
        if isinstance(e.event, Exported)
        else e
        for e in entries
    ]


def test_what_a_torn_log_lost_comes_back_from_the_backup(place: fastrun.Place, run: Path) -> None:
    """The same tear with the backup beside it: only the event between whose two writes the process was killed
    is gone; the user is told, and the run goes on to its end."""
    killed_run(place, run)
    whole = list(read_entries(run / "ledger.sqlite"))
    tear_log(run, 0.5)
    before = place.log.stat().st_size if place.log.exists() else 0
    assert place.whole_life(run, **TRIALS) == 0, place.log.read_text(encoding="utf-8")[-2000:]
    check_end(run, mended=True)
    assert list(read_entries(run / "ledger.sqlite"))[: len(whole) - 1] == whole[:-1]
    assert (run / "ledger.damaged-1.sqlite").is_file()
    said = place.log.read_bytes()[before:].decode()
    assert "The ledger was damaged" in said
    assert "Nothing is known to be lost" in said


def test_events_that_both_files_lost_are_said_and_done_again(place: fastrun.Place, run: Path) -> None:
    """What the longest whole beginning tells is kept, and the run goes on from there to an end at which each
    second is charged once, each token trained once, and the study shows the ledger's trials."""
    killed_run(place, run, passes=40)
    whole = list(read_entries(run / "ledger.sqlite"))
    disk = {path.name for path in (run / "checkpoints").iterdir()}
    # Where a later event that is lost has already cost a checkpoint, its tokens would be trained again.
    kept = next(n for n in range(len(whole) // 3, len(whole)) if needed_checkpoints(fold(whole[:n])) <= disk)
    assert kept < len(whole) - 3
    with closing(sqlite3.connect(run / "ledger.sqlite")) as connection:
        connection.execute("DROP TRIGGER no_delete")
        connection.execute("DELETE FROM events WHERE seq > ?", (kept,))
        connection.execute(SCHEMA[2])
        connection.commit()
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    lines[kept] = lines[kept].replace(b"1", b"2")
    (run / "ledger.jsonl").write_bytes(b"".join(lines))
    with closing(sqlite3.connect(run / "study.sqlite")) as connection:
        connection.execute("CREATE TABLE stale (x)")
        connection.commit()
    before = place.log.stat().st_size
    assert place.whole_life(run, **TRIALS) == 0, place.log.read_text(encoding="utf-8")[-2000:]
    check_end(run, mended=True)
    with closing(sqlite3.connect(run / "study.sqlite")) as connection:
        assert ("stale",) not in connection.execute("SELECT name FROM sqlite_master").fetchall()
    assert list(read_entries(run / "ledger.sqlite"))[:kept] == whole[:kept]
    lost = f"At least {len(lines) - kept} later events are lost"
    assert lost in place.log.read_bytes()[before:].decode()


def tear_log(run: Path, share: float) -> None:
    """Cut the write-ahead log there."""
    log = run / "ledger.sqlite-wal"
    assert log.stat().st_size > 0
    os.truncate(log, int(share * log.stat().st_size))
    (run / "ledger.sqlite-shm").unlink(missing_ok=True)


def test_a_ledger_that_lost_everything_is_not_taken_for_a_run_that_never_began(
    place: fastrun.Place, run: Path
) -> None:
    """Where there are checkpoints or an adapter nobody is told to start again, and nothing is cleared."""
    killed_run(place, run)
    for file in (*run.glob("ledger.sqlite-*"), run / "ledger.jsonl"):
        file.unlink()
    os.truncate(run / "ledger.sqlite", 0)
    listing = sorted(run.rglob("*"))
    with pytest.raises(LedgerError, match="holds no event"):
        api.resume(run)
    with pytest.raises(RunFolderError, match="not empty"):
        RunFolder(run).check_free()
    (run / "ledger.sqlite").unlink()
    with pytest.raises(LedgerError, match="is gone"):
        api.resume(run)
    listing.remove(run / "ledger.sqlite")
    assert listing == sorted(path for path in run.rglob("*") if "ledger.sqlite-" not in path.name)


def _copy(run: Path, name: str) -> Path:
    target = run.parent / f"{run.name}-{name}"
    target.mkdir()
    for file in run.glob("ledger.sqlite*"):
        shutil.copyfile(file, target / file.name)
    return target


def test_what_a_killed_worker_did_is_not_recorded_as_done(place: fastrun.Place, run: Path) -> None:
    """A worker shot right after its checkpoint was renamed: the segment counts as lost and is done again."""

    def arrange() -> None:
        killing.arm(
            Shot(
                "worker",
                "worker",
                "worker: after rename in storage.files.fresh_folder for training.checkpoints.save",
                2,
            )
        )

    assert place.whole_life(run, arrange, **TRIALS) == 0, place.log.read_text(encoding="utf-8")[-2000:]
    check_end(run)
    ended = [e.event.result for e in read_entries(run / "ledger.sqlite") if isinstance(e.event, SegmentEnded)]
    lost = [result for result in ended if result.status == "crashed"]
    assert len(lost) == 1
    again = [
        r for r in ended if r.trial_id == lost[0].trial_id and r.status == "ok" and r.rung == lost[0].rung
    ]
    assert len(again) == 1
