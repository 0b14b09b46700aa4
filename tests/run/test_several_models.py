"""Several base models before they are trained: what they are called, and what is asked of each."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from budgetsearch.core.space.models import with_models
from budgetsearch.core.space.space import Space
from budgetsearch.run import models
from budgetsearch.run.models import PreparedModels
from budgetsearch.run.possible import check_possible
from budgetsearch.run.preflight import anchored, labels, space_of
from budgetsearch.run.settings import Settings
from tests.support.simulation import SPACE, request


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Two models, named from the folder of one of them."""
    for name in ("here", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "rows.jsonl").write_text("{}")
    values: dict[str, Any] = {"data": "../rows.jsonl", "space": "lora", "max_length": 8, "batch_size": 1}
    return Settings(model=".\n../other", hours=1, out=Path("run"), **values)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Space | None]:
    """The space that each model had to be possible in, by the folder that it was named by."""
    found: dict[str, Space | None] = {}

    def prepare(one: Settings, say: Any, left: Any, space: Space | None) -> tuple[Any, Any]:
        found[Path(one.model).name] = space
        return None, SimpleNamespace(valid=[0])

    monkeypatch.setattr(models, "prepare_inputs", prepare)
    monkeypatch.setattr(models, "in_common", lambda data, length: [() for _ in data])
    return found


def prepared(settings: Settings, space: Space) -> PreparedModels:
    """All of them, of which nothing is looked at."""
    return PreparedModels.of(settings, None, lambda line: None, space)  # type: ignore[arg-type]


def test_models_are_called_alike_before_and_after_their_paths_are_absolute(
    settings: Settings, asked: dict[str, Space | None]
) -> None:
    """A dot says nothing of the folder that it means."""
    space = space_of(settings)
    assert ("here", "other") == space.values_of("model") == labels(settings)
    assert ("here", "other") == tuple(prepared(anchored(settings), space).each)


def test_a_model_that_the_plan_has_dropped_need_not_be_possible(
    settings: Settings, asked: dict[str, Space | None]
) -> None:
    """What is left of the space may hold nothing that it could be had under; its tokens still count."""
    left = with_models(Space.parse(SPACE).restrict("quantization", ["nf4"]), ["other"])
    assert {"here", "other"} == set(prepared(anchored(settings), left).each)
    other = asked["other"]
    assert asked["here"] is None
    assert other is not None and ("nf4",) == other.quantizations

    def one(tokens: int) -> Any:
        stats = SimpleNamespace(tokens=tokens, rows=10)
        return SimpleNamespace(
            data=SimpleNamespace(train_stats=stats, valid_stats=stats),
            request=lambda space, seconds: request(seconds, space=space.to_dict(), train_tokens=tokens),
        )

    here = one(200)
    here.request = lambda space, seconds: check_possible("here", space.quantizations, {"nf4": "packed"})
    found = PreparedModels(settings, {"here": here, "other": one(100)}, {"here": ()}).request(left, 720.0)
    assert (200, {"here": 1.0, "other": 0.5}) == (found.train_tokens, found.token_shares)
    assert ("other/nf4",) == Space.parse(found.space).cost_classes
