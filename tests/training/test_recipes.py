"""Training of one's own: how a recipe is found, carried out in a worker, and examined."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.errors import RecipeError
from budgetsearch.core.records import (
    CalibrateJob,
    Landing,
    Schedule,
    ScoreJob,
    Segment,
    SegmentResult,
    TrainJob,
    WorkerSetup,
)
from budgetsearch.core.reports import Notice
from budgetsearch.core.space.space import Space
from budgetsearch.engines.worker import execute
from budgetsearch.training.entry import trainer_of
from budgetsearch.training.recipes.contract import Examination
from budgetsearch.training.recipes.loading import find_recipe, load_recipe
from budgetsearch.training.recipes.workshop import RecipeWorkshop

FILE = Path(__file__).parents[1] / "support/recipes/mean.py"
PARAMS = {"rate": 0.01, "noise": 0.0}


@pytest.fixture(autouse=True)
def _no_trace() -> Iterator[None]:
    """Modules that were loaded from files are forgotten, and so are their folders."""
    paths, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        if "recipes/mean" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@dataclasses.dataclass
class Bench:
    """A workshop of one recipe, and what it said."""

    folder: Path
    name: str = "Mean"

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.said: list[Any] = []
        self.cancelled: set[int] = set()
        code = dataclasses.replace(find_recipe(f"{FILE}:{self.name}"), params=PARAMS)
        setup = WorkerSetup(*("", "", "", str(self.folder), "cpu", "", 0), limit_bytes=10**9, recipe=code)
        made = trainer_of(setup, self.said.append, lambda job: job in self.cancelled)
        assert isinstance(made, RecipeWorkshop)
        self.workshop = made
        self.workshop.recipe.pause = 0.0  # type: ignore[attr-defined]

    def train(self, stop: int, params: Any = PARAMS, **more: Any) -> SegmentResult:
        segment = dataclasses.replace(
            Segment(0, params, 5, 0, 0, stop, Schedule(10, stop), batch_size=1, micro_batch=1), **more
        )
        (result,) = execute(self.workshop, TrainJob(1, (segment,), 1, 60.0))
        assert isinstance(result, SegmentResult)
        return result


def test_a_recipe_is_calibrated_with_values_of_its_own(tmp_path: Path) -> None:
    """A ``model`` keeps its type, and a quantization its slash."""
    bench, seen = Bench(tmp_path / "run"), []
    bench.workshop._params = {**PARAMS, "model": 1, "quantization": "nf4"}
    start = bench.workshop.recipe.start
    bench.workshop.recipe.start = lambda params, seed: seen.append(params) or start(params, seed)  # type: ignore
    job = CalibrateJob(1, "int4/g128", (8,), 1, 60.0, probe_seconds=0.01)
    assert "int4/g128" == bench.workshop.calibrate(job).quantization
    assert {**PARAMS, "model": 1, "quantization": "int4/g128"} == seen[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mean", "names no class"),
        ("nowhere:Mean", "there is no module nowhere"),
        ("nowhere.py:Mean", "there is no file"),
        (f"{FILE}:Meen", "did you mean 'Mean'"),
        (f"{FILE}:no_recipe", "is no recipe"),
        (f"{FILE}:Incomplete", "has no start, train, evaluate, save, load"),
        (f"{FILE}:Broken", "no data here"),
    ],
)
def test_a_recipe_that_cannot_be_had_says_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    """What, where, and what to do, before a second is spent."""
    with pytest.raises(RecipeError, match=said):
        load_recipe(find_recipe(text, tmp_path))


def test_a_module_of_the_working_folder_is_found_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    """What a run began with is what its worker trains."""
    (tmp_path / "mine.py").write_text("import budgetsearch as bs\n@bs.objective\ndef f(p, b): return 1.0\n")
    code = find_recipe("mine:f", tmp_path)
    assert str(tmp_path / "mine.py") == code.place
    (tmp_path / "mine.py").write_text("raise SystemExit\n")
    with pytest.raises(RecipeError, match="is another file now"):
        load_recipe(code)


def test_a_trial_that_was_paused_equals_one_that_was_not(tmp_path: Path) -> None:
    """Schedule, checkpoint and losses are the same to the bit."""
    whole = Bench(tmp_path / "a").train(60)
    bench = Bench(tmp_path / "b")
    half = bench.train(25, schedule=Schedule(10, 60))
    rest = bench.train(60, start_tokens=25, checkpoint_in=half.checkpoint_out)
    assert ("ok", 60) == (whole.status, whole.tokens) == (rest.status, rest.tokens)
    assert whole.example_losses == rest.example_losses
    assert 4 == len(whole.example_losses)
    assert whole.loss == pytest.approx(sum(whole.example_losses) / 4)


def test_a_full_run_lands_by_its_own_clock(tmp_path: Path) -> None:
    """It ends earlier where its time does, cooled down, and says how it was changed."""
    bench = Bench(tmp_path / "a")
    bench.workshop.recipe.pause = 0.005  # type: ignore[attr-defined]
    landing = Landing(0.6, 1000.0, 0.01, 0.01, 10_000)
    result = bench.train(10_000, schedule=Schedule(10, 10_000, 2_000), landing=landing)
    assert "ok" == result.status
    assert 20 < result.tokens < 2_000
    assert result.revisions
    assert result.revisions[-1].schedule.stop_tokens <= result.tokens


@pytest.mark.parametrize(
    ("trouble", "status"),
    [("nan", "diverged"), ("float", "diverged"), ("memory", "out_of_memory"), ("back", "crashed")],
)
def test_what_goes_wrong_in_a_recipe_becomes_a_status(trouble: str, status: str, tmp_path: Path) -> None:
    """As with adapters: the run goes on without the trial."""
    result = Bench(tmp_path / "a").train(30, {**PARAMS, "trouble": trouble})
    assert status == result.status
    assert result.loss is None
    assert result.checkpoint_out is None
    if trouble == "back":
        assert "never back" in result.detail


def test_a_recipe_that_foresees_too_much_memory_does_not_start(tmp_path: Path) -> None:
    """Infeasible configurations are foreseen."""
    bench = Bench(tmp_path / "a")
    bench.workshop.recipe.memory = lambda params: 2 * 10**9  # type: ignore[method-assign]
    assert "out_of_memory" == bench.train(30).status


def test_a_cancelled_segment_keeps_what_it_trained(tmp_path: Path) -> None:
    """It is saved where it stands."""
    bench = Bench(tmp_path / "a")
    stops = iter([False] * 20)
    bench.workshop._stopping = lambda job: next(stops, True)
    result = bench.train(1000)
    assert "cancelled" == result.status
    assert 0 < result.tokens < 1000
    assert f"trial0000-rung0-tokens{result.tokens}-attempt0" == result.checkpoint_out


def test_a_damaged_checkpoint_is_lost_and_not_loaded(tmp_path: Path) -> None:
    """The files are compared with their sums before the recipe sees them."""
    bench = Bench(tmp_path / "a")
    name = bench.train(20).checkpoint_out
    (tmp_path / "a" / str(name) / "mean.json").write_text("{}")
    result = bench.train(40, start_tokens=20, checkpoint_in=name)
    assert "lost" == result.status
    assert "mean.json has changed" in result.detail


def test_the_calibration_and_the_scores_are_measured(tmp_path: Path) -> None:
    """Rates, seconds, and the trained trial against an untrained one."""
    bench = Bench(tmp_path / "a")
    bench.workshop.recipe.pause = 0.001  # type: ignore[attr-defined]
    (found,) = execute(bench.workshop, CalibrateJob(-1, "any", (16,), 1, 60.0, probe_seconds=0.2))
    assert found.sound
    assert 50 < found.tokens_per_second < 1000
    name = bench.train(300).checkpoint_out
    (score,) = execute(bench.workshop, ScoreJob(2, "any", str(name), 1, 0, 1, 60.0))
    assert 9.0 == pytest.approx(score.base_loss)
    assert score.adapter_loss < 1.0
    assert 4 == len(score.example_tokens)


@pytest.mark.parametrize(("name", "values"), [("Exported", 1), ("Secondless", 0), ("Mean", 0)])
def test_a_second_metric_that_fails_costs_itself_alone(name: str, values: int, tmp_path: Path) -> None:
    """The losses stand whatever it does, the calibration has timed it, and what went wrong is told."""
    bench = Bench(tmp_path / "a", name)
    kept = str(bench.train(300).checkpoint_out)
    calls: list[Any] = []
    second = bench.workshop.recipe.second
    bench.workshop.recipe.second = lambda trial: calls.append(trial) or second(trial)  # type: ignore
    execute(bench.workshop, CalibrateJob(-1, "any", (16,), 1, 60.0, probe_seconds=0.01))
    assert bool(calls) == (name != "Mean")
    (score,) = execute(bench.workshop, ScoreJob(2, "any", kept, 1, 0, 1, 60.0))
    assert score.adapter_loss < score.base_loss
    assert (values, values) == (len(score.base_metric), len(score.adapter_metric))
    told = [one.text for one in bench.said if isinstance(one, Notice)]
    assert (name == "Secondless") == any("second metric failed" in text for text in told)


def test_what_is_handed_out_may_be_another_thing(tmp_path: Path) -> None:
    """The files of ``export`` stand beside those of ``save``, and training goes on from the latter."""
    bench = Bench(tmp_path / "a", "Exported")
    name = str(bench.train(20).checkpoint_out)
    files = {path.name for path in (tmp_path / "a" / name).iterdir()}
    assert {"mean.json", "export.answer.txt", "state.json"} == files
    assert 40 == bench.train(40, start_tokens=20, checkpoint_in=name).tokens


def test_a_function_is_run_whole_for_each_segment(tmp_path: Path) -> None:
    """``objective``: nothing is paused, and what is exported is its value."""
    bench = Bench(tmp_path / "a", "whole")
    recipe, calls = bench.workshop.recipe, []
    type(recipe).function = staticmethod(lambda params, budget: calls.append(budget) or 1.0 / budget)  # type: ignore[attr-defined]
    first = bench.train(30)
    again = bench.train(90, start_tokens=30, checkpoint_in=first.checkpoint_out)
    assert [30, 90] == calls
    assert 1.0 / 90 == pytest.approx(again.loss)
    saved = json.loads((tmp_path / "a" / str(again.checkpoint_out) / "value.json").read_text())
    assert 90 == saved["budget"]


BREACHES = {
    "Mean": "",
    "Exported": "",
    "Forgetful": "load gives back what was saved",
    "Restless": "evaluate changes nothing",
    "Foldered": "save and export write files alone",
    "Silent": "start, train and evaluate run",
    "Secondless": "second gives praise",
    "whole": "",
}


@pytest.mark.parametrize("name", BREACHES)
def test_the_contract_finds_what_a_recipe_breaks(name: str) -> None:
    """And nothing in one that keeps it."""
    recipe = load_recipe(find_recipe(f"{FILE}:{name}"))
    recipe.pause = 0.0  # type: ignore[attr-defined]
    space = Space.parse({**(recipe.space or {}), "free": True})
    broken = [promise.name for promise in Examination(recipe, space).examine() if not promise.kept]
    assert BREACHES[name] in (broken or [""])
    assert bool(BREACHES[name]) == bool(broken)


def test_files_that_run_code_when_they_are_read_are_named() -> None:
    """It is no breach, and worth a word."""
    recipe = load_recipe(find_recipe(f"{FILE}:Pickled"))
    recipe.pause = 0.0  # type: ignore[attr-defined]
    space = Space.parse({**(recipe.space or {}), "free": True})
    found = Examination(recipe, space).examine()
    assert all(promise.kept for promise in found)
    assert any("state.pt" in promise.detail for promise in found)


def test_a_rate_without_warmup_and_cooldown_is_one() -> None:
    """What ``Course.rate`` gives is the schedule's factor."""
    from budgetsearch.training.recipes.protocol import Course

    course = Course(lambda: Schedule(10, 100, 20), lambda: False, lambda units, loss: None)
    assert [0.1, 1.0, 1.0] == [course.rate(at) for at in (0, 10, 80)]
    assert 0.0 == course.rate(100)
    assert math.isclose(1.0 - math.sqrt(0.5), course.rate(90))
