"""What optuna-dashboard shows of a run: asked for as its page does, and seen in a real browser."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from typer.testing import CliRunner
from waitress.server import TcpWSGIServer

from budgetsearch.cli import app
from budgetsearch.core.errors import UsageError
from budgetsearch.core.events import Exported, Noticed
from budgetsearch.core.history.history import History
from budgetsearch.storage.ledger import Ledger
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views import dashboard
from budgetsearch.views import dashboard as loopback
from budgetsearch.views.dashboard import View
from budgetsearch.views.drawing import Figure
from budgetsearch.views.study import artifacts, notes, plots
from budgetsearch.views.study.mirror import StudyMirror
from budgetsearch.views.study.showcase import Showcase
from tests.support.browser import Page, browser_page, wait_until
from tests.support.factories import Story, params, whole_run
from tests.support.studies import Watching

TITLES = ("Validation loss at each rung", "The budget by phase", "Validation loss over GPU seconds")
STATES = {
    0: "paused",
    1: "promoted",
    2: "full run",
    3: "diverged",
    4: "infeasible",
    5: "running",
    6: "waiting",
}
"""Of the trials of ``going``."""


def still() -> float:
    """A clock for a busy machine, which needs more than the second that the end of a run has."""
    return 0.0


def going() -> Story:
    """A run in the middle of everything: one trial in each state that a going run knows."""
    story = Story.planned()
    for rank, loss in ((4, 1.75), (8, 1.5), (16, 1.25)):
        story.train(story.trial(params(rank)), loss)
    story.end(story.start(story.trial(params(4, 9e-3))), status="diverged", detail="loss is not finite")
    infeasible = story.start(story.trial(params(32, 1e-3, "nf4")))
    story.end(infeasible, status="out_of_memory", detail="one sample alone needs 9 GiB")
    story.train(2, 1.125, 1, "promotion: place 1 of 5 at rung 0")
    story.start(2, 2, "full run starts")
    story.start(1, 1, "promotion: place 2 of 5 at rung 0")
    story.start(story.trial(params(8, 3e-3)))
    story.trial(params(4, 3e-3))
    return story


def run_folder(folder: Path, story: Story, events: int | None = None) -> RunFolder:
    """A run folder with what a process has left there after so many events."""
    folder.mkdir(parents=True, exist_ok=True)
    append(folder, story, 0, events)
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    if story.history.closed:
        (folder / "report.md").write_text("# Report\n")
    return RunFolder(folder)


def contents(folder: Path) -> dict[Path, bytes]:
    """Everything in a folder, but for what SQLite keeps beside a file while somebody reads it."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))
    ]
    return {path: path.read_bytes() for path in files}


def append(folder: Path, story: Story, start: int, stop: int | None = None) -> None:
    """Write some of a story's events to the ledger, as the run's process does."""
    ledger = Ledger(folder / "ledger.sqlite")
    for entry in story.entries[start:stop]:
        ledger.append(entry.event, SimpleNamespace(now=lambda at=entry.at: at))
    ledger.close()


def shown_by(storage: Any, store: Any = None) -> Any:
    """A function that asks the dashboard's server about a storage, as the page in the browser does."""
    from optuna_dashboard import wsgi

    server = wsgi(storage, store)

    def ask(path: str, method: str = "GET") -> Any:
        environment: dict[str, Any] = {
            "PATH_INFO": path,
            "REQUEST_METHOD": method,
            "wsgi.input": io.BytesIO(),
        }
        setup_testing_defaults(environment)
        body = b"".join(server(environment, lambda status, headers, error=None: None))
        return json.loads(body) if path.startswith("/api") and body else body

    return ask


def mirrored(history: History, storage: Any = None, **more: Any) -> Any:
    """The study of a history as the dashboard's server tells it."""
    storage = storage or optuna.storages.InMemoryStorage()
    StudyMirror(storage, "run", showcase=Showcase(None, **more)).catch_up(history)
    opened = storage if not isinstance(storage, str) else optuna.storages.RDBStorage(storage)
    ask = shown_by(opened)
    (study,) = ask("/api/studies")["study_summaries"]
    return ask(f"/api/studies/{study['study_id']}")


