"""Whatever is wrong with a run's own study, it is made anew from the ledger; nobody else's is touched."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import pytest
import sqlalchemy

from budgetsearch.core.events import Entry
from budgetsearch.core.history.fold import apply, fold
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.records import Segment, Status
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.study import mirror, storage
from budgetsearch.views.study.content import StudyContent
from budgetsearch.views.study.mirror import StudyMirror
from budgetsearch.views.study.showcase import Showcase
from tests.support.factories import Story, params, whole_run
from tests.support.simulation import make_driver
from tests.support.studies import Watching, snapshot, study, url
from tests.support.worlds import SyntheticWorld

Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def story() -> Story:
    """A whole run."""
    return whole_run()


@pytest.fixture(scope="module")
def expected(story: Story, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """What its study says."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder, story.history)
    return snapshot(folder)


def own(folder: Path) -> StudyMirror:
    """The mirror of a run whose study lies in its folder."""
    return StudyMirror(url(folder), "run", folder / "study.sqlite")


def write(folder: Path, history: History) -> None:
    """Bring the folder's study level, in a process of its own, as it were."""
    made = own(folder)
    made.catch_up(history)
    made.close()


def test_a_process_that_dies_while_it_makes_the_study_leaves_none(
    tmp_path: Path, story: Story, expected: list[tuple[Any, ...]]
) -> None:
    """Killed between two tables, it leaves nothing that the next one would take for a damaged study."""
    tables: list[str] = []

    def die_at_the_third(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
        tables.extend([statement] if "CREATE TABLE" in statement else [])
        if len(tables) == 3:
            raise KeyboardInterrupt

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", die_at_the_third)
    try:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, story.history)
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", die_at_the_third)
    assert not (tmp_path / "study.sqlite").exists()
    write(tmp_path, story.history)
    assert expected == snapshot(tmp_path)
    assert [] == asides(tmp_path)


def asides(folder: Path) -> list[str]:
    """What lies beside the study."""
    return sorted(path.name for path in folder.iterdir() if path.name != "study.sqlite")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the user was told."""
    return [record.getMessage() for record in caplog.records]


# ------------------------------------------------------------------------------- damages


def truncated(file: Path) -> None:
    """The second half is gone."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_to_a_header(file: Path) -> None:
    """Less than a page is left."""
    file.write_bytes(file.read_bytes()[:50])


def garbage(file: Path) -> None:
    """Nothing of it is SQLite's."""
    file.write_bytes(random.Random(0).randbytes(40_000))


def flipped(file: Path) -> None:
    """One bit of the kind of a page differs."""
    content = bytearray(file.read_bytes())
    content[4096 * 5] ^= 0x40
    file.write_bytes(bytes(content))


def sql(*statements: str) -> Spoil:
    """Something is done to the file that leaves it a whole database."""

    def spoil(file: Path) -> None:
        with closing(sqlite3.connect(file)) as connection, connection:
            for statement in statements:
                connection.execute(statement)

    spoil.__name__ = statements[0].replace(" ", "-")
    return spoil


DAMAGES: list[Spoil] = [
    truncated,
    cut_to_a_header,
    garbage,
    flipped,
    sql("DROP TABLE trials"),
    sql("UPDATE trials SET state = 'SLEEPING' WHERE number = 1"),
    sql("UPDATE trial_user_attributes SET value_json = '{'"),
    sql("UPDATE alembic_version SET version_num = 'v99.0.0'"),
    sql("UPDATE alembic_version SET version_num = 'v3.0.0.d'"),
    sql("UPDATE trial_intermediate_values SET intermediate_value = 7.5"),
    sql("UPDATE trial_values SET value = 0.01 WHERE trial_id = 4"),
    sql("UPDATE trials SET state = 'COMPLETE' WHERE number = 1"),
    sql("UPDATE trial_params SET param_value = 9 WHERE param_name = 'dropout'"),
    sql("UPDATE trial_params SET param_value = 3e-4 WHERE param_name = 'learning_rate'"),
]


@pytest.mark.parametrize("spoil", DAMAGES, ids=lambda spoil: spoil.__name__)
def test_whatever_is_wrong_with_the_own_file_it_is_made_anew_and_complete(
    tmp_path: Path, story: Story, expected: list[Any], caplog: pytest.LogCaptureFixture, spoil: Spoil
) -> None:
    """At a resume, with one line for the user."""
    write(tmp_path, story.history)
    caplog.clear()
    spoil(tmp_path / "study.sqlite")
    write(tmp_path, story.history)
    assert expected == snapshot(tmp_path)
    assert [] == asides(tmp_path)
    (line,) = said(caplog)
    assert "made again from the ledger" in line


