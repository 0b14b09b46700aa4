"""Several workers: the same policy, nobody waits for anybody, and the deadline stands; on virtual time."""

from __future__ import annotations

import gzip
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from budgetsearch.core.codec import decode
from budgetsearch.core.errors import BudgetError, EngineError
from budgetsearch.core.events import (
    Calibrated,
    Charged,
    Decided,
    Entry,
    Event,
    Exported,
    Heartbeat,
    Opened,
    SegmentEnded,
    SegmentStarted,
    WorkersChanged,
)
from budgetsearch.core.history.fold import apply, fold
from budgetsearch.core.history.history import History
from budgetsearch.core.history.outcomes import MAX_STRANDED
from budgetsearch.core.records import Segment, SegmentResult
from budgetsearch.run.driver import Driver
from budgetsearch.run.preflight import run_need
from budgetsearch.run.settings import Settings
from budgetsearch.storage.ledger import MemoryLedger
from budgetsearch.tools.simulate.invariants import check
from tests.support.factories import Story
from tests.support.faults.proofs import may_stand
from tests.support.simulation import make_driver
from tests.support.worlds import Change, SyntheticWorld

HOUR = 3600.0


def played(
    workers: int, budget: float = HOUR, world: SyntheticWorld | None = None, **more: object
) -> tuple[History, list[Entry]]:
    """A whole run, checked, with every decision taken again."""
    driver = make_driver(None, world, budget=budget, slots=workers, **more)  # type: ignore[arg-type]
    driver.run()
    return check(entries_of(driver), budget, replay=True), entries_of(driver)


def entries_of(driver: Driver) -> list[Entry]:
    """What its ledger in memory holds."""
    assert isinstance(driver.ledger, MemoryLedger)
    return driver.ledger.entries


def spans(entries: Sequence[Entry]) -> list[tuple[float, float, Segment]]:
    """When each segment ran; in jobs of one segment."""
    started: dict[int, tuple[float, Segment]] = {}
    found = []
    for entry in entries:
        if isinstance(entry.event, SegmentStarted):
            started[entry.event.job_id] = entry.at, entry.event.segment
        if isinstance(entry.event, SegmentEnded):
            start, segment = started[entry.event.job_id]
            found.append((start, entry.at, segment))
    return found


def most_at_once(some: Sequence[tuple[float, float, Segment]]) -> int:
    """How many of them ran at the same time."""
    return max(sum(1 for start, end, _ in some if start <= at < end) for at, _, _ in some)


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("budget", [720.0, 1800.0])
def test_no_worker_idles_while_something_useful_fits(workers: int, budget: float) -> None:
    """From the first segment to the reserve the workers are busy but for a few percent, whatever a rung's
    stragglers do: every tenth trial takes four times as long."""
    world = SyntheticWorld(slowdown=lambda s: 4.0 if s.trial_id % 10 == 3 else 1.0)
    history, entries = played(workers, budget, world)
    assert history.plan is not None
    ran = spans(entries)
    until = budget - history.plan.reserve_seconds
    busy = sum(end - start for start, end, _ in ran)
    assert busy >= 0.93 * workers * (until - ran[0][0])


@pytest.mark.parametrize("workers", [2, 8])
def test_the_finalists_run_in_full_beside_each_other(workers: int) -> None:
    """At the end each worker trains somebody else in full, and the best of them is what is exported."""
    history, entries = played(workers)
    assert history.plan is not None
    full = [span for span in spans(entries) if span[2].rung == history.plan.top_rung]
    assert workers == most_at_once(full)
    assert len({segment.trial_id for _, _, segment in full}) >= workers
    best = min((s for s in history.trials.values() if s.best_loss is not None), key=lambda s: s.best_loss)
    assert history.exported is not None
    assert (best.trial_id, True) == (history.exported.trial_id, history.exported.final)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_early_end_says_what_would_not_fit(workers: int) -> None:
    """On a short budget one full run each, and the rest is too short for another."""
    history, _ = played(workers, 216.0)
    assert history.closed is not None
    assert history.closed.reason.startswith("the full run is over: another full run needs ")


