"""Checkpoints that are missing or damaged: told, gone round, and never the end of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetsearch.core.errors import BudgetError, CheckpointError, DiskError
from budgetsearch.core.events import CheckpointLost, Exported, SegmentEnded
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.history import History
from budgetsearch.core.history.retention import contenders, needed_checkpoints
from budgetsearch.core.records import Segment
from budgetsearch.core.results import untrained
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.storage.ledger import MemoryLedger, read_entries
from budgetsearch.tools.simulate.invariants import check
from budgetsearch.training import sums
from budgetsearch.training.members import Shop
from budgetsearch.training.recipe import train_gang
from budgetsearch.views.progress import Narrator
from tests.support.factories import Story, paused
from tests.support.simdisk import SimDisk, driver_on
from tests.support.simulation import SMALL_DATA
from tests.support.training import base, make_segment
from tests.support.worlds import SyntheticWorld


def lose(story: Story, trial_id: int, rung: int) -> Segment:
    """The trial's next segment finds its checkpoint damaged."""
    segment = story.start(trial_id, rung, "promotion: place 1 of 3 at rung 0")
    job = next(job for job, some in story.history.running.items() if segment in some)
    story.add(SegmentEnded(job, untrained(segment, "lost", "it is damaged")))
    return segment


def test_a_trial_goes_back_to_its_last_good_checkpoint() -> None:
    """The best still has the one before: it goes on from there, unpunished, and the user is told."""
    story = paused()
    segment = lose(story, 1, 2)
    state = story.history.trials[1]
    assert (1000, "trial0001-rung0-tokens1000-attempt0") == (state.tokens, state.checkpoint)
    assert (0, None, 1, 0) == (state.crashes, state.dead, state.lost, state.restarts)
    assert {0: 1.2, 1: 1.0} == state.losses
    expected = f"checkpoint {segment.checkpoint_in} is lost (it is damaged); trial 1 goes back to 1000 tokens"
    assert expected == story.history.notices[-1][1]
    assert expected == Narrator().line(story.entries[-1], story.history)
    assert fold(story.entries) == story.history


def test_a_trial_without_another_one_starts_again_and_is_given_up_the_second_time() -> None:
    """Its rungs stay known, its attempts get another name, and the policy does not loop."""
    story = paused()
    lose(story, 2, 1)
    state = story.history.trials[2]
    assert (0, None, 1, None) == (state.tokens, state.checkpoint, state.restarts, state.dead)
    assert "start again from its beginning" in story.history.notices[-1][1]
    segment = story.start(2, 1)
    assert (0, None) == (segment.start_tokens, segment.checkpoint_in)
    story.end(segment, 1.1)
    lose(story, 2, 2)
    assert "lost" == story.history.trials[2].dead
    assert "lost" == story.history.standing(story.history.trials[2])
    assert 2 not in contenders(story.history)


def test_the_losses_of_a_full_run_are_not_counted_twice() -> None:
    """A link that is gone takes its loss with it; the next one is measured again."""
    story = paused()
    story.train(1, 0.9, 2, "full run starts")
    assert [0.9] == story.history.trials[1].full_losses
    story.add(CheckpointLost(str(story.history.trials[1].checkpoint), "it is missing"))
    state = story.history.trials[1]
    assert [] == state.full_losses
    assert 3000 == state.tokens == state.evaluated_tokens
    assert (1.0, "trial0001-rung1-tokens3000-attempt0") == (state.best_loss, state.best_checkpoint)


def test_the_best_stays_the_best_while_its_exported_adapter_stands() -> None:
    """Its checkpoint is lost: the adapter on disk keeps its title until that breaks as well, and then the
    next best evaluated checkpoint has it."""
    story = paused()
    best = str(story.history.trials[1].best_checkpoint)
    story.add(Exported(1, best, "adapter", False))
    story.add(CheckpointLost(best, "it is damaged"))
    assert story.history.incumbent is story.history.trials[1]
    assert (best, 1.0) == (story.history.trials[1].best_checkpoint, story.history.trials[1].best_loss)
    assert 1000 == story.history.trials[1].tokens
    story.add(CheckpointLost(best, "it is damaged", exported=True))
    assert story.history.incumbent is story.history.trials[1]
    assert 1.2 == story.history.trials[1].best_loss
    story.add(CheckpointLost(str(story.history.trials[1].best_checkpoint), "it is damaged"))
    assert story.history.incumbent is story.history.trials[2]


