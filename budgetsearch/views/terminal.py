"""What reaches the terminal: texts of models, data and ledgers steer it no more than they do a page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from budgetsearch.views.words import printable


def echo(text: object, err: bool = False) -> None:
    """Print a text; ``err``: on the error output."""
    typer.echo(printable(str(text)), err=err)


class Terminal(Console):
    """A console whose only control characters are its own; brackets in a text are no markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As any console does, and then clean."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)
