"""Checkpoints are written beside the evaluation: as things stood, in order, and never half."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from budgetsearch.training import checkpoints, recipe
from budgetsearch.training.members import Shop
from budgetsearch.training.recipe import GangTraining, train_gang
from budgetsearch.training.writer import Writer
from tests.support.training import base, make_segment

WAIT = 20.0


@pytest.fixture
def training(tiny_model: Path, shop: Shop) -> GangTraining:
    """Two trials after a step or two."""
    segments = [make_segment(stop=200, trial_id=number) for number in (1, 2)]
    found = GangTraining.set_up(base(tiny_model), segments, shop)
    found.train()
    return found


def test_what_is_written_is_what_stood_when_it_began(
    training: GangTraining, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens to the weights meanwhile, as an evaluation puts the averages into their place; the
    second waits for the first, and nobody leaves before both are there."""
    real, may_write, order = checkpoints.save, threading.Event(), []

    def slow(folder: Path, **content: Any) -> None:
        assert may_write.wait(WAIT)
        order.append(folder.name)
        real(folder, **content)

    monkeypatch.setattr(checkpoints, "save", slow)
    kept = [{n: w.clone() for n, w in m.adapter.weights().items()} for m in training.members]
    with Writer() as writer:
        for member in training.members:
            writer.begin(member)
            for weight in (*member.adapter.weights().values(), *member.adapter.average.values()):
                weight.zero_()
        assert order == []
        may_write.set()
        names = [writer.saved(member) for member in training.members]
    assert order == names
    for name, weights in zip(names, kept, strict=True):
        saved = checkpoints.load(shop.checkpoint_path / name)
        assert all(torch.equal(saved.tensors[f"weight/{n}"], weight) for n, weight in weights.items())
        assert any(weight.any() for weight in saved.adapter.values())


def test_an_end_in_the_midst_of_writing_leaves_the_former_checkpoint(
    training: GangTraining, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails in the thread is raised where the checkpoint is asked for; no half of it has its name."""
    member = training.members[0]
    former = member.save()
    before = sorted(path.name for path in shop.checkpoint_path.iterdir())

    def cut(*args: Any, **rest: Any) -> None:
        raise OSError(28, "No space left on device")

    member.tokens += 1
    with monkeypatch.context() as patch, Writer() as writer:
        patch.setattr(checkpoints.sums, "describe", cut)
        writer.begin(member)
        with pytest.raises(OSError, match="No space left"):
            writer.saved(member)
    assert sorted(path.name for path in shop.checkpoint_path.iterdir()) == before
    assert checkpoints.load(shop.checkpoint_path / former).progress.tokens == member.tokens - 1


def test_an_evaluation_that_is_not_finite_takes_the_checkpoint_back(
    tiny_model: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody goes on from weights that diverged, and they take no room on the disk."""
    real = recipe.example_losses
    nan = float("nan")
    monkeypatch.setattr(recipe, "example_losses", lambda *a, **k: [[nan] * len(r) for r in real(*a, **k)])
    segment = dataclasses.replace(make_segment(stop=200), trial_id=8)
    (result,) = train_gang(base(tiny_model), [segment], shop, 2)
    assert (result.status, result.checkpoint_out) == ("diverged", None)
    assert not list(shop.checkpoint_path.glob("*trial0008*"))
