"""The ledger on a disk that loses and changes things: what is whole is found, and no loss is silent."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetsearch import api
from budgetsearch.core.errors import LedgerError
from budgetsearch.core.events import Charged, Closed, Entry, Heartbeat, Noticed, Opened
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.history import History
from budgetsearch.core.reports import Beat
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.storage import database
from budgetsearch.storage import ledger as ledger_module
from budgetsearch.storage.backup import backup_of
from budgetsearch.storage.database import SCHEMA
from budgetsearch.storage.ledger import Ledger, read_entries, survey
from budgetsearch.storage.repair import mend
from budgetsearch.storage.seals import FORMAT, GENESIS, Row, follows, longest, row_of, sealed
from tests.support.comparable import write_run
from tests.support.simulation import Killed, Killer, check_invariants, make_driver

EVENTS = 400
KILLED_AT = 60


def entries_of(path: Path) -> list[Entry]:
    """All that can be read."""
    return list(read_entries(path))


def fill(path: Path, events: int = EVENTS) -> list[Entry]:
    """A ledger whose process was killed: its write-ahead log is still there."""
    ledger, clock = Ledger(path), VirtualClock()
    entries = [ledger.append(Opened(720.0, {}), clock)]
    for number in range(1, events):
        clock.advance(1.0)
        if number % 2:
            entries.append(ledger.append(Charged("idle", 1.0, None), clock))
        else:
            entries.append(ledger.append(Heartbeat(Beat(number, 0, "train", number)), clock))
    copy_as_killed(path, ledger)
    return entries


def copy_as_killed(path: Path, ledger: Ledger) -> None:
    """Closing would put the log into the database: take the files as they are before."""
    aside = path.parent / "aside"
    aside.mkdir()
    for file in path.parent.glob("ledger.*"):
        shutil.copyfile(file, aside / file.name)
    ledger.close()
    for file in path.parent.glob("ledger.*"):
        file.unlink()
    for file in aside.iterdir():
        if not file.name.endswith("-shm"):
            file.rename(path.parent / file.name)
    shutil.rmtree(aside)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Entry]]:
    """The folder of such a ledger, and what it holds; for copying."""
    folder = tmp_path_factory.mktemp("killed")
    return folder, fill(folder / "ledger.sqlite")


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory, killed: tuple[Path, list[Entry]]) -> Path:
    """The same with everything in the one file, as after a clean end."""
    folder = tmp_path_factory.mktemp("closed") / "run"
    shutil.copytree(killed[0], folder)
    Ledger(folder / "ledger.sqlite").close()
    assert not (folder / "ledger.sqlite-wal").exists()
    return folder


def flip(path: Path, rng: random.Random, times: int = 1) -> None:
    """Change bytes anywhere in the file."""
    with path.open("r+b") as file:
        for _ in range(times):
            offset = rng.randrange(path.stat().st_size)
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ rng.randrange(1, 256)]))


# ------------------------------------------------------------------------------- the seals

BODIES = st.lists(st.text(), max_size=6)


def chain(bodies: list[str]) -> list[Row]:
    """Sealed rows."""
    rows: list[Row] = []
    for number, body in enumerate(bodies, 1):
        rows.append(sealed(rows[-1].seal if rows else GENESIS, number, number / 3, 1e9, "Noticed", body))
    return rows


@given(BODIES, st.data())
def test_a_row_that_was_changed_left_out_or_moved_ends_what_is_whole(
    bodies: list[str], data: st.DataObject
) -> None:
    """Up to it everything is kept, and nothing behind it."""
    rows = chain(bodies)
    assert rows == longest(rows)
    if not rows:
        return
    hit = data.draw(st.integers(0, len(rows) - 1))
    other = Row(
        rows[hit].seq, rows[hit].at, rows[hit].wall, rows[hit].kind, rows[hit].body + "!", rows[hit].seal
    )
    assert rows[:hit] == longest([*rows[:hit], other, *rows[hit + 1 :]])
    assert rows[:hit] == longest([*rows[:hit], *rows[hit + 1 :]])


@given(BODIES, st.data())
def test_each_copy_stands_in_where_the_other_is_damaged(bodies: list[str], data: st.DataObject) -> None:
    """Of two copies that lack different rows everything comes back."""
    rows = chain(bodies)
    missing = data.draw(st.sets(st.integers(0, max(0, len(rows) - 1))))
    one = [row for number, row in enumerate(rows) if number not in missing]
    other = [row for number, row in enumerate(rows) if number in missing]
    assert rows == longest(one, other)
    assert rows == longest(other, one)


@given(st.floats(0, 1e9), st.floats(0, 2e9), st.text())
def test_a_row_survives_both_files(
    tmp_path_factory: pytest.TempPathFactory, at: float, wall: float, body: str
) -> None:
    """Whatever its numbers and text are, JSON gives back what was sealed."""
    row = sealed(GENESIS, 1, at, wall, "Noticed", json.dumps(body))
    again = row_of(json.loads(json.dumps(row)))
    assert row == again
    assert again is not None
    assert follows(GENESIS, again)


# ------------------------------------------------------------------- damage, and what is read


def truncated(path: Path) -> None:
    """Half of the database is gone."""
    os.truncate(path, path.stat().st_size // 2)


def zeroed(path: Path) -> None:
    """A page is empty."""
    with path.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\0" * 4096)


def emptied(path: Path) -> None:
    """The file has its name and nothing else."""
    os.truncate(path, 0)


def deleted(path: Path) -> None:
    """The file is gone."""
    path.unlink()


def change(path: Path, statement: str) -> None:
    """Do what the triggers refuse; they are there again afterwards."""
    with closing(sqlite3.connect(path)) as connection:
        for trigger in ("no_update", "no_delete"):
            connection.execute(f"DROP TRIGGER {trigger}")
        connection.execute(statement)
        for made in SCHEMA[1:]:
            connection.execute(made)
        connection.commit()


def altered(path: Path) -> None:
    """Somebody changed a row."""
    change(path, "UPDATE events SET at = 0.5 WHERE seq = 200")


def holed(path: Path) -> None:
    """Rows in the middle are missing."""
    change(path, "DELETE FROM events WHERE seq BETWEEN 100 AND 120")


def beheaded(path: Path) -> None:
    """Its end is missing."""
    change(path, "DELETE FROM events WHERE seq > 350")


def renumbered(path: Path) -> None:
    """Its format number is another one."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={FORMAT + 1}")


