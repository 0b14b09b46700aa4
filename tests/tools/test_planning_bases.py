"""``budgetsearch plan --model A --model B``: which base, which quantization, in this card and these hours."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import budgetsearch
from budgetsearch.cli import app
from budgetsearch.core.errors import BudgetError, DeviceError, UsageError
from budgetsearch.tools.plan.bases import BaseRow, BasesPreview, choose, named
from budgetsearch.tools.plan.show import _base

LARGE, SMALL = "Qwen/Qwen3-14B-Base", "Qwen/Qwen3-8B-Base"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub answers nobody, and nothing is in a cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def bases(**settings: Any) -> BasesPreview:
    """Two models on a card that is not here, unless told otherwise."""
    found = budgetsearch.plan(**{"gpu": "rtx4090", "hours": 24, "model": [LARGE, SMALL], **settings})
    assert isinstance(found, BasesPreview)
    return found


def test_a_14b_in_nf4_is_held_against_an_8b_in_bf16() -> None:
    """What fits and what it costs, of each; the larger one is taken where it has time enough, and why."""
    found = bases()
    rows = {(row.model, row.quantization): row for row in found.bases}
    assert [False, True, True, True] == [row.fits for row in found.bases]
    large, small = rows[LARGE, "nf4"], rows[SMALL, "bf16"]
    assert large.peak_bytes <= found.usable_bytes < rows[LARGE, "bf16"].peak_bytes
    assert large.tokens_per_second < small.tokens_per_second
    assert 5 <= large.trials < small.trials
    assert large is found.choice
    assert any("8.2B weights instead of 15B" in reason for reason in found.ground)
    assert any("does not fit: at least 29.76 GiB" in reason for reason in found.ground)


def test_where_the_larger_one_has_too_little_time_the_smaller_one_is_taken() -> None:
    """Two hours do not hold one pass over the data by a 14B on that card."""
    found = bases(hours=2)
    assert (SMALL, "bf16") == (found.choice.model, found.choice.quantization)
    assert any(f"{LARGE} in nf4 has too little time" in reason for reason in found.ground)


def test_its_trials_are_those_of_the_plan_of_one_model() -> None:
    """They are counted, not played; the policy, played, comes to the same within a fifth."""
    row = bases(hours=8).bases[2]
    space = Path("bf16.yaml")
    space.write_text(
        "dimensions:\n  quantization: {kind: constant, value: bf16}\n"
        "  rank: {kind: choice, values: [8, 16, 32, 64, 128]}\n"
        "  learning_rate: {kind: float, low: 1e-5, high: 1e-3, log: true}\n"
    )
    alone = budgetsearch.plan(gpu="rtx4090", hours=8, model=SMALL, space=str(space))
    assert row.trials == pytest.approx(alone.rehearsal.trials[0], rel=0.2)
    assert row.full_tokens == pytest.approx(alone.rehearsal.full_tokens, rel=0.2)


def test_the_rule_of_the_choice() -> None:
    """Time enough before size, size before speed, speed before width; without time enough what sees most."""
    base = BaseRow("a", 8, "bf16", True, 1.0, tokens_per_second=10, full_tokens=9, passes=3.0, trials=20)
    larger, faster = replace(base, weights=14), replace(base, tokens_per_second=11.0)
    assert larger == choose([base, larger, faster], 5)
    assert faster == choose([base, faster, replace(larger, passes=0.9), replace(larger, trials=4)], 5)
    assert base == choose([replace(base, quantization="nf4"), base], 5)
    few = [replace(base, passes=0.5), replace(larger, passes=0.4)]
    assert few[0] == choose(few, 5)


def test_the_command_prints_the_table_and_json() -> None:
    """Models by their flags, in any number; the choice first."""
    line = ["plan", "--gpu", "rtx4090", "--hours", "24", "--model", LARGE, "--model", SMALL]
    printed = CliRunner().invoke(app, line, env={"COLUMNS": "200"})
    assert printed.exit_code == 0, printed.output
    assert f"Take {LARGE} in nf4: about" in printed.output
    assert "29.8 at least" in printed.output
    found = json.loads(CliRunner().invoke(app, [*line, "--json"]).output)
    assert ("nf4", 4) == (found["choice"]["quantization"], len(found["bases"]))


def test_a_folder_with_nothing_but_its_config_is_compared(tiny_model: Path, tmp_path: Path) -> None:
    """Beside one whose shape comes with the package, and from a file of settings."""
    folder = tmp_path / "only"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_model / "config.json").read_text())
    (tmp_path / "budgetsearch.yaml").write_text(f"model:\n- {folder}\n- {SMALL}\ngpu: rtx4090\nhours: 24\n")
    found = budgetsearch.plan()
    assert SMALL == found.choice.model
    assert str(folder) in {row.model for row in found.bases}


def test_a_model_that_cannot_be_had_is_left_out_with_its_reason(tiny_model: Path, tmp_path: Path) -> None:
    """One that is nowhere, one that is packed, a quantization of another: none is a matter of memory."""
    config = json.loads((tiny_model / "config.json").read_text())
    for name in ("gptq", "fp8"):
        (tmp_path / name).mkdir()
        told = {**config, "quantization_config": {"quant_method": name}}
        (tmp_path / name / "config.json").write_text(json.dumps(told))
    found = bases(model=["some/model", SMALL, "gptq", "fp8"])
    assert SMALL == found.choice.model
    gone = {named(row): row for row in found.bases if not row.fits}
    assert {"some/model", "gptq", "fp8 in nf4"} == set(gone)
    for name, row in gone.items():
        assert row.why
        assert any(reason.startswith(name) and reason.endswith(row.why) for reason in found.ground)
        assert row.why in str(_base(row)[2])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": [SMALL, SMALL]}, "twice"),
        ({"model": [SMALL, " "]}, "empty base model"),
        ({"revision": "main"}, "does not say which"),
        ({"probe": True}, "this takes one"),
        ({"model": ["other/model", "some/model"]}, "some/model"),
        ({"hours": 0.001}, "--hours"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_compared_is_refused(settings: dict[str, Any], said: str) -> None:
    """With one clear error."""
    with pytest.raises(UsageError, match=said) as refused:
        bases(**settings)
    assert isinstance(refused.value, BudgetError) == ("hours" in settings)


def test_nothing_that_fits_is_refused_with_the_reason_of_each() -> None:
    """Three 13B and 14B on a T4, in bf16."""
    Path("bf16.yaml").write_text(
        "dimensions:\n  quantization: {kind: constant, value: bf16}\n"
        "  rank: {kind: choice, values: [8]}\n  learning_rate: {kind: constant, value: 1e-4}\n"
    )
    with pytest.raises(
        DeviceError, match=rf"{LARGE} in bf16: .*Llama-2-13b-hf in bf16: .*a --space with nf4"
    ):
        bases(gpu="t4", model=[LARGE, "meta-llama/Llama-2-13b-hf"], space="bf16.yaml")


@pytest.mark.parametrize("command", ["doctor", "inspect"])
def test_what_takes_one_model_refuses_two(command: str, tmp_path: Path) -> None:
    """Before it touches anything; the last flag does not win in silence."""
    found = CliRunner().invoke(app, [command, "--gpu", "cpu", "--model", LARGE, "--model", SMALL])
    assert found.exit_code == 2
    assert "this takes one" in found.output
    assert [] == list(tmp_path.iterdir())


def test_it_takes_a_second_and_no_torch() -> None:
    """The answer comes before torch would have been loaded; the processor's time, for others use it too."""
    code = (
        "import sys, time, budgetsearch;"
        f"models = [{LARGE!r}, {SMALL!r}, 'mistralai/Mistral-7B-v0.1'];"
        "budgetsearch.plan(gpu='rtx4090', hours=24, model=models);"
        "print([m for m in ('torch', 'transformers', 'optuna', 'scipy') if m in sys.modules],"
        "time.process_time() < 2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[] True" == done.stdout.strip()
