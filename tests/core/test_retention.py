"""Which checkpoints stay on disk, and that they never exceed what was foreseen."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetsearch.core.errors import BudgetError
from budgetsearch.core.events import Entry, SegmentEnded
from budgetsearch.core.history import retention
from budgetsearch.core.history.fold import apply, fold
from budgetsearch.core.history.history import History
from budgetsearch.core.history.retention import needed_checkpoints
from budgetsearch.core.history.trial import Checkpoint, best_of, with_checkpoint
from budgetsearch.core.records import Segment
from budgetsearch.core.resources.disk import SPARES, most_checkpoints, most_held, need_of
from budgetsearch.storage.ledger import MemoryLedger
from budgetsearch.tools.simulate.invariants import check
from tests.support.factories import Story, params
from tests.support.simdisk import SimDisk, driver_on
from tests.support.simulation import make_driver
from tests.support.worlds import SyntheticWorld

GAINS = {1: 1.0, 2: 1.5, 4: 2.0, 8: 2.2}


@settings(max_examples=12, deadline=None)
@given(
    held=st.integers(1, 40),
    budget=st.floats(300, 5000),
    gang=st.sampled_from([1, 4, 8]),
    rows=st.sampled_from([60, 400, 2000]),
    rot=st.sampled_from([0.0, 0.02]),
)
def test_the_sweep_keeps_within_the_bound(held: int, budget: float, gang: int, rows: int, rot: float) -> None:
    """However small the disk, however many trials and rungs: never more checkpoints than the bound, and the
    run ends like any other."""
    disk, world = SimDisk(rot), SyntheticWorld(gains=GAINS)
    driver = driver_on(
        None,
        disk,
        world,
        budget=budget,
        max_held=held,
        max_gang=gang,
        train_rows=rows,
        train_tokens=80 * rows,
    )
    try:
        history = driver.run()
    except BudgetError:
        return  # too short: another test looks at that
    assert history.plan is not None
    assert history.plan.max_held is not None
    assert history.plan.max_held <= held
    assert disk.peak <= most_checkpoints(history.plan.max_held, gang)
    assert isinstance(driver.ledger, MemoryLedger)
    check(driver.ledger.entries, budget, replay=True)
    if not rot:
        assert history.incumbent is not None
        assert disk.stands(str(history.incumbent.best_checkpoint))


def wide_run(seed: int, slots: int, max_held: int | None = None) -> list[Entry]:
    """The events of a run with many workers, of which some segments diverge, crash, or lose a checkpoint."""

    def chance(name: str, segment: Segment) -> float:
        return random.Random(f"{seed}/{name}/{segment.trial_id}/{segment.rung}").random()

    fates = {0: "diverged", 1: "crashed"}
    world = SyntheticWorld(
        seed=seed,
        fate=lambda s: fates.get(int(40 * chance("fate", s)), "ok"),  # type: ignore[arg-type, return-value]
        loses=lambda s: chance("loses", s) < 0.02,
        balks=lambda s: chance("balks", s) < 0.02,
    )
    sizes = {"train_rows": 200_000, "train_tokens": 16_000_000, "max_trials": 100_000, "max_held": max_held}
    driver = make_driver(None, world, budget=300.0, slots=slots, **sizes)
    driver.run()
    assert isinstance(driver.ledger, MemoryLedger)
    return driver.ledger.entries


def kept(history: History) -> tuple[object, ...]:
    """All that forgetting changes."""
    held = {number: history.trials[number].held for number in history.holders}
    return held, set(history.dropped), set(history.active), replace(history.retired)


@pytest.mark.parametrize(
    ("seed", "slots", "max_held"), [(0, 1, None), (1, 30, None), (2, 60, None), (3, 40, 20)]
)
def test_an_end_that_concerns_nobody_else_leaves_what_looking_at_everybody_leaves(
    seed: int, slots: int, max_held: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every event of runs with faults: the same checkpoints, the same trials that may go on."""
    short, whole = History(), History()
    for entry in wide_run(seed, slots, max_held):
        apply(short, entry)
        with monkeypatch.context() as patched:
            patched.setattr(retention, "_concerns_only", lambda history, states: False)
            apply(whole, entry)
        if isinstance(entry.event, SegmentEnded):
            assert kept(whole) == kept(short)