def unguarded(path: Path) -> None:
    """A trigger is missing."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER no_delete")


def misspelt(path: Path) -> None:
    """The name of a column is no text any more."""
    data = path.read_bytes()
    assert data.count(b"    kind TEXT") == 1
    path.write_bytes(data.replace(b"    kind TEXT", b"    k\xb5nd TEXT"))


def readonly(path: Path) -> None:
    """The version of SQLite that may write it is one that there is not."""
    with path.open("r+b") as file:
        file.seek(18)
        file.write(b"\x09")


DAMAGE = [
    *(
        truncated,
        zeroed,
        emptied,
        deleted,
        altered,
        holed,
        beheaded,
        renumbered,
        unguarded,
        misspelt,
        readonly,
    ),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_the_database_lost_is_read_from_the_backup_and_resume_mends_it(
    closed: Path, killed: tuple[Path, list[Entry]], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Readers get everything and write nothing; who goes on is refused until it is mended; then all is there,
    the damaged file is kept, and nothing is left to mend."""
    run = tmp_path / "run"
    shutil.copytree(closed, run)
    path, entries = run / "ledger.sqlite", killed[1]
    damage(path)
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    assert entries == entries_of(path)
    sidecars = {"ledger.sqlite-wal", "ledger.sqlite-shm"}
    assert before == {f.name: f.read_bytes() for f in run.iterdir() if f.name not in sidecars - set(before)}
    with pytest.raises(LedgerError, match="budgetsearch resume"):
        Ledger(path)
    mended = mend(path)
    assert mended is not None
    assert mended.lost == 0
    assert "400 whole events" in mended.line
    assert entries == entries_of(path)
    aside = run / "ledger.damaged-1.sqlite"
    assert aside.exists() == (damage is not deleted)
    if aside.exists():
        assert before["ledger.sqlite"] == aside.read_bytes()
        assert aside.name in mended.line
    assert mend(path) is None
    go_on(path, entries)


def go_on(path: Path, entries: list[Entry]) -> None:
    """More events can be added, and both files hold them."""
    ledger = Ledger(path)
    added = ledger.append(Noticed("on"), VirtualClock(1e6))
    ledger.close()
    assert added.seq == len(entries) + 1
    assert [*entries, added] == entries_of(path)
    backup_only = path.parent / "backup-only"
    backup_only.mkdir()
    shutil.copyfile(backup_of(path), backup_only / "ledger.jsonl")
    assert [*entries, added] == entries_of(backup_only / "ledger.sqlite")


