"""The arithmetic of the benchmarks that run for hours: robustness, and against what a careful user does."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.against import judge, rows
from benchmarks.against.judge import encoded, loss_of, tokenizer_of
from benchmarks.against.run import commands, cores_of
from benchmarks.against.run import summary as summary_of_pairs
from benchmarks.robustness import regimes
from benchmarks.robustness.figures import exported_seconds, figures_of, summary
from benchmarks.robustness.regimes import begins_late, beside, bursts, leaves_early
from budgetsearch.core.history.history import History
from tests.support.factories import Story
from tests.support.simulation import make_driver


@pytest.fixture(scope="module")
def played() -> History:
    """A whole run on virtual time."""
    return make_driver(None, budget=720.0).run()


def test_the_share_in_the_adapter_is_of_the_links_that_lead_to_it(played: History) -> None:
    """Every second of the winner counts; what was trained behind the exported checkpoint is not in it."""
    inside, whole = exported_seconds(played)
    found = figures_of(played)
    assert 0 < inside <= whole
    assert found["in the adapter"] == pytest.approx(inside / whole, abs=1e-4)
    assert found["scores stand"] and found["deadline kept"]
    assert found["tokens of the winner"] > 0
    done = played.exported
    assert done is not None
    last = [r for _, r in played.results if r.checkpoint_out == done.checkpoint][-1]
    story = Story.planned()
    story.train(story.trial(), 1.0)
    assert figures_of(story.history)["in the adapter"] is None  # nothing was exported
    first = next(s.checkpoint_in for s, r in played.results if r is last)
    assert first != done.checkpoint
    refused = {**run("quiet"), **figures_of(History())}
    assert False in summary([refused])["targets"].values()


def run(regime: str, share: float = 1.0, loss: float = 1.0, stand: bool = True) -> dict[str, Any]:
    """What a file says."""
    return {
        "regime": regime,
        "in the adapter": share,
        "final loss": loss,
        "scores stand": stand,
        "deadline kept": True,
        "tokens of the winner": 10,
    }


def test_the_targets_are_of_every_run() -> None:
    """One that falls short is enough; without the runs to compare, the third is not known."""
    good = [run("quiet"), run("busy", 0.98, 1.04), run("half", 0.99, 1.0)]
    assert [True, True, True] == list(summary(good)["targets"].values())
    assert [False, False, False] == list(
        summary([*good[:1], run("busy", 0.5, 1.06, False), good[2]])["targets"].values()
    )
    assert [True, True, None] == list(summary(good[:1])["targets"].values())
    assert 0.5 == summary([run("busy", 0.5), run("busy")])["busy"]["least in the adapter"]


def test_regimes_follow_the_run(played: History) -> None:
    """Bursts by the clock, the late one by the full run's tokens, the early one by the plan."""
    assert [False, True, False] == [bursts(played, at) for at in (10.0, 40.0, 70.0)]
    assert begins_late(played, 0.0)
    assert not begins_late(History(), 0.0)
    assert leaves_early(History(), 0.0)
    assert not leaves_early(played, 0.0)


def test_what_is_busy_beside_a_run_is_gone_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process at a time, started by the rule, ended by it or by the end."""
    started: list[Any] = []
    monkeypatch.setattr(regimes, "LOOK_SECONDS", 0.01)
    real = regimes.subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> Any:
        started.append(real(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(regimes.subprocess, "Popen", popen)
    with beside(tmp_path / "ledger.sqlite", regimes.busy):
        deadline = time.monotonic() + 20
        while not started and time.monotonic() < deadline:
            time.sleep(0.01)
    assert 1 == len(started)
    assert started[0].returncode is not None


def test_nobody_is_judged_by_rows_that_were_trained_on() -> None:
    """Prompts that stand there twice are one; the split depends on the seed alone."""
    some = [{"prompt": f"q{n % 40}", "completion": str(n)} for n in range(80)]
    train, test = rows.split(some, 1, 10)
    assert (30, 10) == (len(train), len(test))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert (train, test) == rows.split(some, 1, 10)
    assert test != rows.split(some, 2, 10)[1]
    with pytest.raises(ValueError, match="too few"):
        rows.split(some, 1, 30)


class Uniform(torch.nn.Module):
    """Every token is as likely as every other."""

    def forward(self, input_ids: torch.Tensor) -> Any:
        """Logits of zero."""
        return type("Output", (), {"logits": torch.zeros((*input_ids.shape, 50))})


def test_the_judge_counts_the_answers_tokens_and_their_end(tiny_model: Path) -> None:
    """Nothing of the question, nothing behind the end of the answer."""
    tokenizer = tokenizer_of(str(tiny_model))
    ids, asked = encoded(tokenizer, {"prompt": "How?", "completion": "So."})
    assert "user:\nHow?\nassistant:\n" == tokenizer.decode(ids[:asked])
    assert f"So.{tokenizer.eos_token}" == tokenizer.decode(ids[asked:])
    assert pytest.approx(math.log(50)) == loss_of(Uniform(), [(ids[:1], 1), (list(range(9)), 4)])


def test_sides_change_their_cores_and_get_the_same(tmp_path: Path) -> None:
    """The same model, rows, hours and seed; one template."""
    assert {"budgetsearch": 3, "careful": 5} == cores_of(0, [3, 5])
    assert {"budgetsearch": 5, "careful": 3} == cores_of(1, [3, 5])
    found = commands("m", tmp_path, tmp_path / "train.jsonl", 0.2, 7)
    for command in found.values():
        text = " ".join(command)
        assert "--model m --hours 0.2 --seed 7" in text
        assert str(tmp_path / "train.jsonl") in text
    assert rows.TEMPLATE == (tmp_path / "template.jinja").read_text(encoding="utf-8") == judge.TEMPLATE


def test_wins_are_counted_with_their_chance_among_equals() -> None:
    """A side without an adapter has lost; what both lack is nobody's win."""

    def pair(ours: float | None, theirs: float | None) -> dict[str, Any]:
        return {"rows": "r", "hours": 0.2, "losses": {"budgetsearch": ours, "careful": theirs}}

    (found,) = summary_of_pairs([pair(1.0, 1.5)] * 9 + [pair(2.0, 1.5)])
    assert (10, 9, True) == tuple(
        found[key] for key in ("pairs", "lower test loss of budgetsearch", "target of nine tenths")
    )
    assert pytest.approx(11 / 1024) == found["chance among equals"]
    assert pytest.approx(-0.4) == found["mean difference"]
    (found,) = summary_of_pairs([pair(1.0, None), pair(None, 1.0), pair(None, None)])
    assert 1 == found["lower test loss of budgetsearch"]
    assert found["mean difference"] is None
