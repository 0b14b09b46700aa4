"""Whole runs of a training of one's own, in real worker processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import budgetsearch as bs
from budgetsearch.core.errors import UntrustedCode
from budgetsearch.core.space.space import Space
from budgetsearch.machine.detect import detect
from budgetsearch.run.configuration import load_settings
from budgetsearch.run.recipes import PreparedRecipe, RecipeExporter
from budgetsearch.storage.ledger import read_history
from budgetsearch.training import sums
from budgetsearch.training.recipes.loading import find_recipe, load_recipe

FILE = Path(__file__).parents[1] / "support/recipes/mean.py"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A copy of the recipe, where its user works."""
    return Path(shutil.copyfile(FILE, tmp_path / "mean.py"))


def test_a_recipe_runs_under_the_deadline_and_is_told_in_its_own_words(mine: Path, tmp_path: Path) -> None:
    """From its class's name to an exported result, a report and a comparison."""
    out = tmp_path / "run"
    run = bs.run(recipe=f"{mine}:Exported", hours="18s", gpu="cpu", out=out, progress=False)
    assert "finished" == run.state
    assert run.spent_seconds < 18
    assert run.best is not None
    assert {"rate", "noise"} == set(run.best.params)
    assert run.best.loss < 9.0
    assert out / "adapter" == run.adapter_path
    found = {path.name for path in (out / "adapter").iterdir()}
    assert {"answer.txt", "README.md", "budgetsearch.json", "SHA256SUMS"} == found
    told = (out / "report.md").read_text()
    assert "squared error" in told
    assert "steps" in told
    assert "nats" not in told
    assert "distance (n = 1; lower is better)" in told, "its second metric"
    assert "chosen by" not in told
    assert "untrained" in str(run)
    assert (out / "report.html").is_file()
    assert ("Exported",) == tuple(row.model for row in bs.list_runs(tmp_path).runs)
    assert "squared error" in told and bs.compare([out, out]).runs
    shutil.rmtree(out / "adapter")
    assert (bs.resume(out).adapter_path or out).is_dir()


@pytest.mark.parametrize(("name", "share"), [("Mean", 0.1), ("whole", 0.4)])
def test_without_a_length_trials_are_promoted_towards_a_tenth_of_the_budget(name: str, share: float) -> None:
    """Nothing says that they need more; one that has a length says so itself."""
    settings = load_settings({"recipe": f"{FILE}:{name}", "gpu": "cpu", "hours": "2m"})
    recipe = load_recipe(find_recipe(f"{FILE}:{name}"))
    space = Space.parse({**(recipe.space or {}), "free": True})
    prepared = PreparedRecipe.of(settings, detect("cpu"), space)
    assert share == prepared.request(space, 120.0).full_share


def test_code_runs_only_where_this_user_named_it(mine: Path, tmp_path: Path) -> None:
    """A settings file of a folder does not decide that, and neither does its ledger."""
    (tmp_path / "budgetsearch.yaml").write_text(f"recipe: {mine}:Mean\n")
    with pytest.raises(UntrustedCode, match="--recipe"):
        load_settings({}, cwd=tmp_path)
    assert load_settings({"recipe": f"{mine}:Mean", "gpu": "cpu"}, cwd=tmp_path).recipe == f"{mine}:Mean"


def test_what_a_folders_file_says_of_adapters_does_not_stand_in_a_recipes_way(
    mine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A recipe on the command line is what is wanted now; a file that is named, too, must agree with it."""
    file = tmp_path / "budgetsearch.yaml"
    file.write_text("model: some/model\ndata: rows.jsonl\nspace: lora_small\nhours: 30m\ngpu: cpu\n")
    found = load_settings({"recipe": f"{mine}:Mean"}, cwd=tmp_path)
    assert (0.5, "cpu", None) == (found.hours, found.gpu, found.valid)
    assert f"{file}: model, data, space not used, for a recipe has its own" in caplog.text
    assert "lora_small" != found.space
    with pytest.raises(bs.SettingsError, match=rf"model in {file}, data in .*: a recipe has model and data"):
        load_settings({"recipe": f"{mine}:Mean"}, config=file, cwd=tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": "x.jsonl"}, "--data: a recipe has model and data of its own"),
        ({"recipe": "nowhere:Mean"}, "no module nowhere"),
        ({"space": "nothing"}, "no search space 'nothing'"),
        ({"recipe": f"{FILE}:Broken"}, "no data here"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    given: dict[str, str], said: str, tmp_path: Path
) -> None:
    """One error that says what, and no folder."""
    settings = {"recipe": f"{FILE}:Mean", "gpu": "cpu", "hours": "30s", "out": tmp_path / "run", **given}
    with pytest.raises(bs.UsageError, match=said):
        bs.run(**settings)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_damaged_manifest_beside_a_result_hides_none_of_its_files(tmp_path: Path) -> None:
    """What was exported is told by the sums; whether it is whole they tell as well."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("answer.txt", "README.md", "budgetsearch.json"):
        (adapter / name).write_text("{")
    exporter = RecipeExporter(tmp_path, tmp_path / "checkpoints", {}, {}, tmp_path)
    assert {"answer.txt": "answer.txt"} == exporter.names(sums.write_sums(adapter), adapter)


def command(*arguments: str) -> list[str]:
    """The command line, as a process of its own."""
    return [sys.executable, "-m", "budgetsearch", *arguments]


RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": (f"{FILE}:Mean", {
        "rate": {"kind": "float", "low": 0.001, "high": 0.1, "log": True},
        "noise": {"kind": "float", "low": 0.0, "high": 0.1},
    }),
    "digits": (f"{FILE.parent / 'digits.py'}:Digits", {
        "width": {"kind": "choice", "values": [8, 16], "ordered": True},
        "learning_rate": {"kind": "float", "low": 1e-4, "high": 1e-2, "log": True},
        "weight_decay": {"kind": "float", "low": 1e-5, "high": 1e-2, "log": True},
        "dropout": {"kind": "float", "low": 0.0, "high": 0.3},
    }),
}  # fmt: skip
"""A number that learns, and the example in plain PyTorch: where they are, and what they take."""


