"""What a run lost or never measured is said before its results, wherever they are shown."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import budgetsearch as bs
from budgetsearch.cli import app
from budgetsearch.core.decisions import Finish
from budgetsearch.core.events import Charged, CheckpointLost, Closed, Decided, Scored, SegmentEnded
from budgetsearch.core.history.history import History
from budgetsearch.core.records import Score, SegmentResult
from budgetsearch.storage.ledger import read_history
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.report.html import html_text
from budgetsearch.views.report.markdown import text_of
from budgetsearch.views.report.numbers import as_json, numbers_of
from budgetsearch.views.shortfalls import shortfall_lines, shortfalls
from budgetsearch.views.tables import final_lines
from tests.support.command_line import invoke
from tests.support.comparable import put_adapter, score, write_run
from tests.support.factories import Story, best_scored, params, paused
from tests.support.simulation import make_driver
from tests.support.worlds import SyntheticWorld

REASON = "no further segment fits into the time that is left"
SCORE = Score("ok", "fp32", 2.0, 0.9, base_accuracy=0.25, adapter_accuracy=0.75, task_examples=4)


def close(story: Story, score: Score | None = SCORE, spent: float = 715.0) -> History:
    """The story comes to its own end, with so many of its 720 s spent."""
    story.add(Decided(story.history.spent, 1, Finish(REASON)))
    if score is not None:
        story.add(best_scored(story.history, score))
    story.history.spent = spent
    story.add(Closed("finished", REASON))
    return story.history


def whole() -> Story:
    """Three trials, one of them trained in full."""
    story = paused()
    story.train(1, 0.9, 2, "full run starts")
    return story


def cut(status: str, tokens: int = 6000, **more: Any) -> Story:
    """The same, but the full run towards 9000 tokens gets so far and ends so."""
    story = paused()
    segment = story.start(1, 2, "full run starts")
    name = f"trial0001-rung2-tokens{tokens}-attempt0" if tokens > segment.start_tokens else None
    values = {"seconds": {"train": 30.0}, "checkpoint_out": name, **more}
    result = SegmentResult(1, 2, status, tokens, **values)  # type: ignore[arg-type]
    story.add(SegmentEnded(next(iter(story.history.running)), result), Charged("train", 1.0, 1))
    return story


def said(history: History) -> list[tuple[str, str]]:
    """Kind and text of each."""
    return [(one.kind, str(one)) for one in shortfalls(history)]


def test_of_a_run_that_lacks_nothing_nothing_is_said() -> None:
    """Neither in the terminal nor in a report is there an empty heading."""
    story = whole()
    history = close(story)
    assert [] == said(history)
    numbers = numbers_of(story.entries, history)
    assert "What is missing" not in text_of(numbers) + html_text(numbers)


def test_a_run_that_goes_lacks_nothing_yet() -> None:
    """What has not come may still come; once nobody works on it, it is missing."""
    history = paused().history
    assert () == shortfalls(history, going=True)
    assert ["full run", "base", "accuracy"] == [kind for kind, _ in said(history)]


def test_without_an_adapter_that_is_all_there_is_to_say() -> None:
    """Scores and full runs of nothing are not missed."""
    story = Story.planned()
    story.end(story.start(story.trial()), status="diverged")
    story.add(Closed("failed", "no trial finished a segment"))
    assert [("adapter", "There is no adapter: no trial finished a segment")] == said(story.history)


def test_a_run_without_a_full_run_says_so() -> None:
    """With the reason for which the search ended."""
    assert [("full run", f"No trial ran in full: {REASON}")] == said(close(paused()))


def test_a_full_run_that_was_cut_is_no_full_run() -> None:
    """How far it came and why no farther; what was trained after the last loss is in no adapter; the trial is
    not done, and nobody ran in full."""
    history = close(cut("timeout"))
    why = "it was stopped at its time limit"
    assert [
        ("full run", f"The full run of trial 1 was cut short at 6000 of 9000 tokens: {why}"),
        (
            "loss",
            "The last 3000 tokens of trial 1 (30 s of training) are in no adapter, for no loss was measured "
            f"after them: {why}",
        ),
    ] == said(history)
    assert "cut short" == history.standing(history.trials[1])
    assert "trials  3 tried, 1 promoted, 0 in full" == final_lines(history)[-1]


def test_a_recipe_has_words_of_its_own() -> None:
    """Its units are no tokens, and what comes out is no adapter."""
    history = close(cut("timeout"))
    assert history.opened is not None
    recipe = {"unit": "trees", "metric": "log loss"}
    history.opened = replace(history.opened, facts={**history.opened.facts, "recipe": recipe})
    texts = " ".join(text for _, text in said(history))
    assert "cut short at 6000 of 9000 trees" in texts
    assert "The last 3000 trees of trial 1 (30 s of training) are in no result" in texts
    assert "token" not in texts and "adapter" not in texts


def test_a_full_run_that_crashed_names_the_crash() -> None:
    """What the crash took is not in the trial any more, so only the full run is missing."""
    crashed = ("full run", "The full run of trial 1 was cut short at 3000 of 9000 tokens: its worker crashed")
    kinds = said(close(cut("crashed", tokens=3000, detail="signal 9")))
    assert [(crashed[0], f"{crashed[1]} (signal 9)")] == kinds


def test_a_cut_full_run_whose_loss_is_known_lacks_only_its_end() -> None:
    """Its adapter is that of its last token."""
    history = close(cut("cancelled", loss=0.95))
    assert ["full run"] == [kind for kind, _ in said(history)]


def test_a_better_loss_before_the_end_is_no_shortfall() -> None:
    """What was trained was measured, and is worse: the earlier checkpoint is exported on purpose."""
    story = paused()
    story.train(1, 1.1, 2, "full run starts")
    assert (3000, 9000) == (story.history.trials[1].best_tokens, story.history.trials[1].tokens)
    history = close(story)
    assert [] == said(history)
    told = "its full run was no better (1.1000 at 9000 tokens): the adapter is that of 3000 tokens (1.0000)"
    assert told in "\n".join(final_lines(history))
    assert "no better" not in "\n".join(final_lines(close(whole())))


def test_answers_for_which_the_plan_had_no_time_are_missed() -> None:
    """One configuration alone: its losses are compared, and that the accuracy is not known is said."""
    story = Story.planned(single=True, task_examples=0)
    assert story.history.opened is not None
    story.history.opened.settings["task_examples"] = 32  # type: ignore[index]
    story.train(story.trial(), 1.5, 2)
    kinds = dict(said(close(story, Score("ok", "fp32", 2.0, 0.9))))
    assert "the budget had no time for answers" in kinds["accuracy"]


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (
            None,
            [
                ("base", "The losses of base and adapter were never compared: the time was over"),
                (
                    "accuracy",
                    "The task accuracy is not known: of 4 answers none was graded: the time was over",
                ),
            ],
        ),
        (
            Score("crashed", "fp32", detail="signal 9"),
            [
                ("base", "The losses of base and adapter were never compared: signal 9"),
                ("accuracy", "The task accuracy is not known: of 4 answers none was graded: signal 9"),
            ],
        ),
        (
            Score("ok", "fp32", 2.0, 0.9),
            [("accuracy", "The task accuracy is not known: of 4 answers none was graded: the time was over")],
        ),
        (
            Score("ok", "fp32", 2.0, 0.9, base_accuracy=0.5, adapter_accuracy=1.0, task_examples=2),
            [("answers", "The task accuracy rests on 2 of 4 answers: the time was over")],
        ),
    ],
)
def test_scores_that_were_not_measured_are_missed(
    score: Score | None, expected: list[tuple[str, str]]
) -> None:
    """Base against adapter, the accuracy, and as many answers as were asked for."""
    assert expected == said(close(whole(), score))


def test_nobody_asks_for_more_answers_than_there_are_validation_rows() -> None:
    """The factory's data have 10."""
    story = Story.planned(task_examples=32)
    for rank in (4, 8):
        story.train(story.trial(params(rank)), 1.5, 2)
    score = Score("ok", "fp32", 2.0, 0.9, base_accuracy=0.5, adapter_accuracy=1.0, task_examples=10)
    assert [] == said(close(story, score))