@pytest.mark.parametrize("ending", ["-wal", ""])
@pytest.mark.parametrize("seed", range(12))
def test_bytes_that_change_anywhere_lose_nothing_while_the_backup_is_whole(
    killed: tuple[Path, list[Entry]], closed: Path, tmp_path: Path, ending: str, seed: int
) -> None:
    """In the database or its log: whatever byte it is, what is read is what was written, before and after."""
    run = tmp_path / "run"
    shutil.copytree(killed[0] if ending else closed, run)
    path, entries, rng = run / "ledger.sqlite", killed[1], random.Random(seed)
    flip(Path(f"{path}{ending}"), rng, times=1 + seed % 3)
    assert entries == entries_of(path)
    mend(path)
    assert entries == entries_of(path)
    assert mend(path) is None
    go_on(path, entries)


def test_a_log_that_was_deleted_is_found_missing(killed: tuple[Path, list[Entry]], tmp_path: Path) -> None:
    """The database without it is whole and too short: only the backup knows."""
    run = tmp_path / "run"
    shutil.copytree(killed[0], run)
    (run / "ledger.sqlite-wal").unlink()
    mended = mend(run / "ledger.sqlite")
    assert mended is not None
    assert killed[1] == entries_of(run / "ledger.sqlite")


@pytest.mark.parametrize("place", [120, -1])
@pytest.mark.parametrize("byte", [b"\n", b"\r"])
def test_a_line_of_the_backup_that_was_broken_in_two_is_one_line(
    killed: tuple[Path, list[Entry]], closed: Path, tmp_path: Path, place: int, byte: bytes
) -> None:
    """A byte that became the end of a line does not make the ledger look as if it had lost an event."""
    run = tmp_path / "run"
    shutil.copytree(closed, run)
    backup = run / "ledger.jsonl"
    lines = backup.read_bytes().splitlines(keepends=True)
    lines[place] = lines[place][:40] + byte + lines[place][41:]
    backup.write_bytes(b"".join(lines))
    mended = mend(run / "ledger.sqlite")
    assert 0 == (mended.lost if mended else 0)
    go_on(run / "ledger.sqlite", killed[1])


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_backup_costs_nothing_while_the_database_is_whole(
    killed: tuple[Path, list[Entry]], closed: Path, tmp_path: Path, seed: int
) -> None:
    """It is made again; unless only its last line was torn the user hears of it, and it is kept aside."""
    run = tmp_path / "run"
    shutil.copytree(closed, run)
    path, entries = run / "ledger.sqlite", killed[1]
    flip(run / "ledger.jsonl", random.Random(seed))
    damaged = (run / "ledger.jsonl").read_bytes()
    assert entries == entries_of(path)
    mended = mend(path)
    if mended is not None:
        assert mended.lost == 0
        assert "its backup was damaged" in mended.line
        assert damaged == (run / "ledger.damaged-1.jsonl").read_bytes()
    go_on(path, entries)
    assert mend(path) is None


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_a_torn_last_line_of_the_backup_is_written_again(
    killed: tuple[Path, list[Entry]], closed: Path, tmp_path: Path, cut: int
) -> None:
    """It is what a power cut leaves: no damage, and the next process brings the backup level."""
    run = tmp_path / "run"
    shutil.copytree(closed, run)
    backup = run / "ledger.jsonl"
    whole = backup.read_bytes()
    os.truncate(backup, len(whole) - cut)
    assert mend(run / "ledger.sqlite") is None
    Ledger(run / "ledger.sqlite").close()
    assert whole == backup.read_bytes()
    assert killed[1] == entries_of(run / "ledger.sqlite")


def test_without_a_backup_one_is_made(killed: tuple[Path, list[Entry]], closed: Path, tmp_path: Path) -> None:
    """Somebody deleted it, or copied the database alone."""
    run = tmp_path / "run"
    shutil.copytree(closed, run)
    whole = (run / "ledger.jsonl").read_bytes()
    (run / "ledger.jsonl").unlink()
    assert mend(run / "ledger.sqlite") is None
    Ledger(run / "ledger.sqlite").close()
    assert whole == (run / "ledger.jsonl").read_bytes()


def cut_lines(backup: Path, keep: int, *, garbage: bool = True) -> None:
    """Damage the backup behind so many lines."""
    lines = backup.read_bytes().splitlines(keepends=True)
    if garbage:
        lines[keep] = lines[keep].replace(b"1", b"2")
        backup.write_bytes(b"".join(lines))
    else:
        backup.write_bytes(b"".join(lines[:keep]))


