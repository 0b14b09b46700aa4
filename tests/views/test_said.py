"""What lines and tables say of trials and runs, wherever they ended."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from budgetsearch.core.events import Calibrated, Closed, SegmentEnded
from budgetsearch.core.records import Calibration, SegmentResult
from budgetsearch.run.jobs import ONE_IS_ENOUGH
from budgetsearch.views.progress import PlainProgress
from budgetsearch.views.report.markdown import text_of
from budgetsearch.views.report.numbers import numbers_of
from budgetsearch.views.tables import final_lines, status_dict, trial_rows, trial_table
from tests.support.factories import Story, params, paused, whole_run
from tests.support.simulation import make_driver


def cut_short() -> Story:
    """Two full runs: trial 1 came to the end, trial 2 was stopped on the way, with a loss; one waits."""
    story = paused()
    story.train(1, 0.9, 2, "full run starts")
    segment = story.start(2, 2, "full run starts")
    name = "trial0002-rung2-tokens6000-attempt0"
    result = SegmentResult(2, 2, "cancelled", 6000, 0.95, seconds={"train": 30.0}, checkpoint_out=name)
    assert segment.stop_tokens > 6000
    story.add(SegmentEnded(next(iter(story.history.running)), result))
    story.trial(params(32))
    story.add(Closed("finished", "the time is over"))
    return story


def test_a_full_run_that_was_cut_shows_the_loss_that_is_known() -> None:
    """In the rows, the table and the report; that the full runs differ in length is said beside them."""
    story = cut_short()
    rows = {row.trial_id: row for row in trial_rows(story.history)}
    assert (0.9, 0.95) == (rows[1].losses[-1], rows[2].losses[-1])
    assert ("done", "cut short") == (rows[1].status, rows[2].status)
    numbers = numbers_of(story.entries, story.history)
    assert "| 0.9500 | 6000 |" in text_of(numbers)
    assert final_lines(story.history)[-1].endswith("(full runs: trial 1 9000 tokens, trial 2 6000 tokens)")


def test_trials_are_counted_alike_in_the_table_and_below_it() -> None:
    """Those that were proposed and never tried are named; one is not called trials."""
    screen = Console(file=io.StringIO(), width=120)
    screen.print(trial_table(cut_short().history))
    assert "4 trials (1 not tried), finished" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert "trials  3 tried" in final_lines(cut_short().history)[-1]
    story = Story.planned()
    story.train(story.trial(), 1.0)
    assert "1 trial, search" == trial_table(story.history).title


@pytest.mark.parametrize(
    ("state", "spent", "kept"),
    [(None, 10.0, None), ("interrupted", 10.0, None), ("finished", 10.0, True), (None, 721.0, False)],
)
def test_a_deadline_is_kept_by_a_run_that_came_to_its_end(
    state: str | None, spent: float, kept: bool | None
) -> None:
    """Nothing is said of one that goes or was stopped; one that is over its time has passed it."""
    story = paused()
    if state is not None:
        story.add(Closed(state, "so it is"))  # type: ignore[arg-type]
    story.history.spent = spent
    assert kept is status_dict(story.history)["deadline_kept"]
    line = next(line for line in final_lines(story.history) if line.startswith("budget"))
    assert line.endswith({None: "spent", True: ", deadline kept", False: ", deadline PASSED"}[kept])


def test_very_few_validation_rows_are_warned_of() -> None:
    """Where the plan is told; from eight on there is nothing to say."""
    for rows in (1, 8):
        notices = [text for _, text in make_driver(None, valid_rows=rows).run().notices]
        assert (rows < 8) == any(text.startswith(f"Validation rows: {rows}.") for text in notices)


def test_the_shares_of_the_time_are_of_the_time_that_was_spent() -> None:
    """Training and overhead make one hundred percent."""
    story = whole_run()
    text = text_of(numbers_of(story.entries, story.history))
    assert "Of the 13 s spent 69.2% were training and 30.8% overhead, which is everything else." in text


def test_the_log_calls_a_full_run_that_and_says_why_a_quantization_is_not_used() -> None:
    """Also where the full run is the only rung."""
    lines: list[str] = []
    story = Story()
    story.watchers.append(PlainProgress(lines.append))
    story.open(ladder=(90.0,))
    story.train(story.trial(), 1.0)
    story.add(Calibrated(Calibration("nf4", "timeout", detail=ONE_IS_ENOUGH)))
    story.add(Calibrated(Calibration("int8", "out_of_memory", detail="8 GiB")))
    text = "\n".join(lines)
    assert "trial 0 full run: loss 1.0000" in text and "rung 0" not in text
    assert "nf4 is not used: there is too little time for a search, so it was not measured" in text
    assert "int8 is not used: memory ran out (8 GiB)" in text
