"""What a failed run tells its user: where it lies, what is safe, and the command that goes on."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from budgetsearch.cli import app
from budgetsearch.core.errors import EngineError, RunFolderError
from budgetsearch.core.events import Charged, Closed
from budgetsearch.core.history.history import History
from budgetsearch.core.policy.answers import MISSING
from budgetsearch.core.policy.decide import IN_VAIN
from budgetsearch.core.records import Segment
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.machine.clock import budget_of_resumed, deadline_of
from budgetsearch.run import driver
from budgetsearch.run.failure import (
    Facts,
    after_failure,
    aftermath,
    go_on,
    keep_traceback,
    marked,
    run_of,
)
from budgetsearch.storage.files import local_time
from budgetsearch.storage.ledger import read_entries, read_history
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.tools.simulate.invariants import check
from tests.support.factories import Story, params, whole_run
from tests.support.faults import fastrun
from tests.support.faults.kills import preload
from tests.support.faults.proofs import check_end
from tests.support.simulation import make_driver

WALL = 1.8e9


def facts(adapter: bool = True, path: str = "runs/mine", trial: int | None = None) -> Facts:
    """Of a folder."""
    return Facts(Path(path), adapter, trial, WALL, 42)


# ------------------------------------------------------------------------------- the lines


def test_a_run_with_results_says_all_of_it() -> None:
    """Path, time, adapter, trials, best loss, the ledger's end, the command."""
    story = Story.planned()
    story.train(story.trial(), 1.5)
    story.train(story.trial(params(16)), 1.25)
    story.trial(params(4))
    assert aftermath(facts(), story.history) == [
        f"run   runs/mine: {story.history.spent:.0f} of 720 s spent",
        "safe  the adapter in runs/mine/adapter; 2 trials tried, the best loss 1.2500 (trial 1)",
        f"      the ledger: 42 events until {local_time(WALL)}",
        "Go on with:  budgetsearch resume runs/mine",
    ]


def test_a_run_without_results_promises_none() -> None:
    """Neither adapter nor loss."""
    lines = aftermath(facts(adapter=False), Story.planned().history)
    assert "safe  no adapter yet; 0 trials tried, none with a loss yet" in lines


def test_a_run_that_had_not_begun_has_nothing_to_go_on_with() -> None:
    """No command that would only be refused."""
    assert ["Nothing was earned yet in runs/mine."] == aftermath(facts(), History())


def test_a_finished_run_is_reported_not_resumed() -> None:
    """What failed came after its end; the trial is named that the adapter itself names."""
    lines = aftermath(facts(trial=3), whole_run().history)
    assert "Go on with:  budgetsearch report runs/mine" == lines[-1]
    assert "the adapter of trial 3" in lines[1]


def spent(seconds: float, **settings: object) -> History:
    """Of a run of 720 s that has taken so many and failed."""
    story = Story.planned()
    opened = story.history.opened
    assert opened is not None
    story.history.opened = replace(opened, settings={**opened.settings, **settings})
    story.train(story.trial(), 1.5)
    story.history.spent = seconds
    story.add(Closed("failed", "DiskError: no room"))
    return story.history


def test_where_no_budget_is_left_the_command_gives_it_more() -> None:
    """With less than the reserve a resume could not train, perhaps not even end: it is proposed with hours
    that leave the reserve and something to spend, and the report is named for whoever has none."""
    assert "Go on with:  budgetsearch resume runs/mine" == aftermath(facts(), spent(600.0))[-1]
    for seconds in (661.0, 719.0, 800.0):
        *_, told, command = aftermath(facts(), spent(seconds))
        assert "too little budget is left, so the command gives it more in all" in told
        assert "budgetsearch report runs/mine" in told
        head, _, hours = command.rpartition(" ")
        assert "Go on with:  budgetsearch resume runs/mine --hours" == head
        assert budget_of_resumed(float(hours), seconds, 720.0) >= seconds + 360.0


def test_a_run_in_vain_is_not_to_be_repeated_with_the_same_hours() -> None:
    """What was left did not do for one trial: the same again would only take more of it."""
    history = spent(300.0)
    history.closed = Closed("failed", f"another full run needs 47 s: 4 s {MISSING}, {IN_VAIN}")
    told = aftermath(facts(adapter=False), history)
    assert told[-1].startswith("Go on with:  budgetsearch resume runs/mine --hours ")
    assert "too little budget is left" in told[-2]
    history.closed = Closed("failed", f"nothing of the search space fits into memory, {IN_VAIN}")
    assert "Go on with:  budgetsearch resume runs/mine" == aftermath(facts(adapter=False), history)[-1]