@pytest.mark.whole
@pytest.mark.parametrize("slots", [40, 160])
def test_folding_looks_at_all_trials_after_few_ends_however_many_there_are(
    slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After less than one segment in five of a wide run: a fold takes time in proportion to its length."""
    entries, looks = wide_run(0, slots), 0
    forget = retention.forget

    def counted(history: History) -> None:
        nonlocal looks
        looks += 1
        forget(history)

    monkeypatch.setattr(retention, "forget", counted)
    history = fold(entries)
    assert len(history.results) > 5 * slots
    assert looks < len(history.results) / 5


def test_a_run_without_a_small_disk_decides_as_if_nobody_had_looked() -> None:
    """A limit that is never reached changes no decision."""
    ends = []
    for held in (None, 1000):
        disk = SimDisk()
        history = driver_on(None, disk, budget=3600.0, max_held=held).run()
        ends.append([(s.trial_id, s.rung, s.stop_tokens) for s, _ in history.results])
    assert ends[0] == ends[1]


def test_a_simulated_run_in_memory_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a ledger nor a backup of one, in the folder that it is played in."""
    monkeypatch.chdir(tmp_path)
    driver_on(None, SimDisk(), budget=500.0).run()
    assert [] == list(tmp_path.iterdir())


def test_the_bound_counts_waiting_trials_spares_and_what_is_being_written() -> None:
    """And bytes follow from it: checkpoints of 16 bytes a weight, the adapter twice, the records."""
    assert 5 + 3 * (2 + 2) == most_held(eta=5, top_rung=3, full_runs=1.5)
    assert 5 + 3 * (9 + 2) == most_held(eta=5, top_rung=3, full_runs=9.7)
    need = need_of(1_000_000, tokenizer_bytes=7, budget_seconds=0.0, held=17, gang=8)
    rest = 2 * need.adapter + need.records
    assert need.most == (17 + SPARES + 8) * need.checkpoint + rest
    assert need.least == 4 * need.checkpoint + rest
    assert need.checkpoint > 16_000_000
    assert need.adapter > 4_000_000
    assert need.affordable(need.most) == 17
    assert need.affordable(need.most - 1) == 16
    assert need.affordable(0) == 1


def test_the_full_run_and_the_best_keep_a_second_checkpoint() -> None:
    """The last but one of the full run, and another evaluated one that may take the best's place."""
    story = Story.planned()
    for rank, loss in ((4, 1.5), (8, 1.2), (16, 1.4), (32, 1.6)):
        story.train(story.trial(params(rank)), loss)
    story.train(1, 1.0, 1, "promotion: place 1 of 4 at rung 0")
    needed = needed_checkpoints(story.history)
    assert {name for name in needed if name.startswith("trial0001")} == {
        "trial0001-rung1-tokens3000-attempt0",
        "trial0001-rung0-tokens1000-attempt0",
    }
    story.train(1, 0.9, 2, "full run starts")
    assert "trial0001-rung1-tokens3000-attempt0" in needed_checkpoints(story.history)
    assert "trial0001-rung0-tokens1000-attempt0" not in needed_checkpoints(story.history)


def test_what_was_forgotten_once_is_never_gone_back_to() -> None:
    """A trial's stands are what is on disk: the sweep and the history agree."""
    story = Story.planned()
    for rank in (4, 8, 16, 32):
        story.train(story.trial(params(rank)), 1.0 + rank / 100)
    for state in story.history.trials.values():
        assert {s.name for s in state.held} <= needed_checkpoints(story.history)
    story.train(0, 0.9, 1, "promotion: place 1 of 4 at rung 0")
    held = {s.name for state in story.history.trials.values() for s in state.held}
    assert held == needed_checkpoints(story.history)


def test_a_stand_that_is_evaluated_later_keeps_its_place_and_its_loss() -> None:
    """The same checkpoint is held once; a later result without a loss does not take its loss away."""
    bare, known = Checkpoint("a", 10, None, 0, 0), Checkpoint("a", 10, 1.5, 10, 1)
    assert (known,) == with_checkpoint((bare,), known)
    assert 1.5 == with_checkpoint((known,), bare)[0].loss
    assert best_of([bare]) is None
    assert known is best_of([bare, known, Checkpoint("b", 20, 1.6, 20, 2)])
