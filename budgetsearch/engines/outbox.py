"""What is said to a process, written by a thread: one that reads nothing holds nobody up."""

from __future__ import annotations

import json
import queue
import threading
from typing import IO


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
