"""Tables, report and progress: what people read, from the ledger alone."""

from __future__ import annotations

import io
import json
import math
import random
import subprocess
import sys

import pytest
from rich.console import Console

from budgetsearch.core.events import Charged, Closed, Heartbeat
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.history import History
from budgetsearch.core.reports import Beat
from budgetsearch.storage.files import local_time
from budgetsearch.views.drawing import above
from budgetsearch.views.loading import load_snippet
from budgetsearch.views.progress import LiveProgress, PlainProgress
from budgetsearch.views.report.markdown import text_of
from budgetsearch.views.report.numbers import numbers_of
from budgetsearch.views.tables import (
    clock,
    final_lines,
    phase_rows,
    rank_correlations,
    spearman,
    status_dict,
    summary,
    trial_rows,
    trial_table,
)
from budgetsearch.views.under_way import under_way, under_way_lines
from budgetsearch.views.words import phase_of
from tests.support.factories import MODEL, Story, params, tell_run, whole_run


def test_trials_are_listed_by_how_far_they_got() -> None:
    """The full run comes first, then the promoted, then by loss; failures come last."""
    rows = trial_rows(whole_run().history)
    expected = [
        (3, 2, 0.9, "done"),
        (2, 1, 1.1, "dropped"),
        (1, 0, 1.75, "dropped"),
        (0, 0, 1.875, "dropped"),
        (4, -1, None, "diverged"),
        (5, -1, None, "infeasible"),
    ]
    assert expected == [(row.trial_id, row.rung, row.loss, row.status) for row in rows]


def test_a_trial_has_one_status_at_a_time() -> None:
    """Waiting, running, paused, promoted, full run, then done."""
    story = Story.planned()
    seen = []

    def note() -> None:
        seen.append(trial_rows(story.history)[0].status)

    story.trial()
    note()
    for rung in range(3):
        segment = story.start(0, rung)
        note()
        story.end(segment, 1.0 - rung / 10)
        note()
    assert seen == ["waiting", "running", "paused", "promoted", "paused", "full run", "done"]


def test_the_phases_add_up_to_what_was_spent() -> None:
    """Every second has a phase; what is not charged yet is under way."""
    story = whole_run()
    assert math.isclose(sum(row.seconds for row in phase_rows(story.history)), story.history.spent)
    assert {row.phase for row in phase_rows(story.history)} == {"setup", "calibrate", "train", "score"}
    story.history.spent += 2.5
    assert [(r.phase, r.seconds) for r in phase_rows(story.history)][-1] == ("under way", 2.5)
    assert math.isclose(sum(row.share for row in phase_rows(story.history)), 1.0)


def test_status_is_plain_json_with_the_promised_keys() -> None:
    """``status --json`` has phase, budget, spent, trials and best, and no NaN."""
    status = status_dict(whole_run().history)
    assert json.loads(json.dumps(status, allow_nan=False)) == status
    assert (status["phase"], status["budget_seconds"], status["spent_seconds"]) == ("finished", 720.0, 13.0)
    assert (status["reserve_seconds"], status["ladder"]) == (60.0, [10.0, 30.0, 90.0])
    assert status["deadline_kept"] is True
    assert [t["trial_id"] for t in status["trials"]] == list(range(6))
    best = status["best"]
    assert (best["trial_id"], best["loss"], best["adapter_path"]) == (3, 0.9, "runs/a/adapter")
    assert best["params"] == status["trials"][3]["params"]


def test_status_of_a_run_that_has_not_begun() -> None:
    """Before the first event there is a phase and nothing else."""
    status = status_dict(History())
    assert (status["phase"], status["trials"], status["best"]) == ("setup", [], None)


def test_the_phase_follows_the_ledger() -> None:
    """Setup, calibrate, search, full run, score, finished, in this order."""
    entries = whole_run().entries
    phases = [phase_of(fold(entries[:cut])) for cut in range(len(entries) + 1)]
    order = list(dict.fromkeys(phases))
    assert order == ["setup", "calibrate", "search", "full run", "score", "finished"]


def test_a_going_run_says_what_it_does_now() -> None:
    """Who trains towards what since when, how fast, the last sign of life, and the latest end."""
    story = Story.planned()
    segment = story.start(story.trial())
    job = next(iter(story.history.running))
    story.add(Charged("train", 1.0), Heartbeat(Beat(job, 0, "train", tokens=segment.start_tokens + 250)))
    wall, spent = story.history.wall, story.history.spent
    found = under_way(story.history, wall + 9.0)
    assert json.loads(json.dumps(found)) == found
    now, ends = under_way_lines(found)
    expected = "trial 0 trains towards rung 0 (10 s) since 10 s, 250 tokens/s; last heartbeat 9 s ago"
    assert f"now     {expected}" == now
    assert f"ends    {local_time(wall + 720.0 - spent)} at the latest" == ends


def test_scoring_is_seen_from_its_heartbeats() -> None:
    """While answers are generated nothing is in the ledger but signs of life."""
    story = Story.planned()
    story.train(story.trial(), 1.0)
    story.add(Heartbeat(Beat(9, None, "answers")))
    assert phase_of(story.history) == "score"