def test_a_run_with_a_deadline_is_given_another_one() -> None:
    """Hours do not move it, and it does not wait while nobody works on it."""
    command = go_on(Path("runs/mine"), spent(100.0, deadline="2026-11-24T18:00"))
    head, _, until = command.rpartition(" ")
    assert "budgetsearch resume runs/mine --deadline" == head
    assert deadline_of(until) > time.time() + 300.0


def test_the_command_with_more_hours_goes_on_to_the_end(tmp_path: Path) -> None:
    """The budget went by while the process hung: the driver takes the new one, trains with it, and keeps
    every promise."""
    path = tmp_path / "ledger.sqlite"
    clock = VirtualClock(2.0)
    first = make_driver(path, clock=clock)
    first.stop_requested = lambda: "SIGTERM" if clock.now() > 400 else ""
    history = first.run()
    clock.advance(718.0 - clock.now())
    first.ledger.append(Charged("down", clock.now() - history.spent), clock)
    first.ledger.close()
    hours = float(go_on(path.parent, history).rpartition(" --hours ")[2])
    budget = budget_of_resumed(hours, history.spent, 720.0)
    again = make_driver(path, budget=budget, clock=VirtualClock(history.spent + 2.0))
    done, before = again.run(), len(history.results)
    again.ledger.close()
    check(list(read_entries(path)), budget, replay=True)
    assert done.closed is not None
    assert "finished" == done.closed.state
    assert len(done.results) > before


@pytest.mark.parametrize("path", ["my runs/a", "it's", "$HOME/x", "a;b"])
def test_the_command_can_be_pasted_whatever_the_folder_is_called(path: str) -> None:
    """A shell takes it apart into the same three words."""
    command = aftermath(facts(path=path), Story.planned().history)[-1].removeprefix("Go on with:  ")
    assert ["budgetsearch", "resume", path] == shlex.split(command)


def test_a_ledger_that_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    """There may still be an adapter; no command is promised to work."""
    (tmp_path / "ledger.sqlite").write_bytes(b"rubbish" * 999)
    (tmp_path / "adapter").mkdir()
    assert [f"run   {tmp_path}: its ledger cannot be read, the adapter in it can be used"] == after_failure(
        tmp_path
    )


def test_of_a_folder_that_is_gone_nothing_is_told(tmp_path: Path) -> None:
    """A run that never began takes its folder away."""
    assert [] == after_failure(tmp_path / "gone")
    with pytest.raises(ValueError, match="x") as caught, marked(tmp_path / "gone"):
        raise ValueError("x")
    assert run_of(caught.value) is None


def test_a_traceback_is_kept_without_passwords(tmp_path: Path) -> None:
    """An error may quote the storage's URL; a second one is added, not written over the first."""
    try:
        raise ValueError("cannot connect to mysql://me:s3cret@db/x")
    except ValueError as error:
        path = keep_traceback(error, tmp_path)
        keep_traceback(error, tmp_path)
    assert path is not None
    text = path.read_text(encoding="utf-8")
    assert text.count("ValueError: cannot connect to mysql://me:***@db/x") == 2
    assert "test_a_traceback_is_kept" in text
    assert "s3cret" not in text


# ------------------------------------------------------------------ through the command line


@pytest.fixture(scope="module")
def place() -> Iterator[fastrun.Place]:
    """A folder for fast runs, with a space in its name."""
    preload()
    folder = Path(tempfile.mkdtemp(prefix="after math-"))
    yield fastrun.Place(folder).make()
    shutil.rmtree(folder, ignore_errors=True)


def command(place: fastrun.Place, log: Path, arguments: list[str], arrange: Callable[[], None]) -> int:
    """The command line in a fork; what it prints goes to ``log``."""

    def work() -> None:
        os.environ["BUDGETSEARCH_CACHE"] = str(place.path / "cache")
        fastrun.install()
        arrange()
        result = CliRunner().invoke(app, arguments)
        print(result.output)
        sys.stdout.flush()
        os._exit(result.exit_code)

    return fastrun.wait_for(fastrun.forked(work, log))


def start(place: fastrun.Place, run: Path) -> list[str]:
    """Arguments of a run."""
    given = place.arguments(run, max_trials=4)
    return ["run", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]


