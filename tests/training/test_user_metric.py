"""Answers graded by a metric of the user's, and by those that are built in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from budgetsearch.api.given import given
from budgetsearch.core.errors import SettingsError
from budgetsearch.core.metric import Metric
from budgetsearch.training.data.conversation import Conversation, Sample, Turn
from budgetsearch.training.data.grading import by_pattern, exact_match, f1, rouge_l
from budgetsearch.training.members import Shop
from budgetsearch.training.metric import MAX_HANGS, Grader, check_metric
from budgetsearch.training.recipe import train_gang
from tests.support.training import base, make_segment

MINE = """
import json, queue, time

def trouble(prompt, reference, answer):
    print("what is printed does no harm")
    if answer == "raise":
        raise ValueError("no such word")
    if answer == "hang":
        time.sleep(60)
    if answer == "leave":
        raise SystemExit(3)
    return {"nan": float("nan"), "text": "many"}.get(answer, len(prompt) + 10 * (reference == answer))

length = 7
"""


def sample(question: str, answer: str) -> Sample:
    """A question with its answer."""
    return Sample(Conversation((Turn("user", question), Turn("assistant", answer))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a module of the user's, beside one that bears the name of Python's own."""
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "queue.py").write_text("raise RuntimeError('not this one')", encoding="utf-8")
    return tmp_path


def test_what_goes_wrong_in_a_metric_costs_its_example(folder: Path) -> None:
    """Whatever the function does, the others have their numbers, and what went wrong is counted."""
    grader = Grader("mine:trouble", str(folder), example_seconds=1.0)
    answers = ["yes", "raise", "nan", "text", "leave", "yes", "hang", "no"]
    found = grader.grade([(sample("two", "yes"), answer) for answer in answers])
    assert [13.0, None, None, None, None, 13.0, None, 3.0] == found
    assert 5 == grader.failed.total()
    assert any("no such word" in why for why in grader.failed)
    assert "gave no number for 5 answers" in grader.told() and not grader.told()
    hanging = [(sample("two", "yes"), "x")] * 3
    assert [None] * 3 == grader.grade(hanging, give_up=lambda: True)
    grader.close()
    assert MAX_HANGS >= 2


def test_a_metric_that_cannot_be_had_is_refused_before_anything_is_spent(folder: Path) -> None:
    """The module, the name in it, what it is, and in Python where it stands."""
    check_metric(Metric("mine:trouble"), str(folder))
    for name, words in {
        "nobody:f": "No module named 'nobody'",
        "mine:nothing": "mine has no nothing",
        "mine:length": "a int, and no function",
    }.items():
        with pytest.raises(SettingsError, match=words):
            check_metric(Metric(name), str(folder))
    assert "tests.support.rows:write_rows" == given({"metric": _importable()})["metric"]
    with pytest.raises(SettingsError, match="cannot be imported by the worker"):
        given({"metric": lambda prompt, reference, answer: 1.0})


def _importable() -> object:
    from tests.support.rows import write_rows

    return write_rows


def test_the_metrics_that_are_built_in() -> None:
    """SQuAD's two, ROUGE-L by hand, and a pattern."""
    assert [1.0, 0.0] == [exact_match("The answer, is 4.", text) for text in ("answer is 4", "answer is 5")]
    assert 0.8 == pytest.approx(f1("red green blue", "green red"))
    assert 0.75 == pytest.approx(rouge_l("police killed the gunman", "police kill the gunman"))
    number = by_pattern(r"#### (-?\d+)")
    texts = ("#### 3 and #### 42", "42", "#### 41")
    assert [1.0, 0.0, 0.0] == [number("so #### 42", text) for text in texts]
    assert 1.0 == by_pattern(r"\w+$")("yes", "it is yes")


def test_a_segment_brings_the_values_of_its_checkpoint(shop: Shop, tiny_model: Path) -> None:
    """After training; again without training they are the same, and the base is bare."""
    model = base(tiny_model)
    graded = dataclasses.replace(shop, grader=Grader("rouge_l", "."))
    (first,) = train_gang(model, [make_segment(answers=4, micro_batch=2)], graded, 8)
    assert (4, "ok") == (len(first.metric), first.status)
    assert None not in first.metric
    assert first.seconds["score"] > 0
    alone = make_segment(first.tokens, first.tokens, answers=4, evaluate=False, micro_batch=2)
    alone = dataclasses.replace(alone, checkpoint_in=first.checkpoint_out)
    assert alone.only_grades
    (again,) = train_gang(model, [alone], graded, 8)
    assert (first.metric, first.checkpoint_out, None) == (again.metric, again.checkpoint_out, again.loss)
    assert not hasattr(model, "peft_config")
    stopped = dataclasses.replace(graded, stopping=lambda: True)
    (cut,) = train_gang(model, [alone], stopped, 8)
    assert ("cancelled", ()) == (cut.status, cut.metric)
