"""The training of adapters is a recipe: it keeps every recipe's contract, and its trainer trains gangs."""

from __future__ import annotations

from pathlib import Path

import pytest

from budgetsearch.core.records import WorkerSetup
from budgetsearch.core.space.space import Space
from budgetsearch.training.adapters_recipe import Adapters
from budgetsearch.training.entry import trainer_of
from budgetsearch.training.members import Shop
from budgetsearch.training.recipes.contract import Examination
from budgetsearch.training.recipes.protocol import Course
from budgetsearch.training.workshop import Workshop
from tests.support.training import PARAMS, make_segment

SPACE = Space.parse(
    {
        "dimensions": {
            "quantization": {"kind": "constant", "value": "fp32"},
            "rank": {"kind": "choice", "values": [2, 4], "ordered": True},
            "learning_rate": {"kind": "float", "low": 1e-3, "high": 1e-2, "log": True},
            "dropout": {"kind": "constant", "value": 0.1},
        }
    },
    "test",
)


@pytest.fixture
def workshop(shop: Shop, tiny_model: Path) -> Workshop:
    """What a run's worker has for adapters."""
    folder = str(shop.checkpoint_path)
    setup = WorkerSetup(str(tiny_model), "tiny", str(shop.data.folder), folder, "cpu", shop.targets, 0)
    made = trainer_of(setup, lambda report: None, lambda job: False)
    assert isinstance(made, Workshop)
    return made


def test_it_keeps_what_every_recipe_promises(workshop: Workshop) -> None:
    """Pauses, checkpoints, seeds, dropout masks: all points of the contract, exactly."""
    recipe = Adapters(workshop, batch_size=4)
    recipe.step = 200  # type: ignore[misc]
    promises = Examination(recipe, SPACE).examine()
    assert [] == [(one.name, one.detail) for one in promises if not one.kept]
    names = " ".join(one.name for one in promises)
    assert "a pause changes nothing" in names
    assert "goes on as if it had never stopped" in names
    assert [] == list(workshop.shop.checkpoint_path.iterdir()), "nothing of it stays"


def test_its_methods_train_as_a_gang_of_one_does(workshop: Workshop, shop: Shop) -> None:
    """The same segment through the trainer: the same loss."""
    from budgetsearch.training.recipe import train_gang

    segment = make_segment(stop=600, params=PARAMS)
    base, _ = workshop.bases.get("fp32")
    (result,) = train_gang(base, [segment], workshop.shop, len(workshop.shop.data.valid))
    recipe = Adapters(workshop, batch_size=segment.batch_size)
    trial = recipe.start(PARAMS, segment.seed)
    course = Course(lambda: segment.schedule, lambda: False, lambda units, loss: None)
    assert result.tokens == recipe.train(trial, 0, 600, course)
    assert result.example_losses == pytest.approx(recipe.evaluate(trial), rel=1e-5)


def test_a_trial_that_runs_away_or_does_not_fit_says_so(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words of the protocol."""
    recipe, segment = Adapters(workshop), make_segment()
    course = Course(lambda: segment.schedule, lambda: False, lambda units, loss: None)
    wild = recipe.start({**PARAMS, "learning_rate": 1e7}, 0)
    with pytest.raises(FloatingPointError):
        recipe.train(wild, 0, 20_000, course)
    full = recipe.start(PARAMS, 0)
    monkeypatch.setattr(full, "step_on", lambda gang, group: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError, match="one sample alone does not fit"):
        recipe.train(full, 0, 20_000, course)
    waiting = recipe.start(PARAMS, 0)
    assert 0 == recipe.train(waiting, 0, 600, Course(lambda: segment.schedule, lambda: True, lambda *_: None))
