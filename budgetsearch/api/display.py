"""What a search shows: a live display in a terminal or a notebook, plain lines elsewhere, and the log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from budgetsearch.core.ports import Say, Watcher
from budgetsearch.views.progress import LiveProgress, PlainProgress
from budgetsearch.views.terminal import Terminal

LOGGER = logging.getLogger("budgetsearch")
"""Takes at INFO what is said of the preparation, and whatever else is no event of a run."""


def log(line: str) -> None:
    """Log one line about what is going on."""
    LOGGER.info("%s", line)


@contextmanager
def display(wanted: bool | None) -> Iterator[tuple[list[Watcher], Say]]:
    """Show a search; yields what sees its events, and what takes lines about it.

    ``wanted``: None shows it only where a live display can stand; True shows plain lines elsewhere.
    """
    live = sys.stdout.isatty() or Terminal().is_jupyter
    if wanted is False or (wanted is None and not live):
        yield [], log
    elif live:
        with LiveProgress(Terminal()) as shown:
            yield [shown], _logged(shown.say)
    else:
        plain = PlainProgress(lambda line: print(line, flush=True))
        yield [plain], _logged(plain.say)


def _logged(show: Say) -> Say:
    def say(line: str) -> None:
        log(line)
        show(line)

    return say