RUNNING = [truncated, garbage, sql("DROP TABLE trials"), sql("DELETE FROM trials")]


@pytest.mark.parametrize("spoil", RUNNING, ids=lambda spoil: spoil.__name__)
def test_a_study_that_is_damaged_during_the_run_is_whole_at_its_end(
    tmp_path: Path, story: Story, expected: list[Any], caplog: pytest.LogCaptureFixture, spoil: Spoil
) -> None:
    """The mirror has it open while it happens."""
    watching, history = Watching(own(tmp_path)), History()
    for entry in story.entries:
        apply(history, entry)
        watching.see(entry, history)
        if entry.seq == len(story.entries) // 2:
            spoil(tmp_path / "study.sqlite")
    assert watching.mirror.level
    assert expected == snapshot(tmp_path)
    assert [] == asides(tmp_path)
    assert len(said(caplog)) == 1


def emptied(file: Path) -> None:
    """Truncated to nothing."""
    file.write_bytes(b"")


@pytest.mark.parametrize("spoil", [Path.unlink, emptied], ids=["deleted", "emptied"])
@pytest.mark.parametrize("running", [True, False])
def test_a_study_that_is_gone_is_made_again(
    tmp_path: Path,
    story: Story,
    expected: list[Any],
    spoil: Spoil,
    running: bool,
) -> None:
    """During the run or before a resume."""
    first = own(tmp_path)
    first.catch_up(fold(story.entries[: len(story.entries) // 2]))
    spoil(tmp_path / "study.sqlite")
    if not running:
        first.close()
        first = own(tmp_path)
    first.catch_up(story.history)
    assert expected == snapshot(tmp_path)


def test_a_study_of_another_run_in_its_place_is_noticed_while_it_is_open(
    tmp_path: Path, story: Story, expected: list[Any]
) -> None:
    """A file that was moved over the study's: its trials are none of the ledger's."""
    other = Story.planned()
    for rank in (32, 16, 8):
        other.train(other.trial(params(rank, 5e-3)), 1.0)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", other.history)
    follower = own(tmp_path)
    follower.catch_up(fold(story.entries[:-3]))
    (tmp_path / "other" / "study.sqlite").rename(tmp_path / "study.sqlite")
    (tmp_path / "other").rmdir()
    follower.catch_up(story.history)
    assert expected == snapshot(tmp_path)


def test_a_ledger_that_is_older_than_its_study_wins(tmp_path: Path, story: Story) -> None:
    """Restored from a copy, it knows less: the study then says no more than it."""
    write(tmp_path, story.history)
    early = fold(story.entries[:20])
    write(tmp_path, early)
    assert sorted(early.trials) == [trial.user_attrs["trial_id"] for trial in study(tmp_path).trials]


def test_an_older_study_is_no_contradiction(tmp_path: Path, story: Story, expected: list[Any]) -> None:
    """It is brought level in place: nothing is put aside."""
    write(tmp_path, fold(story.entries[:20]))
    write(tmp_path, story.history)
    assert expected == snapshot(tmp_path)
    assert [] == asides(tmp_path)


def test_a_wrong_attribute_of_a_trial_that_goes_on_is_written_over(tmp_path: Path, story: Story) -> None:
    """What can be mended in place is."""
    write(tmp_path, fold(story.entries[:20]))
    before = snapshot(tmp_path)
    sql("UPDATE trial_user_attributes SET value_json = '\"asleep\"' WHERE key = 'status'")(
        tmp_path / "study.sqlite"
    )
    write(tmp_path, fold(story.entries[:20]))
    assert before == snapshot(tmp_path)
    assert [] == asides(tmp_path)


def test_what_sqlite_keeps_beside_a_file_goes_with_it(
    tmp_path: Path, story: Story, expected: list[Any]
) -> None:
    """A journal that stayed would be rolled back into the new file."""
    for end in ("-journal", "-wal"):
        (tmp_path / f"study.sqlite{end}").write_bytes(b"of another one")
    write(tmp_path, story.history)
    assert [] == asides(tmp_path)
    assert expected == snapshot(tmp_path)


def test_a_fault_that_is_not_the_files_makes_it_anew_only_a_few_times(
    tmp_path: Path, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails again and again, as one of the plots."""
    made = []

    class Broken(Showcase):
        def show(self, *arguments: Any) -> None:
            raise ValueError("a bug")

    def counted(path: Path) -> Any:
        made.append(path)
        return storage.fresh_file(path)

    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(mirror, "fresh_file", counted)
    one = StudyMirror(url(tmp_path), "run", tmp_path / "study.sqlite", showcase=Broken(None))
    for _ in range(6):
        one.catch_up(story.history)
    assert 1 + mirror.MOST_MENDS == len(made)
    assert not one.level


def test_a_half_made_study_of_a_process_that_died_is_swept(tmp_path: Path, story: Story) -> None:
    """The half-made file and what SQLite keeps beside it go; the study and the user's files stay."""
    write(tmp_path, story.history)
    for name in ("study.sqlite.new", "study.sqlite.new-journal", "study.sqlite.newest"):
        (tmp_path / name).write_bytes(b"half")
    before = snapshot(tmp_path)
    RunFolder(tmp_path).tidy()
    assert {"study.sqlite", "study.sqlite.newest"} == {path.name for path in tmp_path.glob("study*")}
    assert before == snapshot(tmp_path)


def test_somebody_who_locks_the_study_holds_nothing_up(
    tmp_path: Path, story: Story, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock stays on the file that was there; the study is level in another one."""
    monkeypatch.setattr(storage, "LOCK_SECONDS", 0.05)
    write(tmp_path, fold(story.entries[:20]))
    with closing(sqlite3.connect(tmp_path / "study.sqlite")) as other:
        other.execute("BEGIN EXCLUSIVE")
        write(tmp_path, story.history)
    assert expected == snapshot(tmp_path)


# ------------------------------------------------------------------- a storage that is shared


@pytest.fixture
def shared(tmp_path: Path, story: Story) -> Path:
    """A database with the study of this run, which says something else, and one of another run."""
    StudyMirror(url(tmp_path), "other").catch_up(story.history)
    StudyMirror(url(tmp_path), "run").catch_up(story.history)
    sql("UPDATE trial_intermediate_values SET intermediate_value = 7.5")(tmp_path / "study.sqlite")
    return tmp_path


def test_a_shared_storage_that_says_something_else_is_left_alone(
    shared: Path, story: Story, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knows who reads it: there is one warning, and the search goes on."""
    before = snapshot(shared)
    StudyMirror(url(shared), "run").catch_up(story.history)
    assert before == snapshot(shared)
    assert ["other", "run"] == sorted(optuna.get_all_study_names(url(shared)))
    (line,) = said(caplog)
    assert "is not what the ledger says. The search goes on without it" in line


def test_a_damaged_shared_storage_is_left_alone(
    shared: Path, story: Story, caplog: pytest.LogCaptureFixture
) -> None:
    """It may hold what no ledger has: the run only says so."""
    truncated(shared / "study.sqlite")
    before = (shared / "study.sqlite").read_bytes()
    StudyMirror(url(shared), "run").catch_up(story.history)
    assert before == (shared / "study.sqlite").read_bytes()
    assert ["study.sqlite"] == [path.name for path in shared.iterdir()]
    assert "The search goes on without it" in said(caplog)[0]


# ------------------------------------------------------------------------------- one by one


def test_trials_that_cannot_go_on_end_at_once(tmp_path: Path) -> None:
    """The diverged, the infeasible and the dropped; a paused one that may be promoted stays open."""
    story = Story.planned()
    story.watchers.append(Watching(StudyMirror(url(tmp_path), "run")))
    for number in range(12):
        story.train(story.trial(params(8, 1e-3 * (1 + number / 50))), 1.0 + number / 10)
    story.end(story.start(story.trial(params(8, 9e-3))), status="diverged", detail="loss is not finite")
    assert ["RUNNING"] * 12 + ["FAIL"] == [t.state.name for t in study(tmp_path).trials]
    story.train(0, 0.9, 1, "promotion")
    ended = {t.user_attrs["trial_id"] for t in study(tmp_path).trials if t.state.name == "PRUNED"}
    assert ended == story.history.dropped - {0} - {12}
    assert ended
    assert {"dropped"} == {t.user_attrs["status"] for t in study(tmp_path).trials if t.number in ended}


def test_trials_that_ended_early_are_as_if_told_at_the_end(tmp_path: Path) -> None:
    """In a run with promotions and drops, followed event by event or written at its end."""
    story = Story.planned()
    story.watchers.append(Watching(StudyMirror(url(tmp_path), "run")))
    for number in range(12):
        story.train(story.trial(params(8, 1e-3 * (1 + number / 50))), 1.0 + number / 10)
    story.train(0, 0.9, 1, "promotion")
    story.train(0, 0.8, 2, "full run starts")
    story.finish()
    (tmp_path / "late").mkdir()
    StudyMirror(url(tmp_path / "late"), "run").catch_up(story.history)
    assert snapshot(tmp_path / "late") == snapshot(tmp_path)


def test_nothing_of_a_transaction_is_left_when_a_part_of_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study has all of an event or nothing of it."""
    story = Story.planned()
    follower = StudyMirror(url(tmp_path), "run")
    follower.catch_up(story.history)
    story.end(story.start(story.trial(params(8))), status="diverged")
    story.trial(params(16))
    create = StudyContent._create

    def fails_at_the_second(content: StudyContent, state: TrialState, history: History) -> None:
        create(content, state, history)
        if state.trial_id:
            raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(StudyContent, "_create", fails_at_the_second)
        follower.catch_up(story.history)
        assert [] == study(tmp_path).trials
    follower.hurry(0.0)
    follower.catch_up(story.history)
    assert ["FAIL", "RUNNING"] == [t.state.name for t in study(tmp_path).trials]


# ------------------------------------------------------------------------------ dashboard


class Quiet(WSGIRequestHandler):
    """Logs nothing."""

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[str]:
    """optuna-dashboard on the folder's study; its address."""
    from optuna_dashboard import wsgi

    server = make_server("127.0.0.1", 0, wsgi(url(tmp_path)), handler_class=Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_dashboard_shows_a_study_that_was_made_again(
    tmp_path: Path, story: Story, request: pytest.FixtureRequest
) -> None:
    """All of its trials, with their states."""
    write(tmp_path, story.history)
    truncated(tmp_path / "study.sqlite")
    write(tmp_path, story.history)
    address = request.getfixturevalue("dashboard")
    with urllib.request.urlopen(f"{address}/api/studies", timeout=30) as answer:
        (summary,) = json.load(answer)["study_summaries"]
    with urllib.request.urlopen(f"{address}/api/studies/{summary['study_id']}", timeout=30) as answer:
        trials = json.load(answer)["trials"]
    assert ["Pruned", "Pruned", "Pruned", "Complete", "Fail", "Fail"] == [trial["state"] for trial in trials]


# -------------------------------------------------------------------------- the real policy


def fate(segment: Segment) -> Status:
    """Some trials diverge, some do not fit, some lose their worker."""
    kinds: dict[int, Status] = {3: "diverged", 7: "out_of_memory", 11: "crashed", 13: "timeout"}
    return kinds.get(segment.trial_id % 17, "ok") if segment.rung or segment.trial_id % 2 else "ok"


@pytest.mark.parametrize(("seed", "budget"), [(0, 720.0), (1, 1800.0), (2, 4000.0)])
def test_what_the_real_policy_does_never_contradicts_a_trial_that_has_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int, budget: float
) -> None:
    """Followed event by event, and looked at anew in between, the study is that of its end."""
    driver = make_driver(
        tmp_path / "ledger.sqlite", SyntheticWorld(seed=seed, fate=fate, overhead_seconds=0.5), budget=budget,
        seed=seed,
    )  # fmt: skip
    entries: list[Entry] = []
    live = own(tmp_path)
    watching = Watching(live)

    class Watch:
        def see(self, entry: Entry, history: History) -> None:
            entries.append(entry)
            watching.see(entry, history)
            if entry.seq % 150 == 0:
                live.close()  # the next event takes stock of what is there

    driver.ledger.watch(Watch())
    driver.run()
    assert live.level
    assert driver.history.dropped, "nothing was told early"
    (tmp_path / "late").mkdir()
    write(tmp_path / "late", fold(entries))
    assert snapshot(tmp_path / "late") == snapshot(tmp_path)
    assert [] == said(caplog), "the study was made anew"