def test_a_straggler_holds_nobody_up() -> None:
    """While one trial needs half of the budget for its first rung the others are promoted past it."""
    world = SyntheticWorld(slowdown=lambda s: 30.0 if s.trial_id == 1 else 1.0)
    history, entries = played(4, world=world)
    assert history.plan is not None
    start, end, _ = next(span for span in spans(entries) if span[2].trial_id == 1)
    meanwhile = [s for at, _, s in spans(entries) if start < at < end and s.rung > 0]
    assert end - start > 3 * history.plan.ladder[0]
    assert meanwhile


def test_calibrations_run_beside_each_other() -> None:
    """Two quantizations are measured in the time of one; with one worker one after the other."""
    both = [at(entries, Calibrated) for _, entries in (played(1), played(2))]
    assert [[12.0, 22.0], [12.0, 12.0]] == both


@pytest.mark.whole
def at(entries: Sequence[Entry], kind: type) -> list[float]:
    """When such events happened."""
    return [entry.at for entry in entries if isinstance(entry.event, kind)]


@pytest.mark.whole
def test_more_workers_find_no_worse() -> None:
    """The mean over seeds of the best loss falls, or stays, as workers are added."""
    means = []
    for workers in (1, 3, 9):
        found = []
        for seed in range(3):
            history, _ = played(workers, 1800.0, SyntheticWorld(seed=seed), seed=seed)
            assert history.incumbent is not None and history.incumbent.best_loss is not None
            found.append(history.incumbent.best_loss)
        means.append(statistics.fmean(found))
    assert means[1] <= means[0] + 0.005
    assert means[2] <= means[1] + 0.005


def test_the_segments_of_a_lost_node_are_issued_again() -> None:
    """Two of four workers go away with their node for five minutes: their segments start again from where
    they had started, nobody is blamed, and the workers that came back are used."""
    history, entries = played(4, node_changes=[Change(500.0, 2), Change(800.0, 4)])
    ended = [e.event for e in entries if isinstance(e.event, SegmentEnded)]
    lost = [event for event in ended if event.result.status == "stranded"]
    assert 2 == len(lost)
    for event in lost:
        state = history.trials[event.result.trial_id]
        again = [s for start, _, s in spans(entries) if s.trial_id == state.trial_id and start >= 500.0]
        assert event.result.tokens == again[0].start_tokens
        assert (1, 0, None) == (again[0].attempt, state.crashes, state.dead)
        assert {} == event.result.seconds
    assert [2, 4] == [e.event.workers for e in entries if isinstance(e.event, WorkersChanged)]
    assert 4 == most_at_once([span for span in spans(entries) if span[0] > 800.0])


def test_a_trial_that_takes_down_its_workers_is_given_up() -> None:
    """After three workers in a row it is taken to be the reason."""

    class Fatal(SyntheticWorld):
        def _train(self, segment: Segment, examples: int):  # type: ignore[no-untyped-def]
            found = super()._train(segment, examples)
            if segment.trial_id != 2:
                return found
            return replace(found, status="stranded", tokens=0, checkpoint_out=None)

    history, _ = played(4, world=Fatal())
    assert ("crashed", MAX_STRANDED) == (history.trials[2].dead, history.trials[2].moves)


def test_without_any_worker_the_run_waits_for_one() -> None:
    """All workers go away for ten minutes: the run goes on when one is back; if none comes it ends in time
    with what it has."""
    history, entries = played(2, node_changes=[Change(600.0, 0), Change(1200.0, 1)])
    assert [0, 1] == [e.event.workers for e in entries if isinstance(e.event, WorkersChanged)]
    assert max(at(entries, SegmentStarted)) > 1200.0
    assert history.score is not None
    history, _ = played(2, node_changes=[Change(600.0, 0)])
    assert history.closed is not None and "finished" == history.closed.state
    assert (None, True) == (history.score, history.exported is not None and history.exported.final)