def attrs(trial: Any) -> dict[str, str]:
    """A trial's user attributes."""
    return {attr["key"]: attr["value"] for attr in trial["user_attrs"]}


# ------------------------------------------------------------------ trials and attributes


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of our own, which listens on a socket in its folder only."""
    pytest.importorskip("psycopg")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL's server is not installed")
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it refuses to run as root
    with tempfile.TemporaryDirectory(prefix="pg-") as place:
        os.chmod(place, 0o777)

        def call(program: str, *words: str) -> None:
            command = [*as_user, str(found[-1].with_name(program)), "-D", f"{place}/data", *words]
            subprocess.run(
                command, check=True, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
            )

        call("initdb", "-A", "trust", "-U", "test", "--no-sync")
        options = f"-c listen_addresses= -c unix_socket_directories={place} -c fsync=off"
        call("pg_ctl", "-w", "-l", f"{place}/log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://test@/postgres?host={place}"
        finally:
            call("pg_ctl", "-w", "-m", "immediate", "stop")


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A storage of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.sqlite'}"
    if request.param == "postgresql":
        return request.getfixturevalue("postgresql")
    return optuna.storages.InMemoryStorage()


def test_the_dashboard_tells_states_rungs_notes_and_plots(storage: Any) -> None:
    """Every state of a going run, a loss for each rung with its unit, notes and plots reach the page."""
    shown = mirrored(going().history, storage)
    trials = shown["trials"]
    assert STATES == {i: attrs(trial)["status"] for i, trial in enumerate(trials)}
    assert [{"step": 0, "value": 1.25}, {"step": 1, "value": 1.125}] == trials[2]["intermediate_values"]
    assert "1.2500 at rung 0 (10 s), 1.1250 at rung 1 (30 s)" == attrs(trials[2])["loss by rung"]
    assert ["Fail" if i in (3, 4) else "Running" for i in STATES] == [trial["state"] for trial in trials]
    assert ["validation loss"] == shown["objective_names"]
    assert "3000 tokens under fp32, 1500 tokens under nf4" == attrs(shown)["rung 1 (30 s)"]
    assert shown["note"]["body"].startswith("# Full run: ")
    assert "**trial 2**" in shown["note"]["body"]
    assert trials[2]["note"]["body"].startswith("# Trial 2: full run")
    assert "" == trials[0]["note"]["body"]
    drawn = {draw(going().history).name for draw in plots.PLOTS}
    assert drawn == {plot["id"] for plot in shown["plotly_graph_objects"]}


@pytest.mark.parametrize("late", [False, True])
def test_what_does_not_fit_breaks_a_constraint_that_the_dashboard_reads(late: bool) -> None:
    """Followed or caught up: Optuna's named constraint and the dashboard's list; the reason can be read."""
    storage = optuna.storages.InMemoryStorage()
    story = Story.planned()
    mirror = StudyMirror(storage, "run")
    mirror.catch_up(story.history)
    if not late:
        story.watchers.append(Watching(mirror))
    story.train(story.trial(params(4)), 1.5)
    segment = story.start(story.trial(params(32)))
    other = story.trial(params(32, 2e-3))
    story.end(segment, status="out_of_memory", detail="one sample alone needs 9 GiB")
    mirror.catch_up(story.history)
    trials = shown_by(storage)("/api/studies/0")["trials"]
    assert ["Running", "Fail", "Fail"] == [trial["state"] for trial in trials]
    assert [[], [1.0], [1.0]] == [trial["constraints"] for trial in trials]
    assert "one sample alone needs 9 GiB" == attrs(trials[1])["why"]
    assert "needs as much" in attrs(trials[other])["why"]
    assert {"memory": 1.0, "0": 1.0} == storage.get_all_trials(0)[1].constraints


def test_what_an_outcome_rules_out_is_told_at_once() -> None:
    """The followed study says of a waiting trial that it cannot fit when another one has shown it."""
    storage = optuna.storages.InMemoryStorage()
    story = Story.planned()
    mirror = StudyMirror(storage, "run")
    mirror.catch_up(story.history)
    story.watchers.append(Watching(mirror))
    segment = story.start(story.trial(params(32)))
    story.trial(params(32, 2e-3))
    story.end(segment, status="out_of_memory")
    assert ["infeasible"] * 2 == [t.user_attrs["status"] for t in storage.get_all_trials(0)]


def test_a_study_made_late_has_the_runs_own_times() -> None:
    """A trial started when it was sampled and ended with its last segment, not when the study was made."""
    story = whole_run()
    storage = optuna.storages.InMemoryStorage()
    StudyMirror(storage, "run").catch_up(story.history)
    trial = storage.get_all_trials(0)[3]
    ends = [e.wall for e in story.entries if getattr(getattr(e.event, "result", None), "trial_id", None) == 3]
    added = [e.wall for e in story.entries if getattr(getattr(e.event, "trial", None), "trial_id", None) == 3]
    assert (added[0], ends[-1]) == (trial.datetime_start.timestamp(), trial.datetime_complete.timestamp())
    assert trial.datetime_start < datetime.now()


# ----------------------------------------------------------------------------- the notes


def test_the_notes_give_the_answer_and_the_places() -> None:
    """The study's note has base against adapter, rungs and states; the finalist's its place at each rung."""
    story = whole_run()
    text = notes.study_note(story.history)
    assert text.startswith("# Finished (the budget is used): ")
    assert "| validation loss | 2.0000 | 0.9000 |" in text
    assert "| task accuracy (n = 4, exact match of the text) | 25.0% | 75.0% |" in text
    assert "| rung 0 (10 s) | 1000 | 500 | 4 | 1.0000 |" in text
    assert "| dropped | 3 |" in text
    (finalist,) = notes.finalists(story.history)
    note = notes.trial_note(finalist, story.history)
    assert note.startswith("# Trial 3: done, its adapter is exported\n")
    assert "| rung 0 (10 s) | 1.0000 | 1 of 4 | 1.5000 |" in note
    assert "| full run (90 s) | 0.9000 | 1 of 1 | - |" in note


def test_the_note_of_a_run_without_a_plan_says_so() -> None:
    """Before the calibration is over there is nothing to list, and nothing fails."""
    text = notes.study_note(History())
    assert "no adapter" in text
    assert "planned once the card has been measured" in text


def test_a_notice_in_a_note_shows_no_password() -> None:
    """Whatever a library said of a database goes through the filter."""
    story = Story.planned()
    story.add(Noticed("lost postgresql://me:hush@host/db"))
    assert "hush" not in notes.study_note(story.history)
    assert "at second" in notes.study_note(story.history)


def test_a_note_that_somebody_took_over_is_left_alone() -> None:
    """A text without the closing line is the user's."""
    from optuna_dashboard import get_note, save_note

    storage = optuna.storages.InMemoryStorage()
    story = going()
    StudyMirror(storage, "run", showcase=Showcase(None, now=still)).catch_up(story.history)
    study = optuna.load_study(study_name="run", storage=storage)
    save_note(study, "my own words")
    story.train(6, 1.0)
    StudyMirror(storage, "run", showcase=Showcase(None, now=still)).catch_up(story.history)
    assert "my own words" == get_note(study)
    trial = optuna.trial.Trial(study, study.trials[6]._trial_id)
    assert get_note(trial).startswith("# Trial 6")