class Compared(float):
    """A number that counts how often any such number is compared with another."""

    times = 0

    def __lt__(self, other: float) -> bool:
        Compared.times += 1
        return float(self) < float(other)

    def __gt__(self, other: float) -> bool:
        Compared.times += 1
        return float(self) > float(other)

    def __eq__(self, other: object) -> bool:
        Compared.times += 1
        return float(self) == other

    __hash__ = float.__hash__


@pytest.mark.parametrize("count", [200, 3200])
def test_the_figures_of_many_trials_compare_losses_as_often_as_sorting_them_does(count: int) -> None:
    """Ranks and what a figure leaves out: a few dozen comparisons for each loss, however many there are."""
    rng = random.Random(0)
    losses = [Compared(rng.random()) for _ in range(count)]
    Compared.times = 0
    above(losses)
    spearman(losses, losses)
    assert 0 < Compared.times < 100 * count


def test_spearman_of_known_samples() -> None:
    """1 for the same order, -1 for the reverse, ties share a rank, None where it says nothing."""
    assert spearman([1, 2, 3, 4], [10, 20, 30, 99]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_neighbouring_rungs_are_correlated_over_the_trials_on_both() -> None:
    """Three trials that kept their order from rung 0 to rung 1 give 1."""
    story = Story.planned()
    for number in range(4):
        story.train(story.trial(params(rate=1e-3 * (1 + number))), 2.0 + number)
    for number in range(3):
        story.train(number, 1.0 + number, 1)
    assert rank_correlations(story.history) == [(0, 3, pytest.approx(1.0)), (1, 0, None)]


def test_the_report_begins_with_the_answer() -> None:
    """Where nothing is missing, base against adapter stands before anything else, then how to load it."""
    story = whole_run()
    story.history.spent = 715.0
    lines = text_of(numbers_of(story.entries, story.history)).splitlines()
    assert lines[2] == "## The answer"
    assert "| validation loss | 2.0000 | 0.9000 |" in lines
    assert "| task accuracy (n = 4, exact match of the text) | 25.0% | 75.0% |" in lines
    assert "715.0 of 720 s were spent; the deadline was kept." in lines
    heads = [line for line in lines if line.startswith("## ")]
    assert heads == [
        "## The answer",
        "## How to load it",
        "## Trials",
        "## Promotions",
        "## Where the budget went",
        "## Rungs and reserve",
        "## Sample answers",
        "## What failed",
        "## Settings and versions",
    ]


def test_the_report_gives_reasons() -> None:
    """Each promotion carries its reason, each failure its cause."""
    story = whole_run()
    text = text_of(numbers_of(story.entries, story.history))
    assert "| 9.0 | 3 | 1 | promotion: place 1 of 6 at rung 0 |" in text
    assert "| 11.0 | 3 | 2 | full run starts |" in text
    assert "| trial 4, attempt 0 | rung 0 | diverged | loss is not finite |" in text
    assert "new trial" not in text


def test_a_report_can_be_written_at_any_time() -> None:
    """Every prefix of a ledger has a report, a status and a table."""
    entries = whole_run().entries
    for cut in range(len(entries)):
        history = fold(entries[:cut])
        assert text_of(numbers_of(entries[:cut], history)).startswith("# Report")
        assert status_dict(history)["phase"] == phase_of(history)
        Console(file=io.StringIO()).print(summary(history))


def test_a_bar_in_a_message_does_not_break_the_table() -> None:
    """Details come from foreign libraries; their bars and line breaks are tamed."""
    story = Story.planned()
    story.end(story.start(story.trial()), status="crashed", detail="a|b\nc")
    assert "| a\\|b c |" in text_of(numbers_of(story.entries, story.history))


@pytest.mark.parametrize("quantization", ["fp32", "bf16", "int8", "nf4"])
def test_the_loading_snippet_is_five_lines_of_python(quantization: str) -> None:
    """It compiles, and it names base, adapter and quantization."""
    lines = load_snippet(MODEL, quantization, "runs/a/adapter", "cpu")
    compile("\n".join(lines), "snippet", "exec")
    assert len(lines) == 5
    assert "'org/tiny'" in lines[2]
    assert ("load_in_4bit=True" in lines[2]) == (quantization == "nf4")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_table_of_trials_fits_the_terminal(width: int) -> None:
    """No line is wider than it, and trial, loss and status stand whole in each row."""
    screen = Console(file=io.StringIO(), width=width)
    screen.print(trial_table(whole_run().history))
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    best = next(line.split() for line in lines if line.split()[:1] == ["3"])
    assert "0.9000" in best
    assert "done" == best[-1]
    assert ("1.1000" in " ".join(lines)) and "infeasible" in " ".join(lines)
    assert (width == 120) == ("seconds" in " ".join(lines))


@pytest.mark.parametrize(
    ("state", "planned", "line"),
    [
        ("finished", True, ["finished: the end"]),
        ("interrupted", True, ["interrupted"]),
        ("failed", True, ["failed"]),
        ("failed", False, []),
    ],
)
def test_the_reason_of_an_end_is_told_once(state: str, planned: bool, line: list[str]) -> None:
    """Progress leaves it to the error or the result, which come next and tell it."""
    story, lines = Story.planned() if planned else Story(), list[str]()
    story.watchers.append(PlainProgress(lines.append))
    story.add(Closed(state, "the end"))  # type: ignore[arg-type]
    assert line == [text.partition("] ")[2] for text in lines]


def test_the_final_lines_tell_base_against_adapter() -> None:
    """Loss, accuracy with its n, the configuration, the budget, the counts."""
    lines = final_lines(whole_run().history)
    assert lines[0] == "validation loss  base 2.0000 -> adapter 0.9000  (under fp32)"
    assert lines[1] == "task accuracy    base 25.0% -> adapter 75.0%  (n = 4, exact match of the text)"
    assert lines[3] == "budget  13 of 720 s spent, deadline kept"
    assert lines[4] == "trials  6 tried, 2 promoted, 1 in full"


def test_plain_progress_writes_one_line_per_meaningful_event() -> None:
    """Each line begins with the elapsed seconds; decisions and charges are silent."""
    story, lines = Story(), []
    story.watchers.append(PlainProgress(lines.append, now=lambda: 5.0))
    story.open()
    tell_run(story)
    assert lines[0] == "[   0 s] budget 720 s"
    assert lines[1].startswith("[   1 s] fp32: 100 tokens/s at micro-batch 4")
    assert "[   3 s] trial 0 starts towards rung 0: new trial; quantization=fp32 rank=4" in lines[4]
    assert lines[5] == "[   3 s] trial 0 rung 0: loss 1.8750 at 1000 tokens, 1.0 s, best so far"
    assert "[   7 s] trial 4 rung 0: diverged: loss is not finite" in lines
    assert "[   9 s] trial 3 starts towards rung 1: promotion: place 1 of 6 at rung 0" in lines
    assert "[  11 s] trial 3 trains in full: full run starts" in lines
    assert lines[-1] == "[  13 s] finished: the budget is used"


def test_heartbeats_are_worth_a_line_every_fifteen_seconds() -> None:
    """Of one heartbeat a second for a minute, three or four are shown."""
    story, lines = Story.planned(), []
    story.start(story.trial())
    story.watchers.append(PlainProgress(lines.append))
    for tokens in range(60):
        story.add(Heartbeat(Beat(0, 0, "train", tokens, 1.25, 2**30)), Charged("train", 1.0))
    assert 3 <= len(lines) <= 4
    assert lines[1].endswith("trial 0 train, 15 tokens, training loss 1.2500, 1.00 GiB, 702 s left")


def test_plain_progress_says_what_happens_before_the_first_event() -> None:
    """Preparation has no ledger yet, so its lines carry the process's own seconds."""
    lines: list[str] = []
    times = iter([100.0, 107.0])
    PlainProgress(lines.append, now=lambda: next(times)).say("tokenizing")
    assert lines == ["[   7 s] tokenizing"]


def test_a_closed_pipe_does_not_end_the_run() -> None:
    """When the reader of the lines goes away, the lines stop and the run goes on."""
    calls: list[str] = []

    def broken(line: str) -> None:
        calls.append(line)
        raise BrokenPipeError

    story = Story()
    story.watchers.append(PlainProgress(broken))
    story.open()
    assert len(calls) == 1


def test_live_progress_shows_phase_time_table_best_and_memory() -> None:
    """The display holds what one wants to know at a glance."""
    story = Story.planned()
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    with LiveProgress(console, now=lambda: 0.0) as live:
        story.watchers.append(live)
        live.say("preparing")
        story.train(story.trial(), 1.5)
        story.add(Heartbeat(Beat(0, 0, "train", 100, 1.25, 2**30)))
        live._live.refresh()
    text = screen.getvalue()
    for part in (
        "search",
        "0:11:56 left of 0:12:00",
        "1.5000",
        "best so far: trial 0",
        "1.00 GiB",
        "preparing",
    ):
        assert part in text


def test_live_progress_survives_every_event() -> None:
    """No event of a whole run, closing included, upsets the display."""
    story = Story()
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with LiveProgress(console, now=lambda: 0.0) as live:
        story.watchers.append(live)
        story.open()
        tell_run(story)
        story.add(Closed("failed", "again"))
    assert "failed" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_clock_never_shows_less_than_nothing() -> None:
    """Hours, minutes, seconds; an overdrawn budget reads zero."""
    assert [clock(0), clock(3725.4), clock(-3)] == ["0:00:00", "1:02:05", "0:00:00"]


def test_reports_need_no_heavy_library() -> None:
    """``status`` and ``report`` start fast: neither torch nor optuna is imported."""
    code = (
        "import sys, budgetsearch.views.tables, budgetsearch.views.progress;"
        "import budgetsearch.views.report.markdown;"
        "assert not {'torch', 'optuna', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
