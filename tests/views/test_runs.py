"""The list of runs: what each row says, in which order, and what is left out."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from budgetsearch.core.events import Entry
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.storage.ledger import Ledger
from budgetsearch.views.runs import runs_below, runs_table
from tests.support.command_line import invoke
from tests.support.comparable import put_adapter
from tests.support.factories import whole_run


def make_run(folder: Path, entries: list[Entry]) -> None:
    """A folder with a ledger of these events."""
    folder.mkdir(parents=True)
    ledger, clock = Ledger(folder / "ledger.sqlite"), VirtualClock()
    for entry in entries:
        ledger.append(entry.event, clock)
    ledger.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A finished run, a later one that was stopped, a broken one, and other things."""
    entries = whole_run().entries
    make_run(tmp_path / "first", entries)
    put_adapter(tmp_path / "first", str(whole_run().history.incumbent.best_checkpoint))  # type: ignore[union-attr]
    make_run(tmp_path / "deeper" / "second", entries[: len(entries) // 2])
    make_run(tmp_path / "never", [])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "ledger.sqlite").write_bytes(b"no database")
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_runs_are_listed_newest_first_and_what_is_broken_is_named(place: Path) -> None:
    """Rows come from the ledgers; a folder that cannot be read takes no other with it."""
    found = runs_below(place)
    second, first = found.runs
    assert [str(place / "deeper" / "second"), str(place / "first")] == [second.path, first.path]
    assert ("finished", "org/tiny", 0.9, 2.0, 0.75, 0.25, 720.0, str(place / "first" / "adapter")) == (
        first.state, first.model, first.loss, first.base_loss, first.accuracy, first.base_accuracy,
        first.budget_seconds, first.adapter_path,
    )  # fmt: skip
    assert ("stopped", None) == (second.state, second.base_loss)
    assert [str(place / "broken"), str(place / "never")] == [path for path, _ in found.skipped]


def test_the_command_prints_a_table_or_json(place: Path) -> None:
    """Both name every run; what was skipped is said beside it."""
    code, text = invoke("runs", str(place))
    assert code == 0
    assert "0.9000 | 2.0000" in text
    assert "stopped, no adapter" in text and "finished, no adapter" not in text
    assert f"skipped {place / 'broken'}" in text
    rows = json.loads(invoke("runs", str(place / "deeper"), "--json")[1])
    assert ["stopped"] == [row["state"] for row in rows]
    code, text = invoke("runs", str(place / "nowhere"))
    assert (2, True) == (code, "There is no folder" in text)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_table_of_runs_fits_the_terminal(
    place: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """Run, state and loss stay."""
    monkeypatch.chdir(place)
    screen = Console(file=io.StringIO(), width=width)
    screen.print(runs_table(runs_below(Path()).runs))
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    (first,) = [line for line in lines if line.startswith("first")]
    assert "finished" in first
    assert "0.9000 | 2.0000" in first


def test_the_list_needs_no_torch(place: Path) -> None:
    """It is there at once."""
    code = f"import sys, budgetsearch as bs; bs.list_runs({str(place)!r}); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "False" == found.stdout.strip()
