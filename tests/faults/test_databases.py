"""Runs whose study lies in a real PostgreSQL that is stopped, frozen, started again, or never comes back."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from budgetsearch import api
from budgetsearch.core.errors import SettingsError
from budgetsearch.core.policy import deadline
from budgetsearch.core.records import Segment
from budgetsearch.storage.ledger import read_history
from budgetsearch.views.study.follower import INCOMPLETE, Follower
from budgetsearch.views.study.mirror import StudyMirror
from budgetsearch.views.study.storage import PASSWORD
from tests.support.factories import Story, params, tell_run
from tests.support.faults import fastrun
from tests.support.faults.kills import preload
from tests.support.postgres import Server
from tests.support.studies import Watching, snapshot, study, url

pytest.importorskip("psycopg")
SECRET = "hunter2@wonderful/{0}"
TRIALS = {"max_trials": 6}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One for all tests here; each finds it running."""
    made = Server.made(SECRET)
    yield made
    made.remove()


@pytest.fixture
def database(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """The server, up before and after; nobody but the test knows its password."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (PASSWORD, "PGPASSWORD", "PGPASSFILE"):
        monkeypatch.delenv(name, raising=False)
    if not server.runs():
        server.start()
    yield server
    if not server.runs():
        server.start()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fastrun.Place]:
    """A folder for fast runs."""
    preload()
    import psycopg  # noqa: F401

    folder = Path(tempfile.mkdtemp(prefix="databases-"))
    yield fastrun.Place(folder).make()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(place: fastrun.Place, request: pytest.FixtureRequest) -> Path:
    """The folder of a run of the test's own."""
    place.log.unlink(missing_ok=True)
    return place.path / "runs" / request.node.name


def study_of(server: Server, run: Path) -> Any:
    """The run's study as another program sees it."""
    import optuna

    from budgetsearch.views.study.storage import connectable

    opened = read_history(run / "ledger.sqlite").opened
    assert opened is not None
    return optuna.load_study(study_name=opened.facts["study"], storage=connectable(server.url()))


def check_level(server: Server, run: Path) -> None:
    """The study says what the ledger says, and has ended."""
    history = read_history(run / "ledger.sqlite")
    trials = study_of(server, run).trials
    assert list(history.trials) == [trial.user_attrs["trial_id"] for trial in trials]
    for trial, state in zip(trials, history.trials.values(), strict=True):
        assert history.standing(state) == trial.user_attrs["status"]
        assert dict(state.losses).items() <= trial.intermediate_values.items()
        assert trial.state.is_finished()


def check_secret(place: fastrun.Place, run: Path) -> None:
    """No file of the run, and nothing that it printed, holds the password in any spelling."""
    from urllib.parse import quote, quote_plus

    forms = {form.encode() for form in (SECRET, quote(SECRET, safe=""), quote_plus(SECRET), "hunter2")}
    for path in [place.log, *(path for path in run.rglob("*") if path.is_file())]:
        content = path.read_bytes()
        assert not [form for form in forms if form in content], path


def at(trial: int, action: Callable[[], None]) -> Callable[[Segment], None]:
    """Do something in the middle of a trial's first segment."""

    def during(segment: Segment) -> None:
        if segment.trial_id == trial and segment.start_tokens == 0:
            action()

    return during


def in_step() -> None:
    """Real seconds count as they are: what a server takes to stop is not multiplied."""
    fastrun.FastEngine.empty_poll = 0.5
    logging.basicConfig(stream=sys.stderr, force=True)  # instead of what the test runner listens with


# ---------------------------------------------------------------------------------- runs


def test_a_server_that_comes_back_has_the_whole_study(
    database: Server, place: fastrun.Place, run: Path
) -> None:
    """Stopped during the second trial, started during the fifth: one warning, a line, and all is there.

    The two may train at once: the server stays away until it was missed.
    """

    def arrange() -> None:
        in_step()
        os.environ[PASSWORD] = SECRET

        def missed() -> bool:
            return "The search goes on without it" in place.log.read_text(encoding="utf-8")

        def begin() -> None:
            until = time.monotonic() + 30.0
            while not missed() and time.monotonic() < until:
                time.sleep(0.1)
            database.start()

        stop, start = at(1, database.stop), at(4, begin)
        fastrun.BEHAVIOUR.during = lambda segment: (stop(segment), start(segment))

    url = database.url(password=False)
    assert place.whole_life(run, arrange, storage=url, **TRIALS) == 0, place.log.read_text()[-3000:]
    check_level(database, run)
    check_secret(place, run)
    said = place.log.read_text(encoding="utf-8")
    assert said.count("The search goes on without it") == 1, said
    assert said.count("is level with the ledger again") == 1, said


def test_a_server_that_never_comes_back_leaves_the_run_alone_and_a_resume_completes_it(
    database: Server, place: fastrun.Place, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run finishes with a warning, and says that its study is missing; the ledger holds no password, so
    the resume is given it again."""

    def arrange() -> None:
        in_step()
        deadline.CLOSING_SECONDS = 1.0
        fastrun.BEHAVIOUR.during = at(1, database.stop)

    assert place.whole_life(run, arrange, storage=database.url(), **TRIALS) == 0
    history = read_history(run / "ledger.sqlite")
    assert history.closed is not None
    assert history.closed.state == "finished"
    assert INCOMPLETE in place.log.read_text(encoding="utf-8")
    database.start()
    api.resume(run, storage=database.url(password=False))
    assert "needs its password" in caplog.records[-1].getMessage()
    assert "study" in [one.kind for one in api.open_run(run).shortfalls]
    api.resume(run, storage=database.url())
    assert "study" not in [one.kind for one in api.open_run(run).shortfalls]
    check_level(database, run)
    check_secret(place, run)
    assert SECRET not in caplog.text


def test_an_interrupted_run_asks_for_the_password_before_it_goes_on(
    database: Server, place: fastrun.Place, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the ways and nothing is touched; with `run --resume auto` and the URL it goes on."""
    import signal

    def arrange() -> None:
        in_step()
        fastrun.BEHAVIOUR.during = at(2, lambda: os.kill(os.getppid(), signal.SIGTERM))

    def again() -> None:
        os.environ["BUDGETSEARCH_CACHE"] = str(place.path / "cache")
        fastrun.install()
        api.run(**place.arguments(run, storage=database.url(), **TRIALS), resume="auto")

    assert place.whole_life(run, arrange, storage=database.url(), **TRIALS) == 0
    before = (run / "ledger.sqlite").read_bytes()
    with pytest.raises(SettingsError, match=f"{PASSWORD}.*--storage"):
        api.resume(run, storage=database.url(password=False))
    assert before == (run / "ledger.sqlite").read_bytes()
    assert fastrun.wait_for(fastrun.forked(again, place.log)) == 0, place.log.read_text()[-3000:]
    check_level(database, run)
    check_secret(place, run)


# --------------------------------------------------------------------------- event by event


def test_a_server_that_stands_still_holds_nothing_up(database: Server) -> None:
    """Frozen with its connections open, it answers nothing; when it goes on, the study is written."""
    story = Story.planned()
    one = Follower(StudyMirror(database.url(), "frozen"), tuple(story.entries))
    story.watchers.append(one)
    story.train(story.trial(), 2.0)
    _await(lambda: one._mirror.level)
    database.freeze(True)
    try:
        began = time.monotonic()
        for number in range(50):
            story.train(story.trial(params(8, 1e-3 + number * 1e-5)), 1.9)
        took = time.monotonic() - began
        handed = len(one._handed)
    finally:
        database.freeze(False)
    assert took < 20
    assert handed > 100, "nothing had to wait"
    story.finish()
    one.close(60.0)
    assert 51 == len(_trials(database, "frozen"))


def test_a_study_that_is_deleted_on_the_server_is_made_again(database: Server) -> None:
    """As after a restored backup: what the ledger says is there again."""
    import optuna

    from budgetsearch.views.study.storage import connectable

    story = Story.planned()
    one = StudyMirror(database.url(), "deleted")
    story.watchers.append(Watching(one))
    story.train(story.trial(), 2.0)
    optuna.delete_study(study_name="deleted", storage=connectable(database.url()))
    story.train(story.trial(params(16)), 1.9)
    one.hurry(0.0)
    tell = Story(history=story.history, entries=story.entries, watchers=[Watching(one)])
    tell.finish()
    assert [{0: 2.0}, {0: 1.9}] == [t.intermediate_values for t in _trials(database, "deleted")]


def test_postgresql_and_sqlite_hold_the_same_study(database: Server, tmp_path: Path) -> None:
    """Numbers, states and attributes."""
    story = Story.planned()
    story.watchers += [
        Watching(StudyMirror(database.url(), "same")),
        Watching(StudyMirror(url(tmp_path), "run")),
    ]
    tell_run(story)
    assert len(study(tmp_path).trials) == 6
    assert snapshot(tmp_path) == [
        (t.number, t.state.name, t.params, t.values, t.intermediate_values, t.user_attrs, t.constraints)
        for t in _trials(database, "same")
    ]


def _trials(server: Server, name: str) -> list[Any]:
    import optuna

    from budgetsearch.views.study.storage import connectable

    return list(optuna.load_study(study_name=name, storage=connectable(server.url())).trials)


def _await(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until, "it never happens"
        time.sleep(0.01)