def test_a_database_that_somebody_has_locked_is_waited_for_briefly_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline may not pass meanwhile: seconds, then an error that says who has to let go of it."""
    assert database.LOCK_SECONDS <= 5.0
    for module in (database, ledger_module):
        monkeypatch.setattr(module, "LOCK_SECONDS", 0.01)
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match=r"Another program has had it locked .* close what has it open"):
        ledger.append(Noticed("on"), VirtualClock())
    other.execute("ROLLBACK")
    assert 1 == ledger.append(Noticed("on"), VirtualClock()).seq
    ledger.close()
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerError, match=r"Another program has had it locked .* and try again"):
        entries_of(path)
    other.close()


@pytest.mark.parametrize("digit", [b"9", b"0"])
@pytest.mark.parametrize("place", [0, 7, 120, -2, -1])
def test_a_number_that_changed_in_the_backup_says_nothing_of_the_whole_database(
    killed: tuple[Path, list[Entry]],
    closed: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    place: int,
    digit: bytes,
) -> None:
    """One digit more or another one: the ledger is read without a warning and may be written to at once, and
    mending says that the backup was damaged, in which line, and that nothing is lost."""
    run = tmp_path / "run"
    shutil.copytree(closed, run)
    path, backup = run / "ledger.sqlite", run / "ledger.jsonl"
    lines = backup.read_bytes().splitlines(keepends=True)
    lines[place] = b"[" + digit + lines[place][1 if place % 2 else 2 :]
    lines[place] = lines[place].replace(b"[0", b"[10", 1)
    backup.write_bytes(b"".join(lines))
    assert killed[1] == entries_of(path)
    assert "" == caplog.text
    assert "" == survey(path).problem
    mended = mend(path)
    assert mended is not None
    assert mended.line.startswith("The ledger is whole, but its backup was damaged (line ")
    assert "Nothing is known to be lost" in mended.line
    assert (run / "ledger.damaged-1.jsonl").read_bytes() == b"".join(lines)
    go_on(path, killed[1])


def test_where_both_are_damaged_in_different_places_nothing_is_lost(
    killed: tuple[Path, list[Entry]], closed: Path, tmp_path: Path
) -> None:
    """At each place the copy that is whole counts."""
    run = tmp_path / "run"
    shutil.copytree(closed, run)
    altered(run / "ledger.sqlite")
    cut_lines(run / "ledger.jsonl", 300)
    mended = mend(run / "ledger.sqlite")
    assert mended is not None
    assert mended.lost == 0
    assert killed[1] == entries_of(run / "ledger.sqlite")
    assert (run / "ledger.damaged-1.sqlite").exists()
    assert (run / "ledger.damaged-1.jsonl").exists()


@pytest.mark.parametrize("keep", [199, 250])
def test_where_both_lost_the_same_the_longest_beginning_is_kept_and_the_loss_said(
    killed: tuple[Path, list[Entry]],
    closed: Path,
    tmp_path: Path,
    keep: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The database is damaged from its 200th event on, the backup from another on; a reader and the mended
    run say how many events are lost, and both damaged files are kept."""
    run = tmp_path / "run"
    shutil.copytree(closed, run)
    path = run / "ledger.sqlite"
    change(path, "UPDATE events SET body = body || ' ' WHERE seq >= 200")
    cut_lines(run / "ledger.jsonl", keep)
    kept = keep  # neither has the event behind it, so nothing carries the chain on
    with caplog.at_level(logging.WARNING):
        assert killed[1][:kept] == entries_of(path)
    assert f"at least {EVENTS - kept} later ones are lost" in caplog.text
    mended = mend(path)
    assert mended is not None
    assert EVENTS - kept == mended.lost
    assert f"At least {EVENTS - kept} later events are lost" in mended.line
    assert f"{kept} whole events" in mended.line
    assert killed[1][:kept] == entries_of(path)
    assert {"ledger.damaged-1.sqlite", "ledger.damaged-1.jsonl"} < {file.name for file in run.iterdir()}
    go_on(path, killed[1][:kept])


def test_where_both_are_useless_nothing_is_touched(closed: Path, tmp_path: Path) -> None:
    """The error says what can be done, and both files stay as they are."""
    run = tmp_path / "run"
    shutil.copytree(closed, run)
    for file in run.iterdir():
        file.write_bytes(b"not what it was" * 500)
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    path = run / "ledger.sqlite"
    for use in (entries_of, mend, Ledger):
        with pytest.raises(LedgerError, match="restore one of the two files from a copy"):
            use(path)
    assert before == {file.name: file.read_bytes() for file in run.iterdir()}


def test_the_second_damage_has_a_name_of_its_own(
    killed: tuple[Path, list[Entry]], closed: Path, tmp_path: Path
) -> None:
    """What was put aside before is not written over."""
    run = tmp_path / "run"
    shutil.copytree(closed, run)
    for number in (1, 2):
        altered(run / "ledger.sqlite")
        mended = mend(run / "ledger.sqlite")
        assert mended is not None
        assert f"ledger.damaged-{number}.sqlite" in mended.line
    assert killed[1] == entries_of(run / "ledger.sqlite")