# ----------------------------------------------------------------------------- the plots


@pytest.mark.parametrize("draw", plots.PLOTS)
@pytest.mark.parametrize(
    "history", [History(), Story.planned().history, going().history, whole_run().history]
)
def test_a_figure_is_valid_in_plotlys_schema(draw: Callable[[History], Figure], history: History) -> None:
    """Plotly itself accepts every figure at every stage of a run: unknown names would be refused."""
    import plotly.graph_objects as go

    figure = go.Figure(json.loads(draw(history).to_json()))
    title, _, words = figure.layout.title.text.partition("<br>")
    assert title
    assert words.startswith("<sub>") and words.endswith(".</sub>"), "a sentence says what it shows"


def test_the_figures_draw_what_the_history_says() -> None:
    """The best trial's losses by rung, every second of the budget, the best so far over GPU seconds."""
    history = whole_run().history
    best = plots.rungs(history).data[-1]
    assert ("trial 3, the best", [1.0, 1.0, 0.9]) == (best["name"], best["y"][:3])
    (bars,) = plots.budget(history).data
    assert history.opened is not None
    assert pytest.approx(history.opened.budget_seconds) == sum(bars["x"])
    assert "not used" == bars["y"][-1]
    dots, line = plots.loss_over_time(history).data
    assert [1, 2, 3, 4, 7, 8, 9] == dots["x"]
    assert [1.875, 1.75, 1.5, 1.0, 0.9, 0.9] == line["y"]
    assert ["rung 0<br>10 s", "rung 1<br>30 s", "full run<br>90 s"] == (
        plots.rungs(history).layout["xaxis"]["ticktext"]
    )