def test_the_scores_of_another_checkpoint_are_none() -> None:
    """They were measured before a better adapter was found."""
    story = paused()
    story.add(best_scored(story.history, SCORE))
    story.train(1, 0.9, 2, "full run starts")
    assert isinstance(story.history.scored, Scored)
    assert ["base", "accuracy"] == [kind for kind, _ in said(close(story, None))]


def test_one_configuration_is_no_comparison() -> None:
    """Whatever else was tried and failed."""
    story = Story.planned()
    story.train(story.trial(), 1.5, 2)
    story.end(story.start(story.trial(params(16))), status="diverged")
    what = "Only one configuration of 2 tried has a loss, so nothing was compared"
    assert [("comparison", f"{what}: no other got so far")] == said(close(story))


def test_one_configuration_alone_and_a_reason_given_twice_are_short() -> None:
    """The terminal's second line says that it is the same, and what is its own."""
    story = Story.planned()
    story.train(story.trial(), 1.5, 2)
    history = close(story, spent=400.0)
    assert history.closed is not None
    lines = shortfall_lines(shortfalls(history))
    why = history.closed.reason
    assert f"MISSING  Only one configuration was tried, so nothing was compared: {why}" in lines
    assert [line for line in lines if line.startswith("MISSING  400 of 720 s") or ": the same" in line][-1:]
    assert 1 == "\n".join(lines).count(why)