class Died(BaseException):
    """Stands for kill -9 while mending."""


@pytest.mark.parametrize("nth", range(1, 8))
def test_mending_that_is_killed_anywhere_loses_nothing(
    killed: tuple[Path, list[Entry]], closed: Path, tmp_path: Path, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each rename and each sync the next process finds everything, and mends."""
    run = tmp_path / "run"
    shutil.copytree(closed, run)
    path = run / "ledger.sqlite"
    altered(path)
    cut_lines(run / "ledger.jsonl", 300)
    left = nth
    replace, fsync = os.replace, os.fsync

    def counted(work: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: object) -> None:
            nonlocal left
            work(*arguments)
            left -= 1
            if left == 0:
                raise Died

        return wrapped

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", counted(replace))
        patched.setattr(os, "fsync", counted(fsync))
        try:
            mend(path)
        except Died:
            pass
        else:
            assert left > 0
    assert killed[1] == entries_of(path)
    mend(path)
    assert mend(path) is None
    go_on(path, killed[1])


def test_reading_while_a_run_writes_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A reader between any two writes sees a whole ledger, also one that reads only what is new."""
    ledger, clock = Ledger(tmp_path / "ledger.sqlite"), VirtualClock()
    seen: list[Entry] = []
    for number in range(50):
        ledger.append(Noticed(str(number)) if number else Opened(1.0, {}), clock)
        seen.extend(read_entries(ledger.path, after=len(seen)))
        assert len(seen) == number + 1
    ledger.close()
    assert seen == entries_of(tmp_path / "ledger.sqlite")
    assert not caplog.records


def test_a_status_reads_each_event_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the run is, and with all that a status tells: history, seconds of the workers, reports."""
    run = write_run(tmp_path / "run")
    events, decoded, decode = len(entries_of(run / "ledger.sqlite")), list[object](), ledger_module.decode

    def counted(kind: object, value: object) -> object:
        decoded.append(value)
        return decode(kind, value)

    monkeypatch.setattr(ledger_module, "decode", counted)
    assert "finished" == api.status(run)["phase"]
    assert events == len(decoded)


def test_a_backup_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning; the ledger goes on, and the next process brings the backup level."""
    ledger, clock = Ledger(tmp_path / "ledger.sqlite"), VirtualClock()
    ledger.append(Opened(1.0, {}), clock)
    real = os.write

    def short(fd: int, data: bytes) -> int:
        return real(fd, data[:5])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", short)
        ledger.append(Noticed("a"), clock)
        ledger.append(Noticed("b"), clock)
    ledger.close()
    assert len(caplog.records) == 1
    assert (tmp_path / "ledger.jsonl").read_bytes().count(b"\n") == 1
    assert mend(tmp_path / "ledger.sqlite") is None
    Ledger(tmp_path / "ledger.sqlite").close()
    assert (tmp_path / "ledger.jsonl").read_bytes().count(b"\n") == 3


# ---------------------------------------------------------------- a run goes on after it


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_a_run_whose_ledger_was_mended_goes_on_to_its_end(tmp_path: Path, both: bool, seed: int) -> None:
    """Killed, then damaged in one file or in both: the mended run keeps every invariant, charges each second
    once, and replays."""
    path, rng = tmp_path / "ledger.sqlite", random.Random(seed)
    driver = make_driver(path)
    driver.ledger.watch(Killer(KILLED_AT))
    with pytest.raises(Killed):
        driver.run()
    driver.ledger.close()
    before = entries_of(path)
    hit = rng.randrange(10, len(before) - 5)
    change(path, f"UPDATE events SET wall = wall + 1 WHERE seq > {hit}")
    if both:
        cut_lines(backup_of(path), hit, garbage=rng.random() < 0.5)
    mended = mend(path)
    assert mended is not None
    kept = hit if both else len(before)
    assert before[:kept] == entries_of(path)
    assert len(before) - kept == mended.lost
    again = make_driver(path, clock=VirtualClock(before[kept - 1].at + 3.0))
    history = again.run()
    again.ledger.close()
    entries = entries_of(path)
    assert before[:kept] == entries[:kept]
    assert isinstance(entries[-1].event, Closed)
    assert history.closed == Closed("finished", history.closed.reason if history.closed else "")
    check_invariants(entries, history, 720.0)
    charged: History = fold(entries)
    assert sum(charged.charged.values()) == pytest.approx(entries[-1].at, abs=1e-6)