def test_a_going_run_shows_what_may_go_on_and_what_is_left() -> None:
    """Paused and running trials are apart from the best; the rest of the budget is a bar."""
    figure = plots.rungs(going().history)
    assert ["may go on", "trial 2, the best"] == [trace["name"] for trace in figure.data]
    assert "left" == plots.budget(going().history).data[0]["y"][-1]


def test_losses_over_a_wide_range_are_drawn_on_a_logarithmic_axis_with_whole_labels() -> None:
    """Where they differ by more than a factor of four, with labels at 1, 2 and 5 of each power of ten."""
    story = Story.planned()
    for loss in (2.0, 0.7):
        story.train(story.trial(), loss)
    assert "type" not in plots.rungs(story.history).layout["yaxis"]
    story.train(story.trial(), 0.3)
    axis = plots.rungs(story.history).layout["yaxis"]
    assert ("log", "D2", ".3~g") == (axis["type"], axis["dtick"], axis["tickformat"])


def test_the_plots_of_a_long_run_stay_small() -> None:
    """Two hundred trials are a few dozen rows of the study, whatever the digits of their losses."""
    story = Story.planned()
    for number in range(200):
        story.train(story.trial(params(8, 1e-4 * (1 + number / 7))), 1 + 1 / (number + 3))
    assert sum(len(draw(story.history).to_json()) for draw in plots.PLOTS) < 30_000


# ------------------------------------------------------------------------- when it writes


class Watch:
    """Counts what is written, on a clock that stands until it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.cost, self.written = 100.0, 0.0, 0
        monkeypatch.setattr(Showcase, "_note", self.note)

    def showcase(self) -> Showcase:
        """One that lives by this clock."""
        return Showcase(None, now=lambda: self.now)

    def note(self, *arguments: Any) -> None:
        """Takes the time that writing takes."""
        self.written += 1
        self.now += self.cost


def test_notes_and_plots_are_written_when_losses_change_but_not_too_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a rung's end, again half a minute later if something changed, and always at the end of the run."""
    story, watch = Story.planned(), Watch(monkeypatch)
    story.watchers.append(
        Watching(StudyMirror(optuna.storages.InMemoryStorage(), "run", showcase=watch.showcase()))
    )
    counts = []
    for loss, later in ((1.5, 0.0), (1.4, 29.0), (1.3, 2.0), (1.2, 0.0)):
        watch.now += later
        story.train(story.trial(), loss)
        counts.append(watch.written)
    first, second, third, fourth = counts
    assert 0 < first == second < third == fourth
    story.finish()
    assert watch.written > fourth


