"""Checkpoints that are there and cannot be read for a while: tried again, kept, and never called lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.decisions import Run
from budgetsearch.core.errors import CheckpointError, UnreadableError
from budgetsearch.core.events import CheckpointLost, Exported, Resumed, SegmentEnded
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.history import History
from budgetsearch.core.history.retention import needed_checkpoints
from budgetsearch.core.history.trial import MAX_UNREAD
from budgetsearch.core.policy.decide import decide
from budgetsearch.core.results import untrained
from budgetsearch.run import export
from budgetsearch.run.incumbent import Incumbent
from budgetsearch.storage.ledger import read_entries
from budgetsearch.tools.simulate.invariants import check
from budgetsearch.training import sums
from budgetsearch.training.members import Shop
from budgetsearch.training.recipe import train_gang
from tests.support.exporting import House, best
from tests.support.factories import Story, paused
from tests.support.simdisk import SimDisk, driver_on
from tests.support.training import base, make_segment
from tests.support.worlds import SyntheticWorld

NOW = (errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ESTALE, errno.ENOMEM)
"""What says that the system could not look."""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits between two attempts; returns the pauses."""
    pauses: list[float] = []
    monkeypatch.setattr("budgetsearch.training.sums.time.sleep", pauses.append)
    return pauses


def refuse(monkeypatch: pytest.MonkeyPatch, code: int, where: str, times: int = 10**6) -> list[Path]:
    """From now on files with ``where`` in their path fail with ``code``, so many times; returns those."""
    seen: list[Path] = []
    real: dict[str, Callable[..., Any]] = {n: getattr(Path, n) for n in ("open", "stat", "read_bytes")}

    def guarded(name: str) -> Callable[..., Any]:
        def act(self: Path, *args: Any, **kwargs: Any) -> Any:
            if where in str(self) and len(seen) < times:
                seen.append(self)
                raise OSError(code, os.strerror(code), str(self))
            return real[name](self, *args, **kwargs)

        return act

    for name in real:
        monkeypatch.setattr(Path, name, guarded(name))
    return seen


# --------------------------------------------------------------------------- one file


@pytest.mark.parametrize("code", NOW)
def test_what_cannot_be_read_now_is_no_damage(
    house: House,
    monkeypatch: pytest.MonkeyPatch,
    at_once: list[float],
    code: int,
) -> None:
    """Whatever the system says but that the file is not there: it is tried again, then told apart."""
    house.checkpoint("trial0001-a")
    folder = house.checkpoints / "trial0001-a"
    refuse(monkeypatch, code, "trial0001-a", times=len(sums.PAUSES))
    sums.check(folder)
    assert list(sums.PAUSES) == at_once
    refuse(monkeypatch, code, "trial0001-a")
    for look in (sums.check, sums.check_sizes, sums.read_meta):
        with pytest.raises(UnreadableError, match="cannot be read now"):
            look(folder)


def test_what_is_not_there_is_damage_at_once(house: House, at_once: list[float]) -> None:
    """A missing file does not come back by waiting."""
    house.checkpoint("trial0001-a")
    (house.checkpoints / "trial0001-a" / sums.STATE_FILE).unlink()
    with pytest.raises(CheckpointError):
        sums.check(house.checkpoints / "trial0001-a")
    assert [] == at_once


# ------------------------------------------------------------------- the real trainer


