"""What a process says, line by line: read by a thread, so that whoever waits for it can look at the clock."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import IO, Any

from budgetsearch.core.codec import decode


def listen(pipe: IO[str], kind: Any, tell: Callable[[Any], None], name: str) -> None:
    """Decode each JSON line as a ``kind`` and tell it, in a thread of that name; None at the output's end."""

    def read() -> None:
        try:
            for line in pipe:
                tell(decode(kind, json.loads(line)))
        except ValueError:
            pass  # half a line: the process ended while writing it
        finally:
            tell(None)

    threading.Thread(target=read, daemon=True, name=name).start()