def test_another_export_takes_the_place_of_what_only_the_old_one_held() -> None:
    """Once another adapter stands, nothing is left of the checkpoint that was lost."""
    story = paused()
    best = str(story.history.trials[1].best_checkpoint)
    story.add(Exported(1, best, "adapter", False), CheckpointLost(best, "it is damaged"))
    story.train(2, 0.8, 1, "promotion: place 2 of 3 at rung 0")
    story.add(Exported(2, str(story.history.trials[2].best_checkpoint), "adapter", False))
    assert story.history.trials[1].exported is None
    assert story.history.incumbent is story.history.trials[2]


# ----------------------------------------------------------------------- the simulator


def end(path: Path | None, disk: SimDisk, budget: float = 1500.0, **more: Any) -> History:
    """A run on this disk to its end, checked."""
    driver = driver_on(path, disk, budget=budget, **more)
    history = driver.run()
    driver.ledger.close()
    ledger = driver.ledger
    check(
        ledger.entries if isinstance(ledger, MemoryLedger) else list(read_entries(ledger.path)),
        budget,
        replay=True,
    )
    return history


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rot=st.sampled_from([0.01, 0.05, 0.2, 0.6]),
    budget=st.floats(300, 4000),
    rows=st.sampled_from([100, 2000]),
)
def test_a_disk_that_rots_breaks_no_promise(seed: int, rot: float, budget: float, rows: int) -> None:
    """At random files break, adapters too: the deadline holds, every second is charged once, no decision is
    unrepeatable, no segment starts from what is lost, and what ended well ends with an adapter that was whole
    when it was written, of the best that was left."""
    disk = SimDisk(rot, seed)
    try:
        history = end(None, disk, budget, train_rows=rows, train_tokens=80 * rows)
    except BudgetError:
        return
    assert history.closed is not None
    lost = [s.checkpoint_in for s, r in history.results if r.status == "lost"]
    assert all(state.lost >= 1 for state in history.trials.values() if state.restarts)
    assert all(state.restarts <= 2 for state in history.trials.values())
    crashes = [r for _, r in history.results if r.status == "crashed"]
    assert not crashes, lost
    if history.closed.state == "finished":
        assert history.exported is not None
        assert history.exported.final
        assert disk.adapter is not None
        assert history.incumbent is not None
        assert disk.adapter[0] == history.exported.checkpoint == history.incumbent.best_checkpoint


def test_one_broken_file_never_takes_the_adapter(tmp_path: Path) -> None:
    """Whichever checkpoint breaks right after it was written, the run finishes with a whole adapter."""
    driver = driver_on(tmp_path / "whole", SimDisk(), budget=500.0)
    names = [r.checkpoint_out for _, r in driver.run().results if r.checkpoint_out]
    driver.ledger.close()
    assert len(names) > 6
    for name in names:
        disk = SimDisk(damaged=[str(name)])
        history = end(None, disk, 500.0)
        assert history.closed is not None
        assert history.closed.state == "finished"
        assert history.incumbent is not None
        assert history.incumbent.best_checkpoint != name
        assert disk.stands(str(history.incumbent.best_checkpoint))


def test_a_full_disk_ends_no_trial_and_then_the_run(tmp_path: Path) -> None:
    """One failure: the segment is made again. Two in a row: the run says so and ends; a resume goes on."""
    failures = iter([True, False, False, True, True])
    world = SyntheticWorld(full=lambda segment: next(failures, False))
    driver = driver_on(tmp_path / "ledger.sqlite", SimDisk(), world)
    with pytest.raises(DiskError, match="resume"):
        driver.run()
    driver.ledger.close()
    history = driver.history
    assert history.closed is not None
    assert ("failed", True) == (history.closed.state, "no space left" in history.closed.reason)
    assert [True, False, False, True, True] == [r.status == "unwritten" for _, r in history.results]
    assert not any(state.dead or state.crashes for state in history.trials.values())
    assert 10.0 < history.spent < 720
    again = driver_on(
        tmp_path / "ledger.sqlite", disk := SimDisk(), SyntheticWorld(), clock=VirtualClock(history.spent)
    )
    disk.whole = dict.fromkeys(needed_checkpoints(history), True)
    history = again.run()
    again.ledger.close()
    check(list(read_entries(tmp_path / "ledger.sqlite")), 720.0, replay=True)
    assert history.closed is not None
    assert history.closed.state == "finished"


