"""How a process of the command line ends: with the right code and in time, whatever hangs or fails there."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from budgetsearch import api, cli
from budgetsearch.run import conclusion as concluding_module
from budgetsearch.run import session as compose
from budgetsearch.run.process import EXIT_OVERDUE
from budgetsearch.storage.runfolder import RunFolder
from tests.support.faults import fastrun
from tests.support.faults.kills import preload
from tests.support.faults.proofs import check_end

Arrange = Callable[[], None]


@pytest.fixture(scope="module")
def place() -> Iterator[fastrun.Place]:
    """A folder for fast runs."""
    preload()
    folder = Path(tempfile.mkdtemp(prefix="leaving-"))
    yield fastrun.Place(folder).make()
    shutil.rmtree(folder, ignore_errors=True)


def fork(place: fastrun.Place, run: Path, arrange: Arrange, log: Path) -> int:
    """``budgetsearch run`` as a process of its own, as far as a fork can be one; returns its exit code."""
    given = place.arguments(run, max_trials=4)

    def work() -> None:
        os.environ["BUDGETSEARCH_CACHE"] = str(place.path / "cache")
        fastrun.install()
        fastrun.FastEngine.empty_poll = 0.5  # a worker that a loaded machine slows is awaited
        sys.argv = ["budgetsearch", "run", *(f"--{k.replace('_', '-')}={v}" for k, v in given.items())]
        arrange()
        cli.main()

    return fastrun.wait_for(fastrun.forked(work, log))


def nobody_reads() -> None:
    """Output and errors go to a pipe that is full."""
    _, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"." * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    for fd in (1, 2):
        os.dup2(writer, fd)


def test_a_run_whose_output_nobody_reads_ends_well(place: fastrun.Place) -> None:
    """``budgetsearch run | less``, and nobody turns the page."""
    run = place.path / "runs" / "unread"
    assert fork(place, run, nobody_reads, place.log) == 0
    check_end(run, loads=False)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
@pytest.mark.parametrize("step", ["resolve", "prepare_inputs"])
def test_a_signal_before_the_search_has_its_own_exit_code(
    place: fastrun.Place, number: signal.Signals, code: int, step: str
) -> None:
    """While settings are checked or the model is fetched: a scheduler presses no Ctrl-C. Nothing stays."""
    run, log = place.path / "runs" / f"{step}-{number.name}", place.path / f"{step}-{number.name}.log"

    def arrange() -> None:
        setattr(compose, step, lambda *given: os.kill(os.getpid(), number))

    assert fork(place, run, arrange, log) == code
    assert not run.exists()
    assert log.read_text(encoding="utf-8").splitlines()[-1] == "stopped at once"


# ---------------------------------------------------------------------- what follows the search


def concluding(tmp: Path, during: Callable[[], None]) -> Arrange:
    """Something happens while the reports are written; the mark says that the run was locked then."""

    def arrange() -> None:
        def work(folder: RunFolder, *more: object) -> str:
            if folder.in_use():
                tmp.touch()
            during()
            return ""

        concluding_module.write_in_time = work

    return arrange


def fail() -> None:
    """No OSError: an error that nobody foresaw."""
    raise ZeroDivisionError("of mysql://me:s3cret@db")


def stop() -> None:
    """A scheduler's signal."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@pytest.mark.parametrize(
    ("during", "line"),
    [(fail, "the reports could not be written: ZeroDivisionError"), (stop, "stopped before the reports")],
)
def test_reports_that_cannot_be_written_leave_a_finished_run_finished(
    place: fastrun.Place, tmp_path: Path, during: Callable[[], None], line: str
) -> None:
    """The exit code stays 0, the adapter stands, and the command that writes them is named."""
    run, log, mark = (
        place.path / "runs" / during.__name__,
        place.path / f"{during.__name__}.log",
        tmp_path / "m",
    )
    assert fork(place, run, concluding(mark, during), log) == 0, log.read_text(encoding="utf-8")
    said = log.read_text(encoding="utf-8")
    assert line in said
    assert f"budgetsearch report {run}` writes them" in said
    assert "s3cret" not in said
    (run / "traceback.log").unlink(missing_ok=True)
    assert mark.exists(), "the run was not locked while it was concluded"
    api.report(run)
    check_end(run, loads=False)


def test_reports_that_hang_do_not_pass_the_deadline(place: fastrun.Place, tmp_path: Path) -> None:
    """The last resort is there until the end."""

    def hang() -> None:
        fastrun.CLOCKS[-1].leap(1e6)
        time.sleep(60)

    run, log = place.path / "runs" / "hang", place.path / "hang.log"
    assert fork(place, run, concluding(tmp_path / "m", hang), log) == EXIT_OVERDUE
    api.report(run)
    check_end(run, loads=False)
