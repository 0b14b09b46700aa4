"""Control characters of texts that others wrote are shown, wherever a text is printed."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.table import Table
from typer.testing import CliRunner

from budgetsearch.cli import app
from budgetsearch.core.events import Closed, Noticed
from budgetsearch.storage.ledger import Ledger
from budgetsearch.views.progress import LiveProgress, PlainProgress
from budgetsearch.views.report.markdown import text_of
from budgetsearch.views.report.numbers import numbers_of
from budgetsearch.views.terminal import Terminal
from budgetsearch.views.words import printable
from tests.support.factories import Story, params

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m [link=file:///]x"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def hostile(story: Story) -> Story:
    """A run in which every text that others may write is hostile."""
    story.end(story.start(story.trial({**params(), "alpha": EVIL}), 0, EVIL), status="crashed", detail=EVIL)
    story.add(Noticed(EVIL), Closed("failed", EVIL))
    return story


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain äß ✓ \n\t", "plain äß ✓ \n\t"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x00\r\x7f\x9b", "\\x00\\x0d\\x7f\\x9b"),
    ],
)
def test_only_what_a_terminal_obeys_is_shown_otherwise(text: str, shown: str) -> None:
    """C0 and C1, line breaks and tabs apart; letters of any script stay."""
    assert shown == printable(text)


def test_no_line_of_a_run_and_no_report_holds_a_control_character() -> None:
    """Reasons, causes, notices and configurations come from ledgers, models and libraries."""
    lines: list[str] = []
    story = Story.planned()
    story.watchers.append(PlainProgress(lines.append))
    hostile(story)
    for text in ("\n".join(lines), text_of(numbers_of(story.entries, story.history))):
        assert "\\x1b]0;owned" in text
        assert not CONTROL.search(text)


def test_a_terminal_obeys_nobody_but_the_console_itself() -> None:
    """The live display moves the cursor; what it shows does not. Brackets are no markup."""
    screen = io.StringIO()
    console = Terminal(file=screen, force_terminal=True, width=300, color_system=None)
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    console.print(table)
    assert not CONTROL.search(screen.getvalue())
    assert "\\x1b]0;owned" in screen.getvalue()
    assert "[link=file:///]x" in screen.getvalue()
    with LiveProgress(console, now=lambda: 0.0) as live:
        story = Story.planned()
        story.watchers.append(live)
        hostile(story)
        live.say(EVIL)
        live._live.refresh()
    assert "\\x1b]0;owned" in screen.getvalue()
    assert "\x1b]0;" not in screen.getvalue()
    assert "\x9b" not in screen.getvalue()


def test_a_hostile_ledger_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    """``status`` of a run from elsewhere, and of one that is not there."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for entry in hostile(Story.planned()).entries:
        ledger.append(entry.event, SimpleNamespace(now=lambda at=entry.at: at))
    ledger.close()
    result = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert 0 == result.exit_code
    assert not CONTROL.search(result.output)
    result = CliRunner().invoke(app, ["status", str(tmp_path / EVIL)])
    assert "\\x1b]0;owned" in result.output
    assert not CONTROL.search(result.output)