def test_a_score_whose_node_goes_away_is_taken_again() -> None:
    """The losses of base and adapter are measured again on the worker that is left."""
    history, _ = played(2)
    assert history.plan is not None
    end = HOUR - history.plan.reserve_seconds
    scoring = next(
        e.at
        for e in played(2)[1]
        if e.at > end - 60 and isinstance(e.event, Charged) and e.event.phase == "score"
    )
    history, _ = played(2, node_changes=[Change(scoring - 1.0, 1)])
    assert history.score is not None and "ok" == history.score.status
    assert history.score.base_loss is not None and history.score.base_accuracy is not None


@pytest.mark.parametrize("workers", [1, 3])
def test_whenever_a_run_is_killed_its_best_adapter_stands(workers: int) -> None:
    """The first one before anything else is decided; a better one at the latest before anybody hears of the
    jobs that were handed out meanwhile."""
    _, entries = played(workers, 720.0)
    standing = None
    for count, entry in enumerate(entries, start=1):
        if isinstance(entry.event, Exported):
            standing = entry.event.trial_id, int(entry.event.checkpoint.split("tokens")[1].split("-")[0])
        if isinstance(entry.event, (Decided, Heartbeat, Exported)):
            assert standing in may_stand(entries[:count])


def test_more_workers_than_planned_are_used() -> None:
    """A run that was planned for one worker and is given three: the plan that holds from then on knows."""
    history, entries = played(1, node_changes=[Change(900.0, 3)])
    assert history.plan is not None and 3 == history.plan.workers
    assert 1 == most_at_once([span for span in spans(entries) if span[1] < 900.0])
    assert 3 == most_at_once(spans(entries))


def test_phases_of_several_workers_are_charged_as_they_are() -> None:
    """Nine tenths of the budget are training with eight workers too: what one trained while another's job
    ended is nobody's idling."""
    history, _ = played(4, HOUR)
    assert history.charged["train"] > 0.9 * history.spent
    assert history.charged.get("idle", 0.0) < 0.01 * history.spent


def test_the_seconds_of_all_workers_are_accounted_for() -> None:
    """Beside the wall seconds: what all workers did and waited adds up to all that there was, a lost node's
    jobs are crashes, and with one worker it is the run's wall time."""
    history, entries = played(4, node_changes=[Change(500.0, 2), Change(800.0, 4)])
    accounts = fold(entries).accounts
    seconds = accounts.worker_seconds()
    missing = 2 * 300.0
    assert pytest.approx(4 * history.spent - missing, abs=5.0) == accounts.total
    assert pytest.approx(accounts.total) == sum(seconds.values())
    trained = sum(result.seconds.get("train", 0.0) for _, result in history.results)
    assert pytest.approx(trained, rel=1e-6) == seconds["train"]
    assert seconds["crash"] > 0
    assert accounts.search_idle_share < 0.05
    history, entries = played(1)
    assert pytest.approx(history.spent) == fold(entries).accounts.total


def test_what_passes_between_two_processes_is_nobodys_work() -> None:
    """With a deadline it counts, and no GPU is paid for it; what a killed driver's jobs took is lost."""
    story = Story.planned(workers=2)
    segment = story.start(story.trial())
    before, known = fold(story.entries).accounts, story.history.spent
    for seconds, event in (
        (10.0, Charged("idle", 10.0)),
        (510.0, Charged("down", 500.0)),
        (510.0, SegmentEnded(0, SegmentResult(0, segment.rung, "cancelled", 0))),
    ):
        entry = Entry(len(story.entries) + 1, known + seconds, 0.0, event)
        story.entries.append(entry)
        apply(story.history, entry)
    accounts = fold(story.entries).accounts
    assert pytest.approx(before.total + 2 * 10.0) == accounts.total
    seconds = accounts.worker_seconds()
    assert pytest.approx(10.0) == seconds["crash"]
    assert pytest.approx(accounts.total) == sum(seconds.values())


def test_the_need_of_disk_grows_with_the_workers() -> None:
    """Each of them writes a gang's checkpoints, and has finalists of its own that wait."""
    values = {"model": "m", "data": "d", "space": "lora", "max_length": 64, "batch_size": 8}
    one, four = (
        run_need(Settings.model_validate({**values, **more}), 1_000, HOUR)
        for more in ({}, {"engine": "ray", "gpus": 4})
    )
    assert 4 * one.gang == four.gang
    assert four.held > one.held


