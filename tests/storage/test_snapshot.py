"""The snapshot beside a long ledger: what is read of it, and when it counts for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from budgetsearch import api
from budgetsearch.core.events import Entry, Noticed
from budgetsearch.core.history.fold import apply, fold
from budgetsearch.core.history.history import History
from budgetsearch.core.history.standing import as_text, from_text
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.storage import ledger as ledger_module
from budgetsearch.storage import snapshot as snapshot_module
from budgetsearch.storage.ledger import Ledger, MemoryLedger, read_entries, read_history
from budgetsearch.storage.snapshot import snapshot_of
from tests.support.simulation import make_driver
from tests.support.worlds import Change, SyntheticWorld

Spoil = Callable[[Path], object]


def played(path: Path | None, **changes: object) -> tuple[History, list[Entry]]:
    """A run in which trials diverge and a node goes away."""
    world = SyntheticWorld(fate=lambda segment: "diverged" if segment.trial_id % 7 == 3 else "ok")
    nodes = [Change(500.0, 2), Change(800.0, 4)]
    driver = make_driver(path, world, slots=4, node_changes=nodes, max_trials=25, **changes)  # type: ignore[arg-type]
    driver.run()
    driver.ledger.close()
    entries = driver.ledger.entries if isinstance(driver.ledger, MemoryLedger) else []
    return driver.history, entries


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run whose ledger counts as a long one."""
    monkeypatch.setattr(snapshot_module, "LEAST_EVENTS", 100)
    (tmp_path / "run").mkdir()
    played(tmp_path / "run" / "ledger.sqlite", budget=1200.0)
    return tmp_path / "run"


def state_of(history: History) -> dict[str, object]:
    """All of it, also what does not count in a comparison."""
    return {one.name: getattr(history, one.name) for one in fields(History) if one.name != "ahead"}


def test_a_history_comes_back_from_its_text_and_goes_on_as_if_it_had_never_left() -> None:
    """From every thirtieth event of a run on, down to what is only kept to decide quickly."""
    whole, entries = played(None, budget=1200.0)
    for place in range(0, len(entries), 30):
        history = from_text(as_text(fold(entries[:place])))
        for entry in entries[place:]:
            apply(history, entry)
        assert state_of(whole) == state_of(history), place
        assert history.trials[0] is history.active.get(0, history.trials[0])


def test_a_status_reads_only_what_is_behind_the_snapshot(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a tenth of the events, with the same answer; a short ledger has none."""
    ledger = run / "ledger.sqlite"
    expected, events, read = fold(read_entries(ledger)), len(list(read_entries(ledger))), list[object]()
    decode = ledger_module.decode

    def counted(kind: object, value: object) -> object:
        read.append(value)
        return decode(kind, value)

    monkeypatch.setattr(ledger_module, "decode", counted)
    assert state_of(expected) == state_of(read_history(ledger))
    assert 0 < len(read) <= events / 10
    told = api.status(run)
    snapshot_of(ledger).unlink()
    read.clear()
    assert told == api.status(run)
    assert events == len(read)


def other_seal(path: Path) -> None:
    """As if the ledger had been mended to another end."""
    text = path.read_text(encoding="utf-8")
    place = text.index('"seal": "') + 9
    path.write_text(f"{text[:place]}{'0' * 64}{text[place + 64 :]}", encoding="utf-8")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"tokens": 1', b'"tokens": 2', 1)),
        lambda path: path.write_text("{}\n[]\n", encoding="utf-8"),
        lambda path: path.write_bytes(b"\xff" * 50),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"by": "', b'"by": "other ', 1)),
        other_seal,
    ],
)
def test_a_snapshot_that_does_not_fit_counts_for_nothing(run: Path, spoil: Spoil) -> None:
    """Torn, changed, no snapshot at all, another version's, or that of a ledger which went another way."""
    ledger = run / "ledger.sqlite"
    expected, before = fold(read_entries(ledger)), snapshot_of(ledger).read_bytes()
    spoil(snapshot_of(ledger))
    assert before != snapshot_of(ledger).read_bytes()
    assert state_of(expected) == state_of(read_history(ledger))


def test_a_snapshot_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is only what makes looking quick."""
    monkeypatch.setattr(snapshot_module, "LEAST_EVENTS", 3)
    ledger, clock = Ledger(tmp_path / "ledger.sqlite"), VirtualClock()
    snapshot_of(ledger.path).mkdir()
    for number in range(5):
        ledger.append(Noticed(str(number)), clock)
    ledger.close()
    assert 5 == read_history(ledger.path).seq
