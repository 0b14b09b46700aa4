"""Preparation in a process of its own, which is ended when it hangs or takes too much memory or time."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import psutil

from budgetsearch.core import errors
from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import DataError, LateError
from budgetsearch.core.ports import Say
from budgetsearch.machine import child
from budgetsearch.training.data.preparer import AT, MODULE, NOTHING, PROBE, SLOTS, Task
from budgetsearch.training.data.samples import sample_in
from budgetsearch.training.data.scan import SAMPLES

ROW_SECONDS = 10.0
"""In which one row must be read, rendered and tokenized: a loop in a template would go on for ever."""
MOST_BYTES = 4 << 30
"""Of memory that all processes together may hold, ..."""
MOST_SHARE = 0.75
"""... or this share of the machine's, where that is less."""
LOOK_SECONDS = 0.2
LOG = "log"


def prepare_apart(task: Task, say: Say, seconds_left: Callable[[], float] | None = None) -> dict[str, Any]:
    """Let a process of its own do the work of ``preparer.work``; returns what that returns.

    ``seconds_left``: until it must be done; None: no limit.

    Raises:
        UsageError: what the work raised; DataError: it hung, took too much memory or time, or died.
    """
    folder = Path(task.folder)
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            child.python(MODULE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=child.environment({"TOKENIZERS_PARALLELISM": "false"}),
            cwd=child.NEUTRAL,
            start_new_session=True,
        )
    watch = _Watch(process, folder, seconds_left)
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(dataclasses.asdict(task)).encode() + b"\n")
        process.stdin.flush()
        return _answer(process, watch, say)
    except BrokenPipeError:
        raise DataError(_died(process, folder)) from None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # those that it started with it
        except ProcessLookupError:
            pass
        process.wait()


def _answer(process: subprocess.Popen[bytes], watch: _Watch, say: Say) -> dict[str, Any]:
    """What it has to say in the end."""
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(process, lines), daemon=True, name="preparer").start()
    while True:
        try:
            line = lines.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            watch.look()
            continue
        if line is None:
            raise DataError(_died(process, watch.folder))
        message: Mapping[str, Any] = read_json(line.decode("utf-8", "replace"))
        if "say" in message:
            say(str(message["say"]))
        elif "samples" in message:
            say(f"tokenizing {message['samples']} of {message['rows']} rows")
        elif "error" in message:
            kind = getattr(errors, str(message["kind"]), DataError)
            raise kind(str(message["error"]))
        elif "done" in message:
            return dict(message["done"])


def listen(process: subprocess.Popen[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    """Hear what a process says, line by line, then None."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _died(process: subprocess.Popen[bytes], folder: Path) -> str:
    words = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    where = _place(folder, _at(folder))
    return (
        f"the process that prepares the data died{f' at {where}' if where else ''}: "
        f"{words[-1][:300] if words else f'exit code {process.wait()}'}; look at that row, or leave it out"
    )


class _Watch:
    """Looks at a process from outside."""

    def __init__(
        self, process: subprocess.Popen[bytes], folder: Path, seconds_left: Callable[[], float] | None
    ) -> None:
        self.folder = folder
        self._process, self._left = process, seconds_left
        self._began = time.monotonic()
        self._at: tuple[int, ...] = ()
        self._since = [self._began] * SLOTS
        self._most = most_bytes()

    def look(self) -> None:
        """Look once.

        Raises:
            DataError: it must end.
        """
        now, at = time.monotonic(), _at(self.folder)
        for slot, number in enumerate(at):
            if not self._at or number != self._at[slot] or number == NOTHING:
                self._since[slot] = now
        self._at = at
        slot = min(range(SLOTS), key=lambda one: self._since[one])
        if at and now - self._since[slot] > ROW_SECONDS:
            raise DataError(
                f"{_place(self.folder, at, slot)}: it takes more than {ROW_SECONDS:g} s to make its tokens; "
                "the chat template or the tokenizer does not come to an end; leave the row out, or choose "
                "another model or template"
            )
        if self._left is not None and self._left() <= 0:
            raise LateError(
                f"the data are not prepared after {now - self._began:.0f} s, and the budget leaves no more; "
                f"it was at {_place(self.folder, at) or 'the beginning'}. Give more --hours, or fewer rows "
                "with --max-rows"
            )
        if (held := held_bytes(self._process.pid)) > self._most:
            raise DataError(
                f"preparing the data takes {held / 2**30:.1f} GiB of memory, more than "
                f"{self._most / 2**30:.1f} GiB, at {_place(self.folder, at)}; leave that row out, or "
                "make it shorter"
            )


def _at(folder: Path) -> tuple[int, ...]:
    try:
        found = (folder / AT).read_bytes()
        return struct.unpack(f"<{SLOTS}q", found)
    except (OSError, struct.error):  # it has not begun
        return ()


def _place(folder: Path, at: tuple[int, ...], slot: int | None = None) -> str:
    """What is worked at, in words."""
    slots = [slot] if slot is not None else [one for one, number in enumerate(at) if number != NOTHING]
    if not at or not slots:
        return ""
    number = at[slots[0]]
    if number == PROBE:
        return "a question and an answer, the first that the chat template is given"
    if slots[0] == 0:
        return f"row {number + 1} of its source"
    try:
        starts = numpy.load(folder / "starts.npy", mmap_mode="r", allow_pickle=False)
        with (folder / SAMPLES).open("rb") as file:
            file.seek(int(starts[number]))
            return sample_in(file.readline()).place
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return f"sample {number + 1}"


def most_bytes() -> int:
    """Of memory that preparing data may hold."""
    return min(MOST_BYTES, int(MOST_SHARE * psutil.virtual_memory().total))


def held_bytes(pid: int) -> int:
    """Bytes of memory of a process and of those that it started, files that are mapped aside."""
    total = 0
    try:
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            memory = one.memory_info()
            total += memory.rss - memory.shared
    except psutil.Error:  # one of them has just ended
        pass
    return total