def test_without_any_worker_a_run_waits_no_longer_than_its_deadline() -> None:
    """One that comes in time is used; if none does, the run ends in time and says why."""
    driver = make_driver(None, budget=HOUR, slots=0, node_changes=[Change(HOUR / 3, 2)])
    driver.run()
    assert check(entries_of(driver), HOUR, replay=True).exported is not None

    driver = make_driver(None, budget=HOUR, slots=2, node_changes=[Change(0.0, 0)])
    with pytest.raises(EngineError, match="none came until the deadline"):
        driver.run()
    assert HOUR - 10 < driver.clock.now() < HOUR
    history = check(entries_of(driver), HOUR)
    assert history.closed is not None and history.closed.state == "failed"


@pytest.mark.whole
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    workers=st.integers(1, 16),
    budget=st.floats(90, 3_000),
    slow=st.lists(st.sampled_from([0.7, 1.0, 1.0, 1.3, 3.0, 10.0]), min_size=1, max_size=9),
    fates=st.lists(
        st.sampled_from(["ok", "ok", "ok", "ok", "diverged", "out_of_memory", "crashed"]), min_size=1
    ),
    deaths=st.lists(st.tuples(st.floats(0.0, 1.1), st.integers(0, 16)), max_size=5),
    hangs=st.integers(3, 40),
    gains=st.sampled_from([{}, {}, {2: 1.5, 4: 2.0}]),
)
def test_whatever_happens_to_workers_the_deadline_holds(
    workers: int,
    budget: float,
    slow: list[float],
    fates: list[str],
    deaths: list[tuple[float, int]],
    hangs: int,
    gains: dict[int, float],
) -> None:
    """Any number of workers that go and come back, all of them even, segments up to ten times slower than
    calibrated, that fail or hang deaf: in time, every second charged once, every decision repeated, no trial
    run twice at once."""
    world = SyntheticWorld(
        slowdown=lambda s: slow[(s.trial_id + s.rung) % len(slow)],
        fate=lambda s: fates[(s.trial_id * 7 + s.rung + s.attempt) % len(fates)],  # type: ignore[arg-type]
        hang=lambda s: s.trial_id % hangs == 2,
        deaf=lambda s: s.trial_id % hangs == 2,
        gains=gains,
    )
    changes = [Change(share * budget, slots) for share, slots in sorted(deaths)]
    driver = make_driver(None, world, budget=budget, slots=workers, node_changes=changes, max_gang=4)
    try:
        driver.run()
    except BudgetError:
        return  # refused at the start
    except EngineError:
        assert not driver.engine.slots and driver.history.plan is None  # nobody was left to measure
    history = check(entries_of(driver), budget, replay=True)
    running: Counter[int] = Counter()
    for entry in entries_of(driver):
        if isinstance(entry.event, SegmentStarted):
            running[entry.event.segment.trial_id] += 1
            assert 1 == running[entry.event.segment.trial_id]
        if isinstance(entry.event, SegmentEnded):
            running[entry.event.result.trial_id] -= 1
    finished = any(result.status == "ok" for _, result in history.results)
    assert finished == (history.exported is not None)


RECORDED = Path(__file__).parent / "one_worker.jsonl.gz"
"""Runs on one worker, without their heartbeats: trials that crash, do not fit, diverge, hang and lose
checkpoints; gangs; full runs that land early. Where decisions are meant to change it is made anew:
``python -m benchmarks.policy.decisions --out tests/core/one_worker.jsonl.gz --only 5 31 68 134 137``."""


def test_with_one_worker_the_decisions_are_those_of_before() -> None:
    """Recorded runs are replayed, and each of their decisions is taken again."""
    runs: dict[str, list[Entry]] = {}
    with gzip.open(RECORDED, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            entry = Entry(row["seq"], row["at"], row["at"], decode(Event, row["event"]))
            runs.setdefault(row["run"], []).append(entry)
    decisions = 0
    for entries in runs.values():
        assert isinstance(entries[0].event, Opened)
        history = check(entries, entries[0].event.budget_seconds, replay=True)
        assert history.plan is not None and 1 == history.plan.workers
        decisions += history.decisions
    assert decisions > 200
