"""GPU seconds beside the hours: of all workers together, wherever a run with several of them is shown."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from budgetsearch.cli import app
from budgetsearch.core.events import Entry
from budgetsearch.core.history.fold import apply, fold
from budgetsearch.core.history.history import History
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.storage.ledger import MemoryLedger, read_history
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.progress import Crew
from budgetsearch.views.report.html import html_text
from budgetsearch.views.report.numbers import as_json, numbers_of
from budgetsearch.views.report.over_time import progress, timeline
from budgetsearch.views.report.workers import worker_seconds_of, workers_line
from budgetsearch.views.tables import clock
from tests.support.simulation import SMALL_DATA, Killed, Killer, make_driver
from tests.support.worlds import Change, SyntheticWorld

BUDGET = 1800.0


def simulated(workers: int, *changes: Change) -> list[Entry]:
    """The ledger of a whole run."""
    driver = make_driver(None, budget=BUDGET, slots=workers, node_changes=changes)
    driver.run()
    assert isinstance(driver.ledger, MemoryLedger)
    return driver.ledger.entries


@pytest.fixture(scope="module")
def four() -> list[Entry]:
    """A run with four workers, of which two are away for a while."""
    return simulated(4, Change(500.0, 2), Change(800.0, 4))


def test_the_report_has_the_account_of_all_workers(four: list[Entry]) -> None:
    """In report.json with units; the parts add up to the whole, which is more than the wall seconds; what was
    charged is the wall's."""
    history = fold(four)
    found = json.loads(as_json(numbers_of(four, history)))
    told = found["workers"]
    assert 4 == told["most_workers"]
    assert pytest.approx(told["worker_seconds"]) == sum(told["worker_seconds_by_phase"].values())
    assert 3.0 * history.spent < told["worker_seconds"] < 4.0 * history.spent
    assert 0.0 < told["search_idle_share"] < 0.2
    assert pytest.approx(found["budget"]["wall_seconds"]) == found["budget"]["charged_seconds"]
    times = [point["worker_seconds"] for point in found["timeline"]["losses"]]
    assert sorted(times) == times
    assert found["budget"]["wall_seconds"] < times[-1] <= told["worker_seconds"]


def test_the_page_tells_it_in_the_answer_and_beside_the_timeline(four: list[Entry]) -> None:
    """And the losses stand over the time of all workers."""
    numbers = numbers_of(four, fold(four))
    page = html_text(numbers)
    assert "up to 4 at once" in page
    assert "4 workers had" in page
    assert " 0.0%" not in page.split("4 workers had")[1].split("In the search")[0]
    assert "The time is that of all workers together." in page
    figure = progress(numbers)
    assert figure is not None
    assert "charged" not in figure.layout["xaxis"]["title"]["text"]
    assert numbers.workers.worker_seconds / 60 == pytest.approx(figure.data[1]["x"][-1])


def test_one_worker_sees_nothing_new() -> None:
    """No word of it on the page, and its account is the wall's."""
    entries = simulated(1)
    numbers = numbers_of(entries, fold(entries))
    page = html_text(numbers)
    assert "at once</span>" not in page
    assert "workers had" not in page
    assert "" == workers_line(numbers.workers, fold(entries))
    assert numbers.budget.wall_seconds == pytest.approx(numbers.workers.worker_seconds)


def test_each_worker_has_a_row_in_which_nothing_overlaps(four: list[Entry]) -> None:
    """On the timeline: four rows with a name each, and in each of them one bar after the other."""
    figure = timeline(numbers_of(four, fold(four)))
    assert figure is not None
    assert [f"worker {k}" for k in (1, 2, 3, 4)] == figure.layout["yaxis"]["ticktext"]
    bars = next(trace for trace in figure.data if trace["name"] == "segments")
    rows: dict[float, list[tuple[float, float]]] = {}
    for y, base, length in zip(bars["y"], bars["base"], bars["x"], strict=True):
        rows.setdefault(y, []).append((base, base + length))
    assert [0, 1, 2, 3] == sorted(rows)
    for row in rows.values():
        for (_, stop), (start, _) in itertools.pairwise(sorted(row)):
            assert stop <= start + 1e-6


