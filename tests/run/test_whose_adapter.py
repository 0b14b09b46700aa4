"""Whose adapter stands on disk: what it says itself counts, for the ledger may have lost its end."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from budgetsearch.core.errors import CheckpointError, DiskError, UnreadableError
from budgetsearch.core.events import CheckpointLost, Exported, Noticed, SegmentEnded
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.records import SegmentResult
from budgetsearch.run import export, failure
from budgetsearch.run.failure import after_failure
from budgetsearch.run.incumbent import Incumbent
from budgetsearch.storage.ledger import MemoryLedger
from budgetsearch.tools.simulate.invariants import check
from budgetsearch.views.card import load_lines
from budgetsearch.views.report.answer import answer_of
from budgetsearch.views.tables import status_dict
from tests.support.exporting import House, best
from tests.support.factories import Story, params
from tests.support.simdisk import SimDisk, driver_on


@pytest.fixture
def told(house: House) -> Story:
    """Two trials; the ledger knows that the first one's adapter was exported, and the best is the first."""
    story = Story.planned()
    for rank, loss in ((4, 1.2), (8, 1.5)):
        story.train(story.trial(params(rank)), loss)
    for _, result in story.history.results:
        house.checkpoint(result.checkpoint_out)
    path = house.exporter().export(story.history, best(story), final=False)
    story.add(Exported(0, str(best(story).best_checkpoint), path, False))
    return story


@pytest.fixture
def incumbent(told: Story, house: House) -> Incumbent:
    """On the real exporter."""
    return Incumbent(house.exporter(), told.add, lambda: told.history)


def replaced(house: House, told: Story) -> TrialState:
    """A later event, which the ledger has lost, exported the other trial; returns that."""
    other = told.history.trials[1]
    house.exporter().export(told.history, other, final=False)
    return other


def lost(told: Story) -> list[tuple[str, bool]]:
    """What was recorded as lost, and whether the adapter with it."""
    events = [entry.event for entry in told.entries if isinstance(entry.event, CheckpointLost)]
    return [(event.checkpoint, event.exported) for event in events]


def test_no_adapter_is_taken_for_another_trials(house: House, told: Story, incumbent: Incumbent) -> None:
    """The best trial's checkpoint is gone, and what stands is the other's: it is not exported in its name."""
    name, other = str(best(told).best_checkpoint), replaced(house, told)
    shutil.rmtree(house.checkpoints / name)
    told.add(CheckpointLost(name, "it is missing"))
    assert name == best(told).best_checkpoint
    assert "made from another checkpoint" in house.exporter().damage(best(told))
    with pytest.raises(CheckpointError, match="made from another checkpoint"):
        house.exporter().export(told.history, best(told), final=True)
    assert incumbent.best() is other
    assert [(name, False), (name, True)] == lost(told)
    assert incumbent.export(final=True) is other


def test_a_resume_sees_at_once_that_the_adapter_is_anothers(
    house: House,
    told: Story,
    incumbent: Incumbent,
) -> None:
    """The look round compares it with the lost checkpoint; a whole one of the same trial stands in."""
    name, other = str(best(told).best_checkpoint), replaced(house, told)
    shutil.rmtree(house.checkpoints / name)
    incumbent.look_round()
    assert [(name, True)] == lost(told)
    assert best(told) is other


def test_the_best_trials_own_adapter_stands_in_for_its_checkpoint(
    house: House,
    told: Story,
    incumbent: Incumbent,
) -> None:
    """As long as it is that: nothing is given up."""
    name = str(best(told).best_checkpoint)
    shutil.rmtree(house.checkpoints / name)
    incumbent.look_round()
    assert [(name, False)] == lost(told)
    assert incumbent.best() is told.history.trials[0]


def unwritten(told: Story) -> None:
    """A job found no room for its checkpoint."""
    segment = told.start(1, 1)
    job = next(iter(told.history.running))
    told.add(SegmentEnded(job, SegmentResult(1, 1, "unwritten", segment.start_tokens, detail="full")))


