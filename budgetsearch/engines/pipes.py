"""Processes of ours: started with pipes, told JSON lines without waiting, heard by a thread of their own."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from budgetsearch.core.codec import decode, read_json
from budgetsearch.core.errors import DiskError
from budgetsearch.machine import child
from budgetsearch.storage.files import append_to, remedy

Said = TypeVar("Said")


def start(
    module: str,
    log: Path,
    *,
    keep_open: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    folder: str = child.NEUTRAL,
    new_session: bool = False,
) -> subprocess.Popen[str]:
    """Start a Python that runs a module of ours; what it and its libraries print is added to its ``log``.

    ``keep_open``: file descriptors that it inherits. ``folder``: its working folder.

    Raises:
        DiskError: the log cannot be written.
    """
    try:
        errors = append_to(log)
    except OSError as error:
        raise DiskError(
            f"The log {log} cannot be written ({error.strerror}); {remedy(error)}, then go on with "
            "`budgetsearch resume`."
        ) from error
    with errors:
        return subprocess.Popen(
            child.python(module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            pass_fds=tuple(keep_open),
            env=child.environment(environment),
            cwd=folder,
            start_new_session=new_session,
        )


class Outbox:
    """JSON lines on a process's input. A pipe holds 64 KiB; whoever writes more than is read waits."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True, name="outbox").start()

    def say(self, message: object) -> None:
        """Send JSON values as one line; returns at once."""
        self._lines.put(json.dumps(message) + "\n")

    def close(self) -> None:
        """End the process's input behind what has been said; returns at once."""
        self._lines.put(None)

    def _write(self) -> None:
        try:
            while (line := self._lines.get()) is not None:
                self._pipe.write(line)
                self._pipe.flush()
        except OSError:
            pass  # it just ended: the reader of its output reports that
        finally:
            try:
                self._pipe.close()
            except OSError:
                pass


def listen(process: subprocess.Popen[str], kind: Any, name: str) -> queue.SimpleQueue[Any]:
    """What a process says, each line decoded as a ``kind`` by a thread of that name; None at its end."""
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    output = process.stdout
    assert output is not None

    def read() -> None:
        try:
            for line in output:
                heard.put(decode(kind, read_json(line)))
        except ValueError:
            pass  # half a line: the process ended while writing it
        finally:
            heard.put(None)

    threading.Thread(target=read, daemon=True, name=name).start()
    return heard


def arrived(heard: queue.SimpleQueue[Said], timeout: float) -> Iterator[Said]:
    """All that has been heard; waits so many seconds for the first."""
    try:
        yield heard.get(timeout=timeout) if timeout > 0 else heard.get_nowait()
        while True:
            yield heard.get_nowait()
    except queue.Empty:
        return
