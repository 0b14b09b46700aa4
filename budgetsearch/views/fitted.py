"""Tables for terminals of any width."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """A heading and the cells below it."""

    heading: str
    cells: Sequence[str]
    right: bool = True


@dataclass(frozen=True)
class Fitted:
    """The first of several choices of columns that is not wider than the terminal, or else the last."""

    choices: Sequence[Sequence[Column]]
    title: str = ""
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(width=10_000)
        tables = map(self._table, self.choices)
        fitting = (t for t in tables if t.__rich_measure__(console, wide).maximum <= options.max_width)
        yield next(fitting, None) or self._table(self.choices[-1])

    def _table(self, columns: Sequence[Column]) -> Table:
        table = Table(
            title=self.title or None,
            caption=self.caption or None,
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        for column in columns:
            table.add_column(
                column.heading, justify="right" if column.right else "left", no_wrap=column.right
            )
        for cells in zip(*(column.cells for column in columns), strict=True):
            table.add_row(*cells)
        return table


def table_of(
    title: str, heads: Sequence[str], rows: Iterable[Sequence[str | Text]], left: Collection[str] = ()
) -> Table:
    """A table of texts: the first column and those ``left`` stand at the left, numbers at the right."""
    table = Table(
        title=Text(title, style="bold") if title else None, title_justify="left", box=None, pad_edge=False
    )
    for place, head in enumerate(heads):
        words = place == 0 or head in left
        table.add_column(
            Text(head), justify="left" if words else "right", overflow="fold" if words else "ellipsis"
        )
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table