def test_the_end_of_a_run_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one note takes a second and more, nothing further is begun; the trials are told all the same."""
    storage = optuna.storages.InMemoryStorage()
    watch = Watch(monkeypatch)
    watch.cost = 1.5
    StudyMirror(storage, "run", showcase=watch.showcase()).catch_up(whole_run().history)
    assert 1 == watch.written
    assert "COMPLETE" in {trial.state.name for trial in storage.get_all_trials(0)}


# ------------------------------------------------------------------------------ the files


def test_the_files_of_a_run_are_artifacts_of_its_study(tmp_path: Path) -> None:
    """Adapter and report can be fetched, as they stand now, and are there once however often it is asked."""
    folder = run_folder(tmp_path / "run", whole_run()).path
    url = f"sqlite:///{folder / 'study.sqlite'}"
    for _ in range(2):
        StudyMirror(url, "run", showcase=Showcase(folder, now=still)).catch_up(whole_run().history)
    moved = folder.rename(tmp_path / "moved")
    store = optuna.artifacts.FileSystemArtifactStore(moved / "artifacts")
    ask = shown_by(optuna.storages.RDBStorage(f"sqlite:///{moved / 'study.sqlite'}"), store)
    listed = {a["filename"]: a["artifact_id"] for a in ask("/api/studies/1")["artifacts"]}
    assert {"adapter_model.safetensors", "adapter_config.json", "report.md"} == set(listed)
    (moved / "adapter" / "adapter_model.safetensors").write_bytes(b"better")
    assert b"better" == ask(f"/artifacts/1/{listed['adapter_model.safetensors']}")
    assert b"# Report\n" == ask(f"/artifacts/1/{listed['report.md']}")


def test_the_report_is_linked_before_it_is_written(tmp_path: Path) -> None:
    """The run writes it when the study has been closed already; the link waits for it."""
    folder = run_folder(tmp_path / "run", whole_run()).path
    (folder / "report.md").unlink()
    links = artifacts.MemoryLinks()
    storage = optuna.storages.InMemoryStorage()
    StudyMirror(storage, "run", showcase=Showcase(folder, links, now=still)).catch_up(whole_run().history)
    ask = shown_by(storage, links)
    listed = {a["filename"]: a["artifact_id"] for a in ask("/api/studies/0")["artifacts"]}
    (folder / "report.md").write_text("written at last")
    assert b"written at last" == ask(f"/artifacts/0/{listed['report.md']}")


def test_a_folder_in_which_nothing_can_be_made_costs_only_the_links(tmp_path: Path) -> None:
    """Trials, notes and plots are written all the same."""
    folder = run_folder(tmp_path / "run", whole_run()).path
    (folder / "artifacts").write_text("a file in the way")
    storage = optuna.storages.InMemoryStorage()
    mirror = StudyMirror(storage, "run", showcase=Showcase(folder, now=still))
    mirror.catch_up(whole_run().history)
    shown = shown_by(storage)("/api/studies/0")
    assert 6 == len(shown["trials"])
    assert 3 == len(shown["plotly_graph_objects"])


# ------------------------------------------------------------------------------- the view


def test_several_runs_stand_in_one_view(tmp_path: Path) -> None:
    """Each run is a study of its folder's name, and two of one name are told apart."""
    folders = [run_folder(tmp_path / name, whole_run()) for name in ("a/mine", "b/mine", "other")]
    names = [study.study_name for study in View(folders).storage.get_all_studies()]
    assert [str(tmp_path / "a/mine"), str(tmp_path / "b/mine"), "other"] == names


def test_a_going_run_is_followed(tmp_path: Path) -> None:
    """What the ledger gains is in the view after the next look, and a ledger that is gone changes nothing."""
    story = going()
    folder = run_folder(tmp_path / "run", story, 12)
    view = View([folder])
    before = len(view.storage.get_all_trials(0))
    append(folder.path, story, 12)
    view.refresh()
    statuses = {t.user_attrs["trial_id"]: t.user_attrs["status"] for t in view.storage.get_all_trials(0)}
    assert before < len(statuses)
    assert STATES == statuses
    folder.ledger.write_bytes(b"no ledger at all")
    view.refresh()
    assert len(statuses) == len(view.storage.get_all_trials(0))


def test_what_is_deleted_in_the_browser_is_gone_from_the_view_only(tmp_path: Path) -> None:
    """The run's ledger, study and files stay, byte for byte."""
    folder = run_folder(tmp_path / "run", whole_run())
    StudyMirror(f"sqlite:///{folder.study}", "run", showcase=Showcase(folder.path, now=still)).catch_up(
        whole_run().history
    )
    before = contents(folder.path)
    view = View([folder])
    ask = shown_by(view.storage, view.links)
    ask("/api/studies/0", "DELETE")
    assert [] == ask("/api/studies")["study_summaries"]
    assert before == contents(folder.path)


