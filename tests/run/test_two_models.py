"""A whole search over two tiny base models, one of which is clearly better; and what is refused before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import budgetsearch
from budgetsearch.core.bases import facts_for
from budgetsearch.core.errors import UsageError
from budgetsearch.storage.ledger import read_entries, read_history
from budgetsearch.tools.simulate.invariants import check
from tests.support.rows import write_rows
from tests.support.two_models import make_two

SECONDS = 260
SPACE = """dimensions:
  quantization: {kind: choice, values: [fp32, nf4]}
  rank: {kind: choice, values: [2, 4, 8], ordered: true}
  learning_rate: {kind: float, low: 1.0e-3, high: 3.0e-2, log: true}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and rows."""
    place = tmp_path_factory.mktemp("two")
    make_two(place, write_rows(place / "train.jsonl", 200))
    (place / "space.yaml").write_text(SPACE, encoding="utf-8")
    models = json.dumps([str(place / "better"), str(place / "other")])
    (place / "budgetsearch.yaml").write_text(
        f"model: {models}\ndata: train.jsonl\ngpu: cpu\nspace: space.yaml\nhours: {SECONDS}s\n"
        "task_examples: 4\nmax_length: 128\n",
        encoding="utf-8",
    )
    return place


def command(place: Path, *arguments: str) -> subprocess.Popen[str]:
    """``budgetsearch`` in the workplace."""
    environment = {**os.environ, "BUDGETSEARCH_CACHE": str(place / "cache")}
    line = [sys.executable, "-m", "budgetsearch", *arguments]
    return subprocess.Popen(
        line, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A finished run that was stopped once in the middle of its search."""
    going = command(place, "run", "--out", "run")
    assert going.stdout is not None
    for line in going.stdout:
        if "trial 1" in line:
            going.send_signal(signal.SIGINT)
            break
    going.communicate(timeout=SECONDS)
    assert going.returncode == 130
    more = command(place, "resume", "run")
    output, _ = more.communicate(timeout=2 * SECONDS)
    assert more.returncode == 0, output
    return place / "run"


@pytest.mark.slow
def test_the_better_model_wins_after_a_stop_and_a_resume(run: Path) -> None:
    """Every decision replays; the other model never ran in full; both have been measured."""
    check(list(read_entries(run / "ledger.sqlite")), float(SECONDS), replay=True, slack=1.0)
    history = read_history(run / "ledger.sqlite")
    best, plan = history.incumbent, history.plan
    assert best is not None and plan is not None and history.opened is not None
    assert "better" == best.trial.params["model"]
    assert {"better", "other"} == {base.split("/")[0] for base in plan.reference_rates}
    models = {str(state.trial.params["model"]) for state in history.trials.values() if state.started}
    assert {"better", "other"} == models
    assert {"better"} == {history.trials[n].trial.params["model"] for n in history.full_done}
    assert plan.token_shares["other"] < 1
    told = json.loads((run / "adapter" / "budgetsearch.json").read_text(encoding="utf-8"))
    assert facts_for(history.opened.facts, best.trial.params)["model"]["sha256"] == told["base"]["sha256"]
    assert told["base"]["source"].endswith("better")
    assert told["quantization"] in ("fp32", "nf4")
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert ("better", []) == (manifest["base"]["source"], manifest["data"]["left_out"])
    for text in (run / "report.md", run / "adapter" / "README.md"):
        assert "nats per byte" in text.read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_it_found_can_be_used_verified_and_reproduced(place: Path, run: Path) -> None:
    """By the tools that know nothing but one model."""
    for line in (
        ("verify", "run"),
        ("reproduce", "run"),
        ("status", "run"),
        ("export", "run", "--merged"),
    ):
        done = command(place, *line)
        output, _ = done.communicate(timeout=300)
        assert done.returncode == 0, output


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": ["better", "bare"]}, "has no tokenizer"),
        ({"model": ["better", "better"]}, "twice"),
        ({"model": ["better", "missing/"]}, "no base model"),
        ({"recipe": "my:Recipe"}, "a recipe has model and data of its own"),
        ({"space": "models.yaml"}, "those of --model"),
        ({"revision": "main"}, "does not say which"),
        ({"tries": "model=larger"}, "takes better, other"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_made(
    settings: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clear error, and no folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("better", "other", "bare"):
        Path(name).mkdir()
        for file in tiny_model.iterdir():
            if name != "bare" or "token" not in file.name:
                (Path(name) / file.name).symlink_to(file)
    write_rows(Path("train.jsonl"))
    Path("space.yaml").write_text(SPACE, encoding="utf-8")
    Path("models.yaml").write_text(f"{SPACE}  model: {{kind: constant, value: better}}\n", encoding="utf-8")
    usual: dict[str, Any] = {"model": ["better", "other"], "data": "train.jsonl", "space": "space.yaml"}
    with pytest.raises(UsageError, match=said):
        budgetsearch.run(**{**usual, "gpu": "cpu", "hours": 1, "out": "run", **settings})
    assert not Path("run").exists()
