"""Every example runs as it stands, only with less time and a tiny model in budgetsearch.yaml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.rows import write_rows

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
HOURS = "0.016"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "ledger_with_pandas.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The examples in a folder of their own, with data and settings that name the tiny model."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(EXAMPLES, folder / "examples")
    for script in (folder / "examples").glob("*.py"):
        text = script.read_text(encoding="utf-8")
        script.write_text(re.sub(r"hours=[\d.]+", f"hours={HOURS}", text), encoding="utf-8")
    write_rows(folder / "train.jsonl", 200)
    settings = {"model": str(tiny_model), "space": "lora_small", "task_examples": 4, "max_length": 128}
    settings["data"] = "train.jsonl"
    (folder / "budgetsearch.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def run(place: Path, *arguments: str) -> str:
    """What an example printed; it must have ended well."""
    binary = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "BUDGETSEARCH_CACHE": str(place / "cache"),
        "PATH": f"{binary}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        arguments, cwd=place, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


FURTHER = ("log_to_tensorboard.py", "own_space.py", "python_api.py", "sources.py")
"""Whole runs like those of README; `make test-slow` has them."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in FURTHER else []) for name in SCRIPTS]
)
def test_a_script_runs(place: Path, name: str) -> None:
    """It ends well and prints where things are."""
    if "tensorboard" in name:
        pytest.importorskip("tensorboard")
    printed = run(place, sys.executable, f"examples/{name}")
    expected = {
        "python_api.py": "adapter",
        "own_space.py": "alpha",
        "log_to_tensorboard.py": "tfevents",
        "sources.py": "18 rows from Python are trained on",
    }
    assert expected[name] in printed


@pytest.mark.slow
def test_the_command_line_on_own_data_and_its_ledger_as_tables(place: Path) -> None:
    """From doctor to the adapter; then pandas finds every second that was charged."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    printed = run(place, "bash", "examples/own_data.sh", "train.jsonl", HOURS, "runs/own")
    assert "adapter_model.safetensors" in printed
    pytest.importorskip("pandas")
    tables = run(place, sys.executable, "examples/ledger_with_pandas.py", "runs/own")
    for heading in ("Seconds by phase", "Segments", "Trials", "best loss", "learning_rate"):
        assert heading in tables


def test_the_list_of_examples_is_complete() -> None:
    """README names every file beside it."""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert {p.name for p in EXAMPLES.iterdir()} - {"README.md"} <= set(re.findall(r"\(([\w.]+)\)", text))


RECIPES = {"digits": "Digits", "trees": "Trees", "sentences": "Sentences", "preferences": "Preferences"}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_keeps_its_promises(place: Path, tiny_model: Path, name: str) -> None:
    """Each is examined on the CPU: pauses, checkpoints and seeds change nothing."""
    recipe = f"examples/recipes/{name}.py:{RECIPES[name]}"
    command = [sys.executable, "-m", "budgetsearch", "check", recipe]
    environment = {**os.environ, "BASE_MODEL": str(tiny_model), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "BROKEN" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "preferences"])
def test_a_recipe_ends_before_its_deadline_with_something_better(
    place: Path, tiny_model: Path, name: str, tmp_path: Path
) -> None:
    """A whole run in real processes."""
    import budgetsearch as bs

    recipe = f"{place}/examples/recipes/{name}.py:{RECIPES[name]}"
    environment = {**os.environ, "BASE_MODEL": str(tiny_model), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "budgetsearch", "run", "--recipe", recipe, "--gpu", "cpu"]
    done = subprocess.run(
        [*command, "--hours", "90s", "--out", str(tmp_path / "run")],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    run = bs.open(tmp_path / "run")
    assert "finished" == run.state
    assert run.spent_seconds < 90
    assert run.score is not None
    assert run.score.adapter_loss < run.score.base_loss
