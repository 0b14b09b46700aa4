"""What is being asked, while it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID

from budgetsearch.core.ports import Say

Tick = Callable[[str, int, int], None]


@contextmanager
def asking(console: Console) -> Iterator[tuple[Say, Tick]]:
    """(takes a line, takes what is asked and how far it is): a bar in a terminal, lines in a pipe."""
    seen: dict[str, TaskID] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def tick(what: str, done: int, total: int) -> None:
            if what not in seen:
                for task in seen.values():
                    progress.remove_task(task)
                seen.clear()
                seen[what] = progress.add_task(escape(what), total=None)
                if not console.is_terminal:
                    console.print(f"asking {what}", markup=False, highlight=False, soft_wrap=True)
            if total:
                progress.update(seen[what], completed=done, total=total)

        yield lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True), tick
