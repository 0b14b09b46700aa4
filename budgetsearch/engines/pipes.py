"""Lines between two processes: sent without waiting, heard by a thread of their own."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from typing import IO, Any

from budgetsearch.core.codec import decode, read_json


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


def listen(pipe: IO[str], kind: Any, tell: Callable[[Any], None], name: str) -> None:
    """Decode each JSON line as a ``kind`` and tell it, in a thread of that name; None at the output's end."""

    def read() -> None:
        try:
            for line in pipe:
                tell(decode(kind, read_json(line)))
        except ValueError:
            pass  # half a line: the process ended while writing it
        finally:
            tell(None)

    threading.Thread(target=read, daemon=True, name=name).start()