def test_a_line_for_terminals_names_the_unit(four: list[Entry]) -> None:
    """GPU seconds on a card, worker seconds on a CPU."""
    history = fold(four)
    found = worker_seconds_of(history.accounts)
    assert workers_line(found, history).startswith(
        f"workers  up to 4, {found.worker_seconds:.0f} worker seconds: train "
    )
    assert history.opened is not None
    history.opened = replace(history.opened, facts={"card": {"device": "cuda:0"}})
    assert "GPU seconds" in workers_line(found, history)
    assert "waited" not in workers_line(found, history)


def test_workers_that_waited_much_are_told_with_the_reason() -> None:
    """Four configurations for four workers, one of them a straggler: in the end the others have no work."""
    world = SyntheticWorld(slowdown=lambda segment: 8.0 if segment.trial_id == 0 else 1.0)
    driver = make_driver(None, world, budget=BUDGET, slots=4, max_trials=1, **SMALL_DATA)
    history = driver.run()
    assert isinstance(driver.ledger, MemoryLedger)
    found = worker_seconds_of(driver.history.accounts)
    line = workers_line(found, history)
    share = found.worker_seconds_by_phase["idle"] / found.worker_seconds
    assert 0.2 < share
    assert line.endswith(
        f"; {share:.0%} waited: all 4 configurations of --max-trials were tried, and fewer are promoted"
    )
    history.closed = None
    assert "waited" not in workers_line(found, history)


@pytest.mark.parametrize("workers", [1, 3])
def test_status_has_the_account_of_several_workers(tmp_path: Path, workers: int) -> None:
    """As a line and as a key of its JSON; one worker's says what it said before."""
    driver = make_driver(RunFolder(tmp_path).ledger, budget=600.0, slots=workers)
    history = driver.run()
    driver.ledger.close()
    found = json.loads(CliRunner().invoke(app, ["status", str(tmp_path), "--json"]).output)
    text = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    if workers == 1:
        assert "workers" not in found
        assert "workers" not in text
        return
    assert workers == found["workers"]["most_workers"]
    assert history.spent < found["workers"]["worker_seconds"] <= workers * history.spent
    assert f"workers  up to 3, {found['workers']['worker_seconds']:.0f} " in text


def test_what_a_killed_driver_left_is_a_crash(tmp_path: Path) -> None:
    """Jobs that told nothing of their seconds are no overhead; the live display of the next process, which
    has not seen the beginning, counts from there on."""
    path = tmp_path / "ledger.sqlite"
    first = make_driver(path, budget=BUDGET, slots=4)
    first.ledger.watch(Killer(100))
    with pytest.raises(Killed):
        first.run()
    first.ledger.close()
    spent = read_history(path).spent
    second = make_driver(path, budget=BUDGET, slots=4, clock=VirtualClock(spent + 3.0))
    crew = Crew()
    second.ledger.watch(crew)
    history = second.run()
    second.ledger.close()
    assert crew.line(history, "cuda").endswith("of GPU time since the resume")
    assert pytest.approx(4 * (history.spent - spent - 3.0)) == crew.accounts.total
    found = worker_seconds_of(read_history(path).accounts).worker_seconds_by_phase
    assert found["crash"] > 3.0
    assert found.get("overhead", 0.0) < 1.0


def test_the_live_display_tells_who_is_busy(four: list[Entry]) -> None:
    """And the seconds of all workers together."""
    history, crew = History(), Crew()
    for entry in four[: len(four) // 2]:
        apply(history, entry)
        crew.see(entry, history)
    head, _, rest = crew.line(history, "cuda").partition("; ")
    assert f"workers: {len(history.running)} of {history.workers} busy" == head
    assert f"{clock(crew.accounts.total)} of GPU time" == rest


def test_one_worker_has_no_line_in_the_live_display() -> None:
    """Its time is the one that the first line tells."""
    history, crew = History(), Crew()
    for entry in simulated(1):
        apply(history, entry)
        crew.see(entry, history)
    assert "" == crew.line(history, "cuda")