@pytest.mark.parametrize("kind", ["loses", "balks"])
def test_a_member_that_cannot_begin_says_nothing_of_the_memory(kind: str) -> None:
    """Its gang trains with one fewer, and later ones are as large as before; those seconds are a gang's."""
    cut: set[int] = set()

    def broken(segment: Segment) -> bool:
        fails = bool(segment.checkpoint_in) and segment.trial_id % 2 == 0 and segment.trial_id not in cut
        cut.add(segment.trial_id) if fails else None
        return fails

    disk, world = SimDisk(), SyntheticWorld(gains={2: 1.6, 4: 2.4})
    driver = driver_on(None, disk, world, budget=7200.0, max_gang=4, **SMALL_DATA)
    setattr(world, kind, broken)
    history = driver.run()
    assert isinstance(driver.ledger, MemoryLedger)
    check(driver.ledger.entries, 7200.0, replay=True)
    fewer = [result for _, result in history.results if result.began]
    assert fewer, "no gang lost a member"
    assert all(result.gang == result.began for result in fewer)
    assert {} == history.gang_limits


def test_on_a_resume_what_is_missing_is_told_at_once(tmp_path: Path) -> None:
    """Before anything runs; the search goes on with the rest, and the seconds of it are charged once."""
    path, clock = tmp_path / "ledger.sqlite", VirtualClock(2.0)
    first = driver_on(path, SimDisk(), clock=clock)
    first.stop_requested = lambda: "SIGTERM" if clock.now() > 300 else ""
    history = first.run()
    first.ledger.close()
    needed = sorted(needed_checkpoints(history))
    assert len(needed) > 2
    disk = SimDisk()
    disk.whole = dict.fromkeys(needed[1:], True)
    second = driver_on(path, disk, clock=VirtualClock(history.spent))
    history = second.run()
    second.ledger.close()
    entries = list(read_entries(path))
    check(entries, 720.0, replay=True)
    lost = [entry.event for entry in entries if isinstance(entry.event, CheckpointLost)]
    assert [needed[0]] == [event.checkpoint for event in lost]
    assert history.closed is not None
    assert history.closed.state == "finished"


# ------------------------------------------------------------------- the real trainer


def short(name: str) -> Callable[[Path], None]:
    """One file lost its second half."""

    def tear(folder: Path) -> None:
        os.truncate(folder / name, (folder / name).stat().st_size // 2)

    tear.__name__ = f"half-{name}"
    return tear


def flipped(name: str) -> Callable[[Path], None]:
    """One bit of a file is another, its length is not."""

    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    flip.__name__ = f"flipped-{name}"
    return flip


DAMAGE = [shutil.rmtree, short(sums.STATE_FILE), short(sums.ADAPTER_FILE), flipped(sums.STATE_FILE)]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_real_training_reports_a_broken_checkpoint_and_trains_the_neighbour(
    shop: Shop, tiny_model: Path, damage: Callable[[Path], None]
) -> None:
    """Missing, torn or altered: the segment comes back as lost, with nothing done; the other one trains; and
    an older checkpoint of the same trial goes on to the very bits of a trial that never lost one."""
    model = base(tiny_model)
    (first,) = train_gang(model, [make_segment(0, 300)], shop, 4)
    (second,) = train_gang(
        model, [make_segment(first.tokens, 600, checkpoint_in=first.checkpoint_out)], shop, 4
    )
    whole = shop.checkpoint_path / str(second.checkpoint_out)
    expected = sums.read_meta(whole)["sha256"]
    damage(whole)
    third = make_segment(second.tokens, 900, checkpoint_in=second.checkpoint_out)
    lost, neighbour = train_gang(model, [third, make_segment(0, 300, trial_id=4)], shop, 4)
    assert ("lost", None) == (lost.status, lost.checkpoint_out)
    assert second.tokens == lost.tokens
    assert "ok" == neighbour.status
    (again,) = train_gang(
        model, [make_segment(first.tokens, 600, checkpoint_in=first.checkpoint_out)], shop, 4
    )
    assert expected == sums.read_meta(shop.checkpoint_path / str(again.checkpoint_out))["sha256"]


def test_sizes_tell_the_coarse_damage_and_sums_all_of_it(shop: Shop, tiny_model: Path) -> None:
    """The look at the start of a resume reads no tensor; a flipped bit waits for the sums."""
    (done,) = train_gang(base(tiny_model), [make_segment(0, 100)], shop, 4)
    folder = shop.checkpoint_path / str(done.checkpoint_out)
    sums.check_sizes(folder)
    sums.check(folder)
    flipped(sums.ADAPTER_FILE)(folder)
    sums.check_sizes(folder)
    with pytest.raises(CheckpointError, match="has changed"):
        sums.check(folder)
    short(sums.ADAPTER_FILE)(folder)
    with pytest.raises(CheckpointError, match="bytes"):
        sums.check_sizes(folder)
    (folder / sums.ADAPTER_FILE).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        sums.check_sizes(folder)
