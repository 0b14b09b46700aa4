"""Output that nobody reads holds nothing up: neither the run, nor its end, nor its exit."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest

from budgetsearch.core.policy.deadline import ENDING
from budgetsearch.run import process as stopping
from budgetsearch.run.process import LEAVING_SECONDS, Outlet

LONG = 20.0
"""Seconds that nothing here takes, however busy the machine is."""


@dataclass
class Pipe:
    """A pipe that is full until somebody reads it."""

    reader: int
    stream: TextIO

    def read(self) -> str:
        """What is there now."""
        return os.read(self.reader, 1 << 20).decode()


@pytest.fixture
def full() -> Iterator[Pipe]:
    """A pipe without any room."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"." * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    stream = os.fdopen(writer, "w", encoding="utf-8")
    yield Pipe(reader, stream)
    os.close(reader)
    stream.close()


def test_writing_to_a_full_pipe_returns_at_once_and_what_is_read_later_is_whole(full: Pipe) -> None:
    """In the order in which it was written; only what exceeds the limit is left out, and that is said."""
    outlet = Outlet(full.stream, limit=100)
    for number in range(30):
        print(f"line {number:02}", file=outlet, flush=True)
    assert not outlet.drain(0.05)
    assert set(full.read()) == {"."}
    assert outlet.drain(LONG)
    outlet.write("later\n")
    assert outlet.drain(LONG)
    lines = full.read().splitlines()
    kept = len(lines) - 2
    assert [f"line {number:02}" for number in range(kept)] == lines[:kept]
    assert lines[kept:] == [f"[{30 - kept} lines are left out: nobody read them]", "later"]


def test_an_error_comes_after_the_output_before_it_but_does_not_wait_for_ever(full: Pipe) -> None:
    """Both may go to the same place; where nobody reads the output the error is said all the same, and only
    the first one has waited."""
    reader, writer = os.pipe()
    output = Outlet(full.stream)
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        errors = Outlet(stream, after=output)
        output.write("nobody reads this\n")
        began = time.monotonic()
        for _ in range(100):
            errors.write("error\n")
        assert time.monotonic() - began < LONG / 4
        assert errors.drain(LONG)
        assert os.read(reader, 1 << 16) == b"error\n" * 100
    os.close(reader)


def test_a_reader_that_has_gone_is_no_error(full: Pipe) -> None:
    """What is printed then goes nowhere."""
    outlet = Outlet(full.stream)
    outlet.write("a\n")
    reader, writer = os.pipe()
    os.dup2(reader, full.reader)  # the only reader of the full pipe is gone
    os.close(reader)
    os.close(writer)
    assert outlet.drain(LONG)
    outlet.write("b\n")
    assert outlet.drain(LONG)


def test_only_text_is_taken(full: Pipe) -> None:
    """click tells text from bytes by what is refused."""
    with pytest.raises(TypeError, match="bytes"):
        Outlet(full.stream).write(b"x")  # type: ignore[arg-type]


def ended(code: str, pipe: Pipe) -> tuple[int, float]:
    """The exit code of a process that prints into the full pipe, and the seconds that it took."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=pipe.stream, stderr=pipe.stream, stdin=subprocess.DEVNULL
    )
    try:
        return process.wait(2 * LONG), time.monotonic() - began
    finally:
        process.kill()


def test_the_last_resort_ends_a_process_whose_words_nobody_reads(full: Pipe, tmp_path: Path) -> None:
    """It kills and exits, whatever becomes of its message."""
    code = f"""
from pathlib import Path
from budgetsearch.engines.local import LocalEngine
from budgetsearch.machine.clock import RunClock, Timing
from budgetsearch.run import process as stopping
from budgetsearch.storage.runfolder import RunFolder
path = Path({str(tmp_path)!r})
engine = LocalEngine(None, path / "worker.log")
with stopping.ended_in_time(Timing(RunClock(), 1.5), engine, RunFolder(path), lambda: True):
    print("x" * 100_000, flush=True)
"""
    assert ended(code, full)[0] == stopping.EXIT_OVERDUE


def test_a_command_whose_output_nobody_reads_ends_with_its_code(full: Pipe) -> None:
    """What it printed is lost, its code is not."""
    code = """
from budgetsearch.run import process as leaving
leaving.free_output()
print("x" * 100_000, flush=True)
leaving.leave(7)
"""
    assert ended(code, full)[0] == 7


def test_what_hangs_at_the_exit_does_not_keep_the_process() -> None:
    """A library that waits for its server when Python ends."""
    code = """
import atexit, time
from budgetsearch.run import process as leaving
leaving.LEAVING_SECONDS = 0.2
atexit.register(time.sleep, 600)
leaving.leave(7)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=2 * LONG, check=False).returncode == 7
    assert ENDING["lines"] < LEAVING_SECONDS