def test_lost_checkpoints_and_seconds_are_told() -> None:
    """How many, the last one's name and what was wrong with it; seconds only where they are many."""
    story = whole()
    name = str(story.history.trials[2].best_checkpoint)
    story.add(CheckpointLost(name, "adapter_model.safetensors is missing"), Charged("crash", 40.0))
    assert [
        ("checkpoints", f"A checkpoint was lost, the last {name}: adapter_model.safetensors is missing"),
        ("crashes", "40 of 720 s came to nothing: the process of the run was killed"),
    ] == said(close(story))


def test_time_that_nobody_used_is_told_with_the_reason() -> None:
    """What the exit keeps is used, and less than a twentieth of the budget is not worth a line."""
    assert [] == said(close(whole(), spent=680.0))
    history = close(whole(), spent=600.0)
    history.finished_at = 550.0  # 110 s before the reserve
    assert [("time", f"120 of 720 s were not used: {REASON}")] == said(history)
    history.finished_at = 650.0
    kept = "; 104 s of it had been kept for the scores"
    assert [("time", f"120 of 720 s were not used: {REASON}{kept}")] == said(history)


def test_everything_that_shows_a_run_begins_with_what_is_missing() -> None:
    """The three reports; lines of a terminal are marked."""
    story = cut("timeout")
    history = close(story)
    numbers = numbers_of(story.entries, history)
    what = str(shortfalls(history)[0].what)
    assert shortfall_lines(shortfalls(history))[0].startswith(f"MISSING  {what}: ")
    assert what == json.loads(as_json(numbers))["shortfalls"][0]["what"]
    for text, answer in ((text_of(numbers), "## The answer"), (html_text(numbers), "<h2>The answer")):
        assert 0 < text.index("What is missing") < text.index(what) < text.index(answer)


def test_status_and_the_python_api_say_it_first(tmp_path: Path) -> None:
    """Reports that are not there are missing as well; they are as soon as somebody has written them."""
    path = write_run(tmp_path / "run", None)
    run = bs.open(path)
    kinds = [one.kind for one in run.shortfalls]
    assert {"base", "report"} <= set(kinds)
    lines = shortfall_lines(run.shortfalls)
    assert lines == str(run).splitlines()[1 : 1 + len(lines)]
    assert lines == CliRunner().invoke(app, ["status", str(path)]).output.splitlines()[: len(lines)]
    assert kinds == [one["kind"] for one in run.status["shortfalls"]]
    run.report()
    assert "report" not in [one.kind for one in bs.open(path).shortfalls]


def test_an_adapter_or_a_study_that_is_not_there_is_told_by_whatever_shows_the_run(tmp_path: Path) -> None:
    """First of all the adapter, which the ledger alone would promise: `status`, which names its path as long
    as it is there, `report` with its pages, the Python API."""
    path = write_run(tmp_path / "run", score())
    adapter = put_adapter(path, str(read_history(path / "ledger.sqlite").incumbent.best_checkpoint))  # type: ignore[union-attr]
    RunFolder(path).note_study(level=False, events=1)
    study = f"MISSING  The Optuna study is not complete, the ledger is: `budgetsearch resume {path}` brings"
    for gone in (False, True):
        if gone:
            shutil.rmtree(adapter)
            RunFolder(path).note_study(level=True, events=1)
        first = f"MISSING  The adapter of trial 0 is not in {adapter}: "
        for command in ("status", "report"):
            code, text = invoke(command, str(path))
            assert (0, gone, not gone) == (code, text.startswith(first), study in text)
        assert gone == (
            "The adapter of trial 0 is not in" in (path / "report.md").read_text(encoding="utf-8")
        )
        text = invoke("status", str(path))[1]
        assert gone != (f"adapter  {adapter}" in text)
        assert (None if gone else str(adapter)) == bs.open(path).status["best"]["adapter_path"]
        assert gone == ("adapter" == bs.open(path).shortfalls[0].kind)


def test_what_a_simulated_run_lacks_is_said() -> None:
    """Every link of a full run crashes, and no answer can be generated."""
    world = SyntheticWorld(fate=lambda s: "crashed" if s.schedule.cooldown_tokens else "ok", mute=True)
    found = {one.kind: one for one in shortfalls(make_driver(None, world).run())}
    assert {"full run", "accuracy", "time"} == set(found)
    assert ("its worker crashed", "mute") == (found["full run"].why, found["accuracy"].why)
    assert ["time"] == [one.kind for one in shortfalls(make_driver(None).run())]