def test_real_training_leaves_an_unreadable_checkpoint_and_trains_the_neighbour(
    shop: Shop, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The segment comes back as not begun and nothing is lost; once the disk answers it goes on."""
    model = base(tiny_model)
    (first,) = train_gang(model, [make_segment(0, 300)], shop, 4)
    again = make_segment(first.tokens, 600, checkpoint_in=first.checkpoint_out)
    with monkeypatch.context() as broken:
        refuse(broken, errno.EIO, str(first.checkpoint_out))
        unread, neighbour = train_gang(model, [again, make_segment(0, 300, trial_id=4)], shop, 4)
    assert ("unread", None) == (unread.status, unread.checkpoint_out)
    assert "Input/output error" in unread.detail
    assert "ok" == neighbour.status
    (done,) = train_gang(model, [again], shop, 4)
    assert "ok" == done.status


# ------------------------------------------------------------------------ the history


def balk(story: Story, trial_id: int, rung: int) -> None:
    """The trial's next segment cannot read its checkpoint."""
    segment = story.start(trial_id, rung, "promotion: place 1 of 3 at rung 0")
    job = next(job for job, some in story.history.running.items() if segment in some)
    result = untrained(segment, "unread", "input/output error")
    story.add(SegmentEnded(job, result))


def next_trials(history: History) -> list[int]:
    """The trials that would run now."""
    assert history.plan is not None
    decision = decide(history.plan, history, history.candidates, history.spent, 1)
    return [s.trial_id for s in decision.job.segments] if isinstance(decision, Run) else []


def test_a_trial_whose_checkpoint_cannot_be_read_rests_and_keeps_everything() -> None:
    """So many attempts, then others run; a resume begins anew. It is not dead, and loses nothing."""
    told = paused()
    state = told.history.trials[2]
    held = state.held
    for attempt in range(MAX_UNREAD):
        assert not state.rests, attempt
        balk(told, 2, 1)
        state = told.history.trials[2]
    assert (True, None, 0, 0) == (state.rests, state.dead, state.crashes, state.lost)
    assert (held, 1000) == (state.held, state.tokens)
    assert state.checkpoint in needed_checkpoints(told.history)
    assert 2 not in next_trials(told.history)
    told.add(Resumed())
    assert not told.history.trials[2].rests
    assert [2] == next_trials(told.history)
    assert fold(told.entries) == told.history


def test_one_that_is_read_after_all_starts_counting_again() -> None:
    """The attempts are those in a row."""
    told = paused()
    balk(told, 2, 1)
    assert 1 == told.history.trials[2].unread
    told.end(told.start(2, 1), 1.1)
    assert 0 == told.history.trials[2].unread


# ----------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("share", [1, 3, 10**6])
def test_a_run_whose_disk_stammers_ends_well_and_loses_no_checkpoint(tmp_path: Path, share: int) -> None:
    """Every time, every third time, or never again for one trial: the promises hold, nothing is lost."""
    count = iter(range(10**9))

    def balks(segment: Any) -> bool:
        return segment.trial_id == 1 if share == 10**6 else next(count) % (share + 1) < share

    path, world = tmp_path / "ledger.sqlite", SyntheticWorld(balks=balks)
    driver = driver_on(path, SimDisk(), world, budget=900.0)
    history = driver.run()
    driver.ledger.close()
    entries = list(read_entries(path))
    check(entries, 900.0, replay=True)
    assert history.closed is not None
    assert "finished" == history.closed.state
    assert any(result.status == "unread" for _, result in history.results)
    assert not [e for e in entries if isinstance(e.event, CheckpointLost)]
    assert not [s for s in history.trials.values() if s.dead]


# ----------------------------------------------------------------------- the exporter


def incumbent_of(told: Story, house: House) -> Incumbent:
    """An incumbent on a real exporter."""
    return Incumbent(house.exporter(), told.add, lambda: told.history)


def test_the_best_keeps_its_place_while_it_cannot_be_read(
    house: House,
    story: Story,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is neither recorded as lost nor replaced by a worse one; the export says so, and works later."""
    incumbent, name = incumbent_of(story, house), str(best(story).best_checkpoint)
    with monkeypatch.context() as broken:
        refuse(broken, errno.ESTALE, name)
        incumbent.look_round()
        assert incumbent.best() is None
        incumbent.export_meanwhile()
        with pytest.raises(UnreadableError, match="Mend its disk"):
            incumbent.export(final=True)
    assert not [e for e in story.entries if isinstance(e.event, CheckpointLost)]
    assert name == best(story).best_checkpoint
    assert (house.checkpoints / name).is_dir()
    assert incumbent.export(final=True) is best(story)


def test_an_adapter_that_cannot_be_read_now_is_not_given_up(
    house: House,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint is damaged, the adapter that was made from it unreadable for a moment: it counts on."""
    told = Story.planned()
    told.train(told.trial(), 1.5)
    name = str(best(told).best_checkpoint)
    house.checkpoint(name)
    incumbent = incumbent_of(told, house)
    incumbent.export(final=False)
    (house.checkpoints / name / sums.ADAPTER_FILE).unlink()
    with monkeypatch.context() as broken:
        refuse(broken, errno.EIO, "/adapter/")
        assert incumbent.best() is None
    lost = [e.event for e in told.entries if isinstance(e.event, CheckpointLost)]
    assert [(name, False)] == [(event.checkpoint, event.exported) for event in lost]
    assert incumbent.best() is best(told)
    assert incumbent.export(final=True) is best(told)
    assert isinstance(told.entries[-1].event, Exported)


def test_a_copy_that_went_wrong_does_not_blame_the_checkpoint(
    house: House,
    story: Story,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The target's disk made something else of it: the source is looked at again, and is whole."""
    incumbent = incumbent_of(story, house)

    def torn(source: Path, target: Path) -> None:
        Path(target).write_text("something else", encoding="utf-8")

    with monkeypatch.context() as broken:
        broken.setattr(export.shutil, "copyfile", torn)
        incumbent.export_meanwhile()
    assert not [e for e in story.entries if isinstance(e.event, CheckpointLost)]
    assert incumbent.export(final=True) is best(story)