def test_one_run_twice_is_refused(tmp_path: Path) -> None:
    """Two studies of one name cannot be told apart."""
    folder = run_folder(tmp_path / "run", whole_run())
    result = CliRunner().invoke(app, ["dashboard", str(folder.path), str(folder.path / "..") + "/run"])
    assert 2 == result.exit_code
    assert "none of them twice" in result.output


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    """The message says which flag to change."""
    folder = run_folder(tmp_path / "run", whole_run())
    with socket.socket() as taken:
        taken.bind((dashboard.HOST, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["dashboard", str(folder.path), "--port", port])
    assert 2 == result.exit_code
    assert "leave it out: then the next free one is taken" in result.output.replace("\n", " ")
    assert "http://" not in result.output, "no address of a server that is not there"


def test_without_a_port_the_next_free_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that is printed is the one that answers; 8080 itself is not needed."""
    folder = run_folder(tmp_path / "run", whole_run())
    said: list[str] = []

    def ask() -> None:
        with urllib.request.urlopen(said[0].split()[0] + "/api/meta", timeout=30) as answer:
            said.append(answer.read().decode())

    def once(server: TcpWSGIServer) -> None:
        """Answer one question, as a browser on this machine asks it."""
        asking = threading.Thread(target=ask)
        asking.start()
        while asking.is_alive():
            server.asyncore.loop(timeout=0.1, map=server._map, count=1)

    monkeypatch.setattr(TcpWSGIServer, "run", once)
    with socket.socket() as taken:
        taken.bind((loopback.HOST, 0))
        taken.listen()
        number = taken.getsockname()[1]
        monkeypatch.setattr(loopback, "DEFAULT_PORT", number)
        monkeypatch.setattr(dashboard, "DEFAULT_PORT", number)
        dashboard.serve([folder], None, said.append)
        assert f"(port {number} is in use)" in said[0]
        assert "artifact_is_available" in said[1]
        monkeypatch.setattr(loopback, "TRIED_PORTS", 1)
        with pytest.raises(UsageError, match="can be used"):
            dashboard.serve([folder], None, said.append)
    assert 2 == len(said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_idle_connections_hold_up_neither_the_page_nor_the_end(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Browsers open some in advance, and a request may stay half sent."""
    run_folder(tmp_path / "run", whole_run())
    site = Site({"run": tmp_path / "run"})
    try:
        with contextlib.ExitStack() as open_:
            for sent in [b""] * 10 + [b"GET /api/studies HTTP/1.1\r\nHost: "] * 10:
                idle = open_.enter_context(socket.create_connection((dashboard.HOST, site.port)))
                idle.sendall(sent)
            assert 1 == len(site.get("/api/studies")["study_summaries"])
            site.process.send_signal(number)
            assert site.process.wait(5) in (0, -number)
    finally:
        site.process.kill()


@pytest.mark.parametrize(
    ("host", "origin", "served"),
    [
        ("localhost:8080", None, True),
        ("127.0.0.1:9000", "http://127.0.0.1:9000", True),
        ("[::1]:8080", None, True),
        ("LOCALHOST", None, True),
        ("evil.example:8080", None, False),
        ("127.0.0.1.evil.example", None, False),
        ("evil.example@127.0.0.1", None, False),
        ("127.0.0.1:8080/evil", None, False),
        ("127.0.0.1:port", None, False),
        ("", None, False),
        ("localhost:8080", "https://evil.example", False),
        ("localhost:8080", "null", False),
    ],
)
def test_only_requests_to_this_machine_by_name_are_answered(
    host: str, origin: str | None, served: bool
) -> None:
    """A page that rebinds its name to 127.0.0.1, or posts here from elsewhere, learns and changes nothing."""
    asked: list[str] = []

    def application(environment: dict[str, Any], start: Any) -> list[bytes]:
        start("200 OK", [])
        return [b"secret"]

    environment: dict[str, Any] = {"HTTP_HOST": host, **({"HTTP_ORIGIN": origin} if origin else {})}
    body = loopback.guarded(application)(environment, lambda status, headers: asked.append(status))
    expected = (["200 OK"], b"secret") if served else (["403 Forbidden"], loopback.REFUSAL)
    assert expected == (asked, b"".join(body))


# ------------------------------------------------------------------------- in the browser


class Site:
    """``budgetsearch dashboard`` in a process of its own, and what it serves."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        with socket.socket() as free:
            free.bind((dashboard.HOST, 0))
            self.port = free.getsockname()[1]
        words = [*(str(path) for path in folders.values()), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "budgetsearch", "dashboard", *words],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(self._answer, bool, "an answer of the dashboard")
        studies = self.get("/api/studies")["study_summaries"]
        self.ids = {study["study_name"]: study["study_id"] for study in studies}

    def _answer(self) -> str:
        assert self.process.poll() is None, "the dashboard has ended"
        try:
            return str(self.get("/api/meta"))
        except OSError:
            return ""

    def get(self, path: str) -> Any:
        """JSON from the server."""
        with urllib.request.urlopen(f"http://{dashboard.HOST}:{self.port}{path}", timeout=30) as answer:
            return json.load(answer)

    def page(self, name: str, rest: str = "") -> str:
        """The address of a study's page."""
        return f"http://{dashboard.HOST}:{self.port}/dashboard/studies/{self.ids[name]}{rest}"

    def end(self) -> int:
        """Ctrl-C; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """One browser for all pages."""
    with browser_page() as found:
        yield found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A finished and a going run in one dashboard."""
    place = tmp_path_factory.mktemp("runs")
    run_folder(place / "finished", whole_run())
    run_folder(place / "going", going())
    found = Site({name: place / name for name in ("finished", "going")})
    yield found
    assert 0 == found.end()


@pytest.mark.browser
def test_a_finished_run_in_the_browser(page: Page, site: Site) -> None:
    """The page draws three plots, lists the rungs with their unit and names the files; notes are there."""
    page.open(site.page("finished").rsplit("/studies", 1)[0])
    page.wait_for_text("finished", "going")
    page.open(site.page("finished"))
    page.wait_for_text(
        *TITLES, "rung 1 (30 s)", "3000 tokens under fp32", "Best Trial (number=3)",
        "trial 3, the best", "adapter_model.safetensors", "report.md",
    )  # fmt: skip
    page.open(site.page("finished", "/note"))
    page.wait_for_text(
        "Finished (the budget is used)",
        "task accuracy (n = 4, exact match of the text)",
        "75.0%",
        "full run (90 s)",
    )
    assert "2.0000" in page.run("[...document.querySelectorAll('td')].map(cell => cell.innerText)")
    page.open(site.page("finished", "/trials?numbers=3"))
    text = page.wait_for_text("Trial 3: done, its adapter is exported", "status done")
    assert "0.9000 at full run (90 s)" in text
    assert "Complete" in text


@pytest.mark.browser
def test_a_going_run_in_the_browser(page: Page, site: Site) -> None:
    """Every state of a going run can be read, and what happens next comes by itself."""
    for number, status in STATES.items():
        page.open(site.page("going", f"/trials?numbers={number}"))
        page.wait_for_text(f"Trial {number} (trial_id=", f"status {status}")
    page.open(site.page("going", "/note"))
    page.wait_for_text("Full run: ", "trial 2", "1.1250", "promoted", "infeasible")
    story = going()
    told = len(story.entries)
    segment = next(s for some in story.history.running.values() for s in some if s.trial_id == 1)
    story.end(segment, 1.0)
    story.add(Exported(1, "checkpoint", "adapter", False))
    append(site.folders["going"], story, told)
    began = time.monotonic()
    wait_until(
        lambda: str(site.get(f"/api/studies/{site.ids['going']}")["note"]),
        lambda text: "1.0000" in text,
        "news",
    )
    assert time.monotonic() - began < 60
    page.open(site.page("going", "/trials?numbers=1"))
    page.wait_for_text("status paused", "1.0000 at rung 1 (30 s)", "its adapter is exported")
