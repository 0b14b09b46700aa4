"""An inspection for people: in colour on a terminal, with marks where it is piped."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from budgetsearch.tools.inspect.look import Inspection, Row

TRAINED = "bold green"
MARKS = "\u00ab", "\u00bb"
"""Around what is trained, where there are no colours."""
BAR = 40
"""Characters of the longest bar."""


def show(found: Inspection, colour: bool) -> Iterator[Text]:
    """The lines of an inspection."""
    yield from (Text(line) for line in found.lines)
    yield Text(f"an answer ends with {' or '.join(found.stop_tokens) or 'nothing'}")
    yield from (Text(f"warning: {line}", style="yellow") for line in found.warnings)
    yield Text()
    most = max((count for *_, count in found.lengths), default=1)
    for start, end, count in found.lengths:
        bar = "#" * max(int(count > 0), round(BAR * count / most))
        yield Text(f"{start:>7} to {end:<7} tokens {count:>9} rows {bar}")
    for row in found.rows:
        yield Text()
        yield _head(row, colour)
        yield _body(row, colour)


def _head(row: Row, colour: bool) -> Text:
    learned = "green is" if colour else f"{MARKS[0]} {MARKS[1]} are"
    kind = "for validation" if row.part == "valid" else "trained on"
    text = f"{row.place}: {kind}, {len(row.ids)} tokens, {sum(row.trained)} to learn ({learned} learned)"
    return Text(text, style="dim")


def _body(row: Row, colour: bool) -> Text:
    text = Text()
    for piece in row.pieces:
        if piece.trained and not colour:
            text.append(f"{MARKS[0]}{piece.text}{MARKS[1]}")
        else:
            text.append(piece.text, style=TRAINED if piece.trained else "")
    return text
