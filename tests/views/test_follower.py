"""The study's own thread: it ends level with the ledger, and the search never waits for it."""

from __future__ import annotations

import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from budgetsearch.core.events import Entry
from budgetsearch.core.history.fold import apply, fold
from budgetsearch.core.history.history import History
from budgetsearch.views.study import mirror, storage
from budgetsearch.views.study.follower import INCOMPLETE, Follower
from budgetsearch.views.study.mirror import StudyMirror
from tests.support.factories import Story, params, tell_run, whole_run
from tests.support.studies import snapshot, study, url

LONG = 60.0
"""Seconds that nothing here takes, however busy the machine is."""


def followed(folder: Path, past: Iterator[Entry] | tuple[Entry, ...] = ()) -> Follower:
    """A follower of the folder's study."""
    return Follower(StudyMirror(url(folder), "run", folder / "study.sqlite"), past)


def ended(one: Follower) -> bool:
    """Whether its thread is over."""
    one._thread.join(LONG)
    return not one._thread.is_alive()


def test_a_followed_study_is_level_when_the_run_is_over(tmp_path: Path) -> None:
    """The same as one that was written at the end; and the thread is gone."""
    story = Story.planned()
    one = followed(tmp_path, tuple(story.entries))
    story.watchers.append(one)
    tell_run(story)
    assert one.close(LONG)
    (tmp_path / "late").mkdir()
    StudyMirror(url(tmp_path / "late"), "run").catch_up(story.history)
    assert snapshot(tmp_path / "late") == snapshot(tmp_path)
    assert ended(one)


def test_entries_count_once_wherever_they_come_from(tmp_path: Path) -> None:
    """What the ledger holds is replayed; what is handed over as well is passed over."""
    entries = whole_run().entries
    one, history = followed(tmp_path, iter(entries[:30])), History()
    for entry in entries:
        apply(history, entry)
        if entry.seq > 20:
            one.see(entry, history)
    one.close(LONG)
    assert study(tmp_path).trials[3].user_attrs["seconds"] == history.trials[3].seconds == 3.0
    assert [t.state.name for t in study(tmp_path).trials].count("COMPLETE") == 1


def test_a_resume_brings_level_what_is_missing_without_an_event(tmp_path: Path) -> None:
    """The past alone is enough."""
    entries = whole_run().entries
    one = followed(tmp_path, iter(entries[:30]))
    until = time.monotonic() + LONG
    while not one._mirror.level and time.monotonic() < until:
        time.sleep(0.01)
    one.close()
    assert ended(one)
    assert len(study(tmp_path).trials) == len(fold(entries[:30]).trials)


def test_an_outage_costs_a_warning_and_is_made_up_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning, one line when the study is level again, and everything is there."""
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.05)
    folder, story = tmp_path / "gone", Story.planned()
    tries, attempt = [], storage.open_storage

    def counted(url: str) -> object:
        tries.append(url)
        return attempt(url)

    monkeypatch.setattr(storage, "open_storage", counted)
    one = followed(folder, tuple(story.entries))
    story.watchers.append(one)
    story.train(story.trial(), 1.5)
    until = time.monotonic() + LONG
    while len(tries) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    folder.mkdir()
    story.train(story.trial(params(4)), 1.4)
    story.finish()
    one.close(LONG)
    assert [{0: 1.5}, {0: 1.4}] == [t.intermediate_values for t in study(folder).trials]
    lines = [record.getMessage() for record in caplog.records]
    assert [0] == [at for at, line in enumerate(lines) if "The search goes on without it" in line]
    assert "level with the ledger again" in lines[-1]
    # The folder may come back between a failure and the try to make the study anew.
    assert all("is made again from the ledger" in line for line in lines[1:-1])


def test_a_storage_that_never_comes_back_is_told_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning when it fails and one at the end; what shows the run names the way to complete it."""
    story = Story.planned()
    one = followed(tmp_path / "gone", tuple(story.entries))
    story.watchers.append(one)
    tell_run(story)
    assert not one.close(0.5)
    assert INCOMPLETE == caplog.records[-1].getMessage()
    assert len(caplog.records) == 2
    assert ended(one)


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A server that takes connections and says nothing; its port."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_the_search_does_not_wait_for_a_server_that_hangs(
    silent_server: int, caplog: pytest.LogCaptureFixture
) -> None:
    """While an attempt to connect hangs, every event is told at once; the end waits only for its time."""
    pytest.importorskip("psycopg")
    story = Story.planned()
    made = StudyMirror(f"postgresql://me:secret@127.0.0.1:{silent_server}/db?connect_timeout=20", "run")
    one = Follower(made, tuple(story.entries))
    story.watchers.append(one)
    began = time.monotonic()
    tell_run(story)
    one.close(0.5)
    took = time.monotonic() - began
    assert one._thread.is_alive(), "the attempt was over: nothing hung"
    assert took < 15
    assert [INCOMPLETE] == [record.getMessage() for record in caplog.records]