def troubled(folder: Path, recipe: str, trouble: str) -> Path:
    """A space in which half of the configurations go wrong."""
    dimensions = {**RECIPES[recipe][1], "trouble": {"kind": "choice", "values": ["", trouble]}}
    path = folder / "space.yaml"
    path.write_text(json.dumps({"dimensions": dimensions}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["nan", "memory", "die", "hang", "back"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_survives_what_goes_wrong_in_its_recipe(recipe: str, trouble: str, tmp_path: Path) -> None:
    """Some trials fail, one that is well is exported, and the deadline is kept."""
    out, began, seconds = tmp_path / "run", time.monotonic(), 40 if recipe == "mean" else 70  # torch is slow
    space = str(troubled(tmp_path, recipe, trouble))
    settings = {"space": space, "hours": f"{seconds}s", "gpu": "cpu", "out": out}
    run = bs.run(recipe=RECIPES[recipe][0], first_rung=0.04, grace_seconds=1.0, **settings)  # type: ignore[arg-type]
    assert time.monotonic() - began < seconds + 2
    assert run.best is not None
    assert "" == run.best.params["trouble"]
    statuses = {result.status for _, result in read_history(run.ledger).results}
    wanted = {"nan": "diverged", "memory": "out_of_memory", "die": "crashed", "hang": "timeout"}
    assert statuses & {wanted.get(trouble, "crashed"), "crashed"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_goes_on_from_its_checkpoints(recipe: str, tmp_path: Path) -> None:
    """kill -9 loses at most what ran; who began the run need not name the recipe again, a stranger must."""
    out = tmp_path / "run"
    arguments = ["run", "--recipe", RECIPES[recipe][0], "--hours", "45s", "--gpu", "cpu", "--out", str(out)]
    process = subprocess.Popen(command(*arguments), cwd=tmp_path, start_new_session=True)
    until = time.monotonic() + 40
    while time.monotonic() < until and not (out / "adapter").is_dir():
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = len(read_history(out / "ledger.sqlite").results)
    assert before > 0
    empty = {**os.environ, "BUDGETSEARCH_CACHE": str(tmp_path / "elsewhere")}
    refused = subprocess.run(
        command("resume", str(out)), cwd=tmp_path, env=empty, capture_output=True, text=True, check=False
    )
    assert 2 == refused.returncode
    assert "--recipe" in refused.stderr
    done = subprocess.run(
        command("resume", str(out)), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert 0 == done.returncode, done.stderr
    history = read_history(out / "ledger.sqlite")
    assert len(history.results) > before
    assert history.closed is not None
    assert "finished" == history.closed.state


@pytest.mark.slow
def test_a_function_runs_whole_under_the_same_deadline(mine: Path, tmp_path: Path) -> None:
    """``objective``: each promotion is a call with a larger budget."""
    run = bs.run(recipe=f"{mine}:whole", hours="25s", gpu="cpu", out=tmp_path / "run", progress=False)
    assert "finished" == run.state
    assert run.spent_seconds < 25
    told = json.loads((tmp_path / "run/adapter/value.json").read_text())
    assert told["params"] == dict(run.best.params)  # type: ignore[union-attr]
    assert told["value"] == pytest.approx(run.best.loss)  # type: ignore[union-attr]


@pytest.mark.slow
def test_two_workers_on_ray_train_a_recipe(mine: Path, tmp_path: Path) -> None:
    """The same policy on the same recipe, its code found by workers in processes of the cluster."""
    pytest.importorskip("ray")
    more: dict[str, Any] = {"engine": "ray", "gpus": 2}
    run = bs.run(
        recipe=f"{mine}:Exported", hours="70s", gpu="cpu", out=tmp_path / "run", progress=False, **more
    )
    assert "finished" == run.state
    assert run.spent_seconds < 70
    history = read_history(tmp_path / "run/ledger.sqlite")
    assert history.plan is not None
    assert 2 == history.plan.workers
    assert len(history.results) > 20
    assert (tmp_path / "run/adapter/answer.txt").is_file()