@pytest.mark.parametrize("mine", [True, False])
def test_a_full_disk_names_the_adapter_only_if_it_is_the_one_exported(
    house: House,
    told: Story,
    incumbent: Incumbent,
    mine: bool,
) -> None:
    """Else it says nothing of an adapter."""
    for _ in range(2):
        unwritten(told)
    if not mine:
        replaced(house, told)
    with pytest.raises(DiskError) as caught:
        incumbent.check_disk()
    assert mine == ("The best adapter so far is in" in str(caught.value))


def test_an_older_export_is_not_shown_as_the_best_trials_adapter(told: Story) -> None:
    """Status, report and the lines that load it: until the better one is exported there is none to name."""
    path = told.history.exported.path if told.history.exported else None
    assert path == status_dict(told.history)["best"]["adapter_path"]
    assert path in "".join(load_lines(told.history))
    told.train(told.trial(params(16)), 0.9)
    assert status_dict(told.history)["best"]["adapter_path"] is None
    assert [] == load_lines(told.history)
    found = answer_of(told.history).best
    assert found is not None
    assert (2, None) == (found.trial_id, found.adapter_path)


def test_a_failed_run_names_the_trial_that_the_adapter_names(
    house: House,
    told: Story,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not the one that the ledger, which lost its end, exported last."""
    replaced(house, told)
    monkeypatch.setattr(failure, "read_entries", lambda path: told.entries)
    (house.root / "run" / "ledger.sqlite").touch()
    lines = after_failure(house.root / "run")
    assert any("the adapter of trial 1 in" in line for line in lines)
    assert Path(house.root / "run" / "adapter").is_dir()


# ---------------------------------------------------------------------- the end of a run


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no file of an adapter can be written."""

    def build(self: object, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export.AdapterExporter, "_build", build)


def test_at_the_end_the_adapter_that_stands_will_do(
    told: Story, incumbent: Incumbent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no room to write it once more: it is the best trial's and whole, so the run has one."""
    full(monkeypatch)
    assert incumbent.export(final=True) is best(told)
    noticed, exported = (entry.event for entry in told.entries[-2:])
    assert isinstance(noticed, Noticed)
    assert "No space left on device). The best trial's adapter stands there already" in noticed.text
    assert exported == Exported(0, str(best(told).best_checkpoint), str(told.history.exported.path), True)  # type: ignore[union-attr]


def test_a_checkpoint_that_cannot_be_read_at_the_end_is_not_needed_either(
    house: House,
    told: Story,
    incumbent: Incumbent,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was made of it before stands."""

    def build(self: object, *_: object) -> None:
        raise UnreadableError("cannot be read now")

    monkeypatch.setattr(export.AdapterExporter, "_source", build)
    assert incumbent.best() is None
    assert incumbent.export(final=True) is best(told)


@pytest.mark.parametrize("final", [True, False])
def test_an_adapter_that_is_anothers_or_damaged_will_not_do(
    house: House,
    told: Story,
    incumbent: Incumbent,
    monkeypatch: pytest.MonkeyPatch,
    final: bool,
) -> None:
    """Then the run fails, as it would without one; and in the middle of a run the end tries again."""
    if final:
        replaced(house, told)
    full(monkeypatch)
    with pytest.raises(DiskError, match="make room"):
        incumbent.export(final=final)


class Brimful(SimDisk):
    """A disk on which the last export finds no room."""

    def export(self, history: History, state: TrialState, *, final: bool) -> str:
        """See the port."""
        if final:
            raise DiskError("The adapter cannot be written (no space left on device).")
        return super().export(history, state, final=final)


def test_a_run_whose_last_export_finds_no_room_is_finished() -> None:
    """It ends with what stands, in time, and says so; no second is unaccounted for."""
    disk = Brimful()
    driver = driver_on(None, disk, budget=900.0)
    history = driver.run()
    assert isinstance(driver.ledger, MemoryLedger)
    check(driver.ledger.entries, 900.0, replay=True)
    assert history.closed is not None
    assert history.exported is not None
    assert ("finished", True) == (history.closed.state, history.exported.final)
    assert history.incumbent is not None
    assert disk.stands(str(history.incumbent.best_checkpoint))
    assert "stands there already, whole" in history.notices[-1][1]
