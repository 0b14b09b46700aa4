"""How a process of the command line ends: with the right code and in time, whatever hangs or fails there."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from budgetsearch import cli, compose
from tests.faults import fastrun
from tests.faults.kills import preload
from tests.faults.proofs import check_end

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
@pytest.mark.parametrize("step", ["check", "prepare_inputs"])
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