def failing(error: Exception) -> Callable[[], None]:
    """The search meets an error once the first trials have a loss."""

    def arrange() -> None:
        decide = driver.decide

        def fail(plan: object, history: History, *more: object) -> object:
            if history.incumbent is not None:
                raise error
            return decide(plan, history, *more)  # type: ignore[arg-type]

        driver.decide = fail  # type: ignore[assignment]

    return arrange


def two_interrupts() -> None:
    """Somebody presses Ctrl-C twice in the middle of the second trial's segment."""

    def press(segment: Segment) -> None:
        if segment.trial_id == 1:
            for _ in range(2):
                os.kill(os.getppid(), signal.SIGINT)
                time.sleep(0.3)

    fastrun.BEHAVIOUR.during = press
    fastrun.BEHAVIOUR.heeds_cancel = False
    fastrun.FastEngine.empty_poll = 0.5


@pytest.mark.parametrize(
    ("name", "arrange", "code", "message"),
    [
        ("ours", failing(EngineError("the worker is gone")), 1, "error: the worker is gone"),
        ("unforeseen", failing(ZeroDivisionError("by mysql://me:s3cret@db")), 1, "error: ZeroDivisionError"),
        ("interrupted", two_interrupts, 130, "stopped at once"),
    ],
)
def test_a_run_that_fails_says_what_is_safe_and_its_command_goes_on_to_the_end(
    place: fastrun.Place, name: str, arrange: Callable[[], None], code: int, message: str
) -> None:
    """An error of ours, one that nobody foresaw, a second Ctrl-C: one message, no traceback on the screen,
    and the printed command finishes the run."""
    run, log = place.path / "runs" / name, place.path / f"{name}.log"
    assert command(place, log, start(place, run), arrange) == code, log.read_text(encoding="utf-8")
    said = log.read_text(encoding="utf-8")
    assert message in said
    assert said.count("error:") == (code == 1)
    assert "Traceback" not in said
    assert "s3cret" not in said
    assert f"run   {run}: " in said
    history = read_history(run / "ledger.sqlite")
    best = history.incumbent
    if best is not None:
        assert f"{run / 'adapter'}; " in said
        assert f"the best loss {best.best_loss:.4f} (trial {best.trial_id})" in said
    if name == "unforeseen":
        assert f"The traceback is in {run / 'traceback.log'}." in said
        assert "Traceback" in (run / "traceback.log").read_text(encoding="utf-8")
        (run / "traceback.log").unlink()
    (line,) = [line for line in said.splitlines() if line.startswith("Go on with:")]
    words = shlex.split(line.removeprefix("Go on with:"))
    assert ["budgetsearch", "resume", str(run)] == words
    wrong = log.with_suffix(".wrong")
    assert command(place, wrong, [*words[1:], "--deadline=tomorrow"], lambda: None) == 2
    assert line in wrong.read_text(encoding="utf-8")
    assert command(place, log.with_suffix(".again"), words[1:], lambda: None) == 0
    check_end(run, loads=False)


def cut(ledger: Path) -> None:
    """Its last pages are gone."""
    os.truncate(ledger, ledger.stat().st_size - 5000)


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_damaged_ledger_is_said_by_status_and_mended_by_resume(
    place: fastrun.Place, damage: Callable[[Path], None]
) -> None:
    """Both say it on the screen; ``status`` leaves everything as it is."""
    run, log = place.path / "runs" / damage.__name__, place.path / "damaged.log"
    assert command(place, log, start(place, run), failing(EngineError("gone"))) == 1
    damage(run / "ledger.sqlite")
    before = {path.name: path.read_bytes() for path in run.glob("ledger.*")}
    seen = subprocess.run(
        [sys.executable, "-m", "budgetsearch", "status", str(run)], capture_output=True, text=True, check=True
    )
    assert ", failed" in seen.stdout
    assert seen.stderr.count("is damaged") == 1
    assert f"budgetsearch resume {shlex.quote(str(run))}" in seen.stderr
    assert before == {name: (run / name).read_bytes() for name in before}
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder(run).check_free()
    again = place.path / "again.log"
    assert command(place, again, ["resume", str(run)], lambda: None) == 0, again.read_text(encoding="utf-8")
    assert "The ledger was damaged" in again.read_text(encoding="utf-8")
    check_end(run, loads=False, mended=True)