def test_what_is_told_is_never_what_the_driver_still_changes(tmp_path: Path) -> None:
    """The follower has a history of its own, with trials of its own."""
    story = Story.planned()
    one = followed(tmp_path, tuple(story.entries))
    story.watchers.append(one)
    tell_run(story)
    one.close(LONG)
    assert story.history == one._history
    assert not {id(t) for t in story.history.trials.values()} & {id(t) for t in one._history.trials.values()}


def test_a_follower_that_fails_says_so_and_leaves_the_run_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A ledger that cannot be read, say."""

    def past() -> Iterator[Entry]:
        raise OSError("no disk")
        yield

    story = Story.planned()
    one = Follower(StudyMirror(url(tmp_path), "run"), past())
    assert ended(one)
    story.watchers.append(one)
    tell_run(story)
    one.close(LONG)
    assert [
        "The Optuna study is not followed any more; the search goes on without it",
        INCOMPLETE,
    ] == [record.getMessage() for record in caplog.records]


def test_closing_twice_is_harmless_and_ends_the_thread(tmp_path: Path) -> None:
    """As where a run ends without its last event."""
    one = followed(tmp_path)
    one.close()
    one.close()
    assert ended(one)
    assert "study" not in {thread.name for thread in threading.enumerate()}


def test_pauses_grow_to_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that is down for hours is asked once a minute; the end of the run asks at once."""
    now = [1000.0]
    monkeypatch.setattr(mirror, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    one, pauses = StudyMirror(url(tmp_path / "gone"), "run"), []
    for _ in range(9):
        one.catch_up(whole_run().history)
        pauses.append(one.pause)
        now[0] += one.pause
    assert [1, 2, 4, 8, 16, 32, 60, 60, 60] == pauses
    one.catch_up(whole_run().history)
    one.hurry(0.25)
    assert one.pause == 0
    one.catch_up(whole_run().history)
    assert one.pause == 0.25


def test_signs_of_life_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats of hours of outage take no memory."""
    from budgetsearch.core.events import Heartbeat
    from budgetsearch.core.reports import Beat

    monkeypatch.setattr(Follower, "_work", lambda self: None)
    one = followed(tmp_path)
    entry = Entry(1, 1.0, 1.0, Heartbeat(Beat(0, None, "train")))
    for number in range(100):
        one.see(dataclasses.replace(entry, seq=number + 1), History())
    assert [] == one._handed


def test_the_mirror_stays_quiet_while_another_thread_is(caplog: pytest.LogCaptureFixture) -> None:
    """The first of two threads that leaves does not let Optuna talk for the other, and the last one does."""
    import optuna

    from budgetsearch.views.study.distributions import quiet

    before = optuna.logging.get_verbosity()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with quiet():
            inside.set()
            leave.wait(LONG)

    thread = threading.Thread(target=other)
    with quiet():
        thread.start()
        inside.wait(LONG)
    assert logging.WARNING == optuna.logging.get_verbosity()
    leave.set()
    thread.join()
    assert before == optuna.logging.get_verbosity()
