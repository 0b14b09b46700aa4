"""Comparing runs: who may be compared, how sure a difference is, the challenge's score, what is shown."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from budgetsearch import api
from budgetsearch.core.errors import UsageError
from budgetsearch.tools.compare import pairs
from budgetsearch.tools.compare.comparison import Comparison, as_json, compare_runs
from budgetsearch.tools.compare.gather import gather, names_of
from budgetsearch.tools.compare.page import page
from budgetsearch.tools.compare.pairing import (
    ACCURACY,
    LOSS,
    Costs,
    Results,
    Rows,
    Run,
    TaskResult,
    base_names,
    validation_measures,
)
from budgetsearch.tools.compare.pairs import pairs_of
from budgetsearch.tools.compare.plot import panels
from budgetsearch.tools.compare.table import interval_text, rows, show
from budgetsearch.tools.compare.winrates import challenge, warnings_of, win_rates
from budgetsearch.views import intervals
from budgetsearch.views.intervals import Estimate, bootstrapped, holm, newcombe, paired_shares, wilson
from tests.support.browser import browser_page
from tests.support.command_line import invoke
from tests.support.comparable import BASE, DATA, GOOD, TARGETS, score, write_run

EVIL = "<img src=x onerror=alert(1)>"
ROWS = Rows("source", "rows", "tokens")


def run_with(name: str, losses: Sequence[float] = GOOD, rows: Rows = ROWS, **changes: object) -> Run:
    """A finished run with these losses."""
    run = Run(
        name=name,
        path=name,
        state="finished",
        model="org/tiny",
        model_sha256="ab",
        quantization="fp32",
        rows=rows,
        adapter=Results(tuple(losses), TARGETS[: len(losses)], (1.0, 0.0)),
        base=Results(BASE[: len(losses)], TARGETS[: len(losses)], (0.0, 0.0)),
        costs=Costs(720.0, 700.0, 500.0, None, None),
    )
    return replace(run, **changes)  # type: ignore[arg-type]


def measured(runs: Sequence[Run]) -> tuple[dict[str, list[set[str]]], list[tuple[str, str]]]:
    """(entrants by measure, (measure, why) of what stays apart)."""
    measures, aparts = validation_measures(runs, base_names(runs, [run.name for run in runs]))
    found: dict[str, list[set[str]]] = {}
    for measure in measures:
        found.setdefault(measure.name, []).append(set(measure.values))
    return found, [(apart.measure, apart.why) for apart in aparts]


# ---------------------------------------------------------------------------- pairing


def test_runs_on_the_same_rows_are_compared_with_their_base() -> None:
    """Both runs and the base, once, in one measure each of loss and accuracy."""
    found, aparts = measured([run_with("a"), run_with("b")])
    together = {"a", "b", "base fp32"}
    assert ({LOSS: [together], ACCURACY: [together]}, []) == (found, aparts)


@pytest.mark.parametrize(
    ("other", "why", "accuracy_together"),
    [
        (Rows("other", "r", "t"), "other data", False),
        (Rows("source", "r", "t"), "another split", False),
        (Rows("source", "rows", "t"), "another tokenizer", True),
    ],
)
def test_what_cannot_be_compared_is_named(other: Rows, why: str, accuracy_together: bool) -> None:
    """Losses only on the same tokens, accuracies on the same rows; each refusal carries its reason."""
    found, aparts = measured([run_with("a"), run_with("b", rows=other)])
    apart = [{"a", "base fp32"}, {"b", "base fp32"}]
    assert apart == found[LOSS]
    assert ([{"a", "b", "base fp32"}] if accuracy_together else apart) == found[ACCURACY]
    assert ([LOSS] if accuracy_together else [LOSS, ACCURACY]) == [name for name, _ in aparts]
    assert all(why in text for _, text in aparts)


def test_other_training_data_with_the_same_validation_rows_are_compared() -> None:
    """Only what a loss is measured on must be the same."""
    found, aparts = measured([run_with("a"), run_with("b", rows=replace(ROWS, source="more"))])
    assert ([{"a", "b", "base fp32"}], []) == (found[LOSS], aparts)


def test_each_base_stands_once_for_each_quantization_and_model() -> None:
    """Two quantizations are two bases; several models are told apart by name."""
    runs = [run_with("a"), run_with("b", quantization="nf4"), run_with("c")]
    assert {("ab", "fp32"): "base fp32", ("ab", "nf4"): "base nf4"} == base_names(runs, ["a", "b", "c"])
    two = [run_with("a"), run_with("base fp32 of org/tiny", model_sha256="cd", model="org/other")]
    names = base_names(two, [run.name for run in two])
    assert ["base fp32 of org/tiny (2)", "base fp32 of org/other"] == list(names.values())


def test_the_first_examples_that_all_have_are_compared() -> None:
    """A shorter run scored fewer examples of the same order: the rest is left out for everyone, and said."""
    (measure, *_), _ = validation_measures([run_with("a", GOOD[:3]), run_with("b")], {("ab", "fp32"): "base"})
    expected = {"a": GOOD[:3], "b": GOOD[:3], "base": BASE[:3]}
    assert (expected, (1.0, 2.0, 3.0)) == (measure.values, measure.weights)
    assert measure.notes == ("the first 3 of up to 8 examples: all have these",)


def test_without_lengths_every_example_counts_alike_and_that_is_said() -> None:
    """Before the final scores there are losses but no weights; a run that has them lends them."""
    going = replace(run_with("going"), adapter=Results(GOOD), base=Results(BASE))
    (alone, *_), _ = validation_measures([going], {})
    assert (alone.weights, len(alone.notes)) == ((1.0,) * 8, 1)
    (both, *_), _ = validation_measures([going, run_with("done")], {})
    assert (both.weights, both.notes) == (tuple(map(float, TARGETS)), ())


# -------------------------------------------------------------------------- intervals


def test_holm_by_hand() -> None:
    """3 x .01, then 2 x .03, then .04, never less than the one before."""
    assert [0.03, 0.06, 0.06] == [pytest.approx(p) for p in holm([0.01, 0.04, 0.03])]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(values: list[float]) -> None:
    """Corrected values are at least the plain ones, at most 1, and ranked as they were."""
    adjusted = holm(values)
    assert all(p <= a <= 1 for p, a in zip(values, adjusted, strict=True))
    by_p = [a for _, a in sorted(zip(values, adjusted, strict=True))]
    assert by_p == sorted(by_p)


def test_the_mean_is_the_mean_over_tokens() -> None:
    """Losses by example count by their completion tokens, as the score of a run does."""
    found = bootstrapped([1.0, 4.0] * 4, [3, 1] * 4)
    assert found.value == 1.75
    assert found.low is not None and found.high is not None and found.low < 1.75 < found.high


def test_equal_values_have_no_interval() -> None:
    """An interval of no width would claim a certainty that nobody has."""
    assert [Estimate(1.0), Estimate(2.0)] == [bootstrapped([1.0] * 9, [1] * 9), bootstrapped([2.0], [1])]


def graded(name: str, right: int, of: int, base: int = 0) -> Run:
    """A run that gave the first ``right`` answers right."""
    grades, bare = [1.0] * right + [0.0] * (of - right), [1.0] * base + [0.0] * (of - base)
    results = Results(GOOD, TARGETS, tuple(grades)), Results(BASE, TARGETS, tuple(bare))
    return replace(run_with(name), adapter=results[0], base=results[1])


def test_accuracies_have_wilsons_interval_and_differences_newcombes_for_pairs() -> None:
    """Also where all answers are wrong, of which a bootstrap knows nothing; all ends are shares."""
    found = compare_runs([graded("a", 24, 32), graded("b", 20, 32)])
    (accuracy,) = [one for one in found.compared if one.measure.name == ACCURACY]
    for name, right in (("a", 24), ("b", 20), ("base fp32", 0)):
        proportion = stats.binomtest(right, 32).proportion_ci(0.95, method="wilson")
        mean = accuracy.means[name]
        assert (mean.low, mean.high) == (pytest.approx(proportion.low), pytest.approx(proportion.high))
    pair = next(p for p in accuracy.pairs if (p.first, p.second) == ("a", "b"))
    assert pair.low is not None and pair.high is not None
    independent = newcombe(wilson(20 / 32, 32), wilson(24 / 32, 32))
    assert independent.low is not None and independent.high is not None
    assert pair.high - pair.low < independent.high - independent.low, "the same answers stand behind both"


def test_newcombes_interval_of_a_published_table() -> None:
    """36 right in both, 12 and 2 in one alone, none wrong in both: 0.0569 to 0.3404 (his method 10)."""
    both = [(1.0, 1.0)] * 36 + [(0.0, 1.0)] * 12 + [(1.0, 0.0)] * 2
    found = paired_shares(*zip(*both, strict=True))
    assert (0.2, 0.0569, 0.3404) == (
        pytest.approx(found.value), pytest.approx(found.low, abs=5e-5), pytest.approx(found.high, abs=5e-5),
    )  # fmt: skip


def test_paired_intervals_of_accuracies_cover_the_truth() -> None:
    """Of 2000 pairs of 32 answers whose mistakes are mostly the same, 93% or more contain the difference."""
    rng, inside = np.random.default_rng(0), 0
    grid = (np.arange(1000) + 0.5) / 1000
    low, high = (float(stats.norm.cdf((ability - grid) / 0.2).mean()) for ability in (0.5, 0.7))
    for _ in range(2000):
        hard = rng.random(32)  # of each question: whoever is able enough is right
        before, after = ((hard + rng.normal(0, 0.2, 32) < ability).astype(float) for ability in (0.5, 0.7))
        found = paired_shares(list(before), list(after))
        assert found.low is not None and found.high is not None
        inside += found.low <= high - low <= found.high
    assert inside / 2000 >= 0.93


def test_too_few_answers_are_said_to_be_too_few() -> None:
    """Of 16 answers there is no interval: tables, page and JSON say how many it takes."""
    found = compare_runs([graded("a", 12, 16)])
    (accuracy,) = [one for one in found.compared if one.measure.name == ACCURACY]
    assert {(mean.low, mean.high) for mean in accuracy.means.values()} == {(None, None)}
    assert [(pair.low, pair.high) for pair in accuracy.pairs] == [(None, None)]
    why = "validation accuracy: 16 answers are too few for an interval: it takes 20"
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show(found))
    text = console.export_text()
    assert "75.0% [too few]" in text and "+75.0% [too few]" in text and why in text
    assert why in page(found)
    assert [one["too_few"] for one in as_json(found)["measures"]] == ["", why.partition(": ")[2]]
    assert not compare_runs([graded("a", 15, 20)]).compared[1].too_few


def test_a_metric_that_is_no_share_is_no_percentage() -> None:
    """A task may count in other units: then it has a bootstrap's interval and plain numbers."""
    keys = tuple(f"example {number}" for number in range(24))
    bits = {name: TaskResult("text", "bits", False, keys, tuple(map(float, range(k, 24 + k))))
            for k, name in ((1, "a"), (3, "b"))}  # fmt: skip
    found = compare_runs([run_with("a"), run_with("b")], {"text": bits})
    (task,) = found.tasks
    assert interval_text(task.means["a"], task).startswith("12.5000 [")


def test_intervals_cover_the_truth_about_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 samples of 40 skewed, weighted differences 89 to 99% have the known mean in their interval."""
    monkeypatch.setattr(intervals, "RESAMPLES", 499)
    rng, truth, inside = np.random.default_rng(0), 0.1, 0
    for _ in range(300):
        values, weights = rng.exponential(1.0, 40) - 1.0 + truth, rng.integers(1, 20, 40)
        found = bootstrapped(list(values), list(map(float, weights)))
        assert found.low is not None and found.high is not None
        inside += found.low <= truth <= found.high
    assert 0.89 <= inside / 300 <= 0.99


def test_false_findings_are_as_rare_as_they_say_and_real_ones_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 200 pairs without a difference about 5% are told apart; a clear one is always."""
    monkeypatch.setattr(pairs, "RESAMPLES", 399)
    monkeypatch.setattr(intervals, "RESAMPLES", 399)
    rng = np.random.default_rng(1)
    hardness = rng.exponential(3.0, 24)  # examples differ far more than runs: pairing takes that out
    false = 0
    for _ in range(200):
        a, b = (hardness + rng.normal(0, 0.3, 24) for _ in range(2))
        (pair,) = pairs_of({"a": list(a), "b": list(b)}, [1.0] * 24)
        false += pair.told_apart
    assert false / 200 <= 0.09
    found = [
        pairs_of({"a": list(hardness), "b": list(hardness + rng.normal(0.5, 0.3, 24))}, [1.0] * 24)[0]
        for _ in range(10)
    ]
    assert all(
        pair.told_apart and pair.high is not None and pair.difference < pair.high < 0 for pair in found
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9), st.integers(1, 9)), min_size=2, max_size=9))
def test_a_pair_turned_round_says_the_same(rows: list[tuple[float, float, int]]) -> None:
    """The difference changes its sign, the p-value stays; equal runs differ by nothing."""
    first, second, weights = (list(map(float, column)) for column in zip(*rows, strict=True))
    (one,) = pairs_of({"a": first, "b": second}, weights)
    (other,) = pairs_of({"b": second, "a": first}, weights)
    assert math.isclose(one.difference, -other.difference, abs_tol=1e-12)
    assert math.isclose(one.p, other.p)
    (same,) = pairs_of({"a": first, "c": list(first)}, weights)
    assert (same.difference, same.p, same.told_apart) == (0.0, 1.0, False)


def test_a_baseline_makes_one_pair_of_each_other_and_every_call_repeats_them() -> None:
    """Three runs have three pairs, or two against a baseline; twice the same call gives the same numbers."""
    values = {"a": GOOD, "b": BASE, "c": tuple(reversed(BASE))}
    assert [("a", "b"), ("a", "c"), ("b", "c")] == [(p.first, p.second) for p in pairs_of(values, TARGETS)]
    against = pairs_of(values, TARGETS, baseline="b")
    assert [("a", "b"), ("c", "b")] == [(p.first, p.second) for p in against]
    assert against == pairs_of(values, TARGETS, baseline="b")


# -------------------------------------------------------------------------- win rates


def test_win_rates_and_their_geometric_mean_by_hand() -> None:
    """Each rate is the share of the others that are worse, a tie half; the score is their geometric mean."""
    assert {"a": 0.75, "b": 0.75, "c": 0.0} == win_rates({"a": 0.6, "b": 0.6, "c": 0.1})
    scores = {
        "gsm8k": {"a": 0.3, "b": 0.2, "c": 0.1, "d": 0.0},  # 1, 2/3, 1/3, 0
        "arc": {"a": 0.5, "b": 0.9, "c": 0.7, "d": 0.6},  # 0, 1, 2/3, 1/3
    }
    found = {winning.name: (winning.mean, winning.score) for winning in challenge(scores)}
    expected = {
        "b": (5 / 6, math.sqrt(2 / 3)),
        "c": (1 / 2, math.sqrt(2 / 9)),
        "a": (1 / 2, 0.0),
        "d": (1 / 6, 0.0),
    }
    assert list(expected) == list(found)
    assert {name: pytest.approx(values) for name, values in expected.items()} == found


def test_the_worked_example_of_the_documentation_is_what_the_code_gives() -> None:
    """Every number of the table in docs/compare.md, and the warnings of its two zeros."""
    text = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
    _, _, tail = text.partition("| entry | gsm8k | arc_easy |")
    table = [line.strip("| ").split(" | ") for line in tail.splitlines()[2:6]]
    scores = {
        task: {row[0]: float(row[column].rstrip("%")) / 100 for row in table}
        for column, task in ((1, "gsm8k"), (2, "arc_easy"))
    }
    found = challenge(scores)
    assert [row[3:] for row in table] == [
        [f"{value:.3f}" for value in (*one.rates.values(), one.mean, one.score)] for one in found
    ]
    assert [row[0] for row in table] == [one.name for one in found]
    first, second, few = warnings_of(found)
    assert first.startswith("a is better than nobody in arc_easy: that makes its score 0")
    assert second.startswith("d is better than nobody in gsm8k") and "With 4 entrants" in few


def test_a_zero_is_warned_of_by_name() -> None:
    """One lost scenario zeroes a score; with few entrants somebody is always last, and that is said."""
    winnings = challenge({"gsm8k": {"a": 0.3, "b": 0.0}, "arc": {"a": 0.5, "b": 0.6}})
    first, second, few = warnings_of(winnings)
    assert ("a is better than nobody in arc" in first, "b is better than nobody in gsm8k" in second) == (
        True,
        True,
    )
    assert "With 2 entrants" in few
    many = {name: float(place) for place, name in enumerate("abcdefgh", start=1)}
    tied = dict.fromkeys(many, 0.5)
    assert len(warnings_of(challenge({"x": many, "y": tied}))) == 1
    assert warnings_of(challenge({"y": tied})) == []


# ------------------------------------------------------------------------------ tasks


def answers(**grades: Sequence[float]) -> Mapping[str, TaskResult]:
    """Results of entrants on the same examples."""
    keys = [f"example {number}" for number in range(9)]
    return {
        name: TaskResult("arc", "acc", True, tuple(keys[: len(some)]), tuple(some))
        for name, some in grades.items()
    }


def test_tasks_are_paired_by_example_and_scored_as_in_the_challenge() -> None:
    """Whatever order the answers came in, examples meet; runs on other data may answer the same task."""
    runs = [run_with("a"), run_with("b", rows=Rows("other", "r", "t"))]
    results = dict(answers(a=(1, 1, 1, 0), b=(1, 0, 0, 0)))
    turned = results["b"]
    results["b"] = replace(turned, examples=turned.examples[::-1], grades=turned.grades[::-1])
    found = compare_runs(runs, {"arc": results})
    (task,) = found.tasks
    assert {"a": (1, 1, 1, 0), "b": (1, 0, 0, 0)} == task.measure.values
    assert [(0.5, "a", "b")] == [(pair.difference, pair.first, pair.second) for pair in task.pairs]
    assert [("a", 1.0), ("b", 0.0)] == [(winning.name, winning.score) for winning in found.winnings]
    assert found.warnings


def test_only_examples_that_all_answered_count() -> None:
    """A task that was cut short for one is compared on what it has; with nothing in common it is named."""
    found = compare_runs([run_with("a"), run_with("b")], {"arc": answers(a=(1, 0, 1), b=(1, 1))})
    assert found.tasks[0].measure.notes == ("2 of up to 3 examples: all have these",)
    other = replace(answers(b=(1.0,))["b"], examples=("another",))
    found = compare_runs([run_with("a"), run_with("b")], {"arc": {**answers(a=(1.0,)), "b": other}})
    assert (found.tasks, found.notes) == ((), ("arc: there is no example that all have answered",))


# ---------------------------------------------------------------- ledgers and the page


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two runs on the same rows, with energy and without, and one on another split."""
    worse = [loss + 0.4 for loss in GOOD]
    return [
        write_run(tmp_path / "runs" / "good", score(), joules=36_000.0),
        write_run(tmp_path / "runs" / "worse", score(worse, grades=(0.0, 1.0, 0.0, 1.0))),
        write_run(
            tmp_path / "runs" / "split", score(),
            data={"valid_rows_sha256": "r", "valid_tokens_sha256": "t"},
        ),
    ]  # fmt: skip


def test_a_ledger_tells_what_a_run_reached_and_what_it_cost(folders: list[Path]) -> None:
    """Losses, grades, weights, seconds, Wh where they were measured, the peak, the configuration."""
    good, worse, _ = gather(folders)
    assert (good.name, good.state, good.quantization, good.space) == ("good", "finished", "fp32", "test")
    assert (good.adapter, good.base.losses) == (Results(GOOD, TARGETS, (1.0, 1.0, 0.0, 1.0)), BASE)
    costs = good.costs
    assert (costs.device_seconds, costs.train_seconds, costs.budget_seconds) == (4.0, 1.0, 720.0)
    assert (costs.watt_hours, worse.costs.watt_hours) == (10.0, None)
    assert (costs.peak_bytes, good.params["rank"], good.trials) == (3 * 2**30, 8, 1)
    assert (good.rows.valid_rows, good.rows.valid_tokens) == ("rows", "tokens")


def test_the_command_compares_ledgers_and_writes_its_files(folders: list[Path], tmp_path: Path) -> None:
    """A table with the verdict, a page, and JSON with every example; the other split is named."""
    out = tmp_path / "out"
    code, text = invoke("compare", *map(str, folders), "--out", str(out))
    assert code == 0, text
    assert "good against worse" in text
    assert "-0.4000" in text
    assert "the same data in another split (--split-seed" in text
    assert {"compare.html", "compare.json"} == {path.name for path in out.iterdir()}
    values = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    first, *_ = values["measures"]
    assert (first["name"], [entrant["name"] for entrant in first["entrants"]]) == (
        LOSS,
        ["good", "worse", "base fp32"],
    )
    pair = next(p for p in first["pairs"] if (p["first"], p["second"]) == ("good", "worse"))
    assert (round(pair["difference"], 9), pair["better"]) == (-0.4, "good")
    assert {("good", "worse", "split")} == {
        (*one["first"], *one["second"]) for one in values["not_compared"] if one["measure"] == LOSS
    }
    page_text = (out / "compare.html").read_text(encoding="utf-8")
    assert "<script" in page_text
    assert "not measured" in page_text
    assert 'src="http' not in page_text


def test_without_a_folder_nothing_is_written(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading ledgers leaves nothing behind in the working folder; it says how to get the page."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    code, text = invoke("compare", *map(str, folders))
    assert code == 0, text
    assert "No file was written: --out FOLDER writes a page with plots" in text
    assert [] == list(here.iterdir())


def test_bases_come_first_and_runs_as_they_were_named(folders: list[Path]) -> None:
    """Whichever is best: the eye finds what it looks for, and the same command twice looks the same."""
    good, worse, _ = folders
    for order in ((good, worse), (worse, good)):
        found = compare_runs(gather(order))
        assert ["base fp32", *(path.name for path in order)] == [name for name, _ in rows(found)]


def test_json_is_printed_alone_on_request(folders: list[Path], tmp_path: Path) -> None:
    """``--json`` prints what compare.json holds; a baseline among other folders is taken along."""
    out = tmp_path / "out"
    code, text = invoke(
        "compare", str(folders[0]), "--baseline", str(folders[1]), "--json", "--out", str(out)
    )
    assert code == 0, text
    values = json.loads(text)
    assert values == json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert {"worse"} == {pair["second"] for one in values["measures"] for pair in one["pairs"]}


def test_one_run_is_compared_with_its_base(folders: list[Path], tmp_path: Path) -> None:
    """The smallest comparison: adapter against base on the same rows."""
    code, text = invoke("compare", str(folders[0]), str(folders[0]), "--out", str(tmp_path / "out"))
    assert code == 0, text
    assert "good against base fp32" in text


def test_an_unfinished_run_stands_for_what_it_has(tmp_path: Path) -> None:
    """Without final scores the last evaluation counts, without even that the run is named and marked."""
    unscored = write_run(tmp_path / "going", finished=False)
    found = compare_runs(gather([unscored, write_run(tmp_path / "done", score())]))
    assert (found.runs[0].state, found.runs[0].adapter) == ("stopped", Results())
    assert [("base fp32", "-"), ("going", "stopped"), ("done", "finished")] == [
        (name, cells[-1]) for name, cells in rows(found)
    ]
    assert ["going: its ledger holds no loss by example"] == list(found.notes[:1])
    assert "the run is not finished (stopped)" in found.notes[1]
    assert [{"done", "base fp32"}] == [set(one.means) for one in found.compared if one.measure.name == LOSS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "does not exist"),
        (["{tmp}"], "no ledger.sqlite"),
        (["{run}", "--limit", "3"], "belong to --tasks"),
        (["{run}", "--tasks", "x.jsonl", "--limit", "0"], "1 or more"),
        (["{run}", "--tasks", " , "], "names no task"),
        (["{run}", "--tasks", "nowhere.jsonl"], "nowhere.jsonl"),
        (["{run}", "--tasks", "reasoning-gym:family_relation"], "family_relationships"),
        (["{run}", "--tasks", "gsm8k", "--task-data", "nowhere"], "not a folder"),
        (["{run}", "--out", "/proc/nowhere"], "cannot be written"),
    ],
)
def test_wrong_input_is_one_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    """Exit code 2, one line that says what to do, no traceback."""
    run = write_run(tmp_path / "run", score())
    filled = [part.format(run=run, tmp=tmp_path) for part in arguments]
    if "--out" not in filled:
        filled += ["--out", str(tmp_path / "out")]
    code, text = invoke("compare", *filled)
    assert code == 2, text
    assert text.count("error:") == 1
    assert message in text.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    """Which of the runs it is stands in the error."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "ledger.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(UsageError, match="bad"):
        gather([tmp_path / "bad"])


def test_names_are_as_short_as_they_can_be_and_harmless(tmp_path: Path) -> None:
    """The last parts of the paths tell them apart; what steers a terminal or a page does nothing."""
    assert names_of([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert names_of([Path("/x/\x1b[31m\nred")]) == ["?[31m?red"]
    hostile = "<script>alert(1)<_script>[bold]{{ 7 * 7 }}"
    run = write_run(tmp_path / hostile, score())
    found = compare_runs(gather([run]))
    text = page(found)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show(found))
    assert "[bold]{{ 7 * 7 }}" in console.export_text()


def test_the_page_lets_nothing_run_but_its_own_scripts_and_fetches_nothing() -> None:
    """Its policy forbids everything else; a name that is markup stays text, in the figures too."""
    text = page(compare_runs([run_with(EVIL), run_with("b")]))
    (content,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    allowed = html.unescape(content)
    assert allowed.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline'; img-src" in allowed and "http" not in allowed
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert re.findall(r"'sha256-([^']+)'", allowed) == hashes
    assert EVIL not in text
    (data,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', text)
    assert "<" not in "".join(trace["name"] for one in json.loads(data).values() for trace in one["data"])


def test_an_axis_of_accuracies_ends_at_0_and_at_100_percent() -> None:
    """It has room for every interval and none beyond what a share can be."""
    for right, ends in ((32, (0.0, 1.0)), (4, (0.0, None))):
        found = compare_runs([graded("a", right, 32), graded("b", right - 1, 32)])
        (accuracy,) = [one for one in found.compared if one.measure.name == ACCURACY]
        (panel,) = panels(accuracy, found, 0)
        low, high = panel.layout["yaxis"]["range"]
        assert low == ends[0]
        assert high <= 1.0 and high == (ends[1] or high)
        shown = [end for mean in accuracy.means.values() for end in (mean.low, mean.high, mean.value)]
        assert all(end is not None and low <= end <= high for end in shown)
        go.Figure(panel.data, panel.layout)


@pytest.mark.parametrize("width", [360, pytest.param(1280, marks=pytest.mark.slow)])
def test_the_page_fits_a_phone(width: int, tmp_path: Path) -> None:
    """Nothing scrolls sideways, every plot is drawn, long names are whole in the legend and in no plot; it is
    readable light and dark."""
    names = [f"a-run-with-a-rather-long-name-number-{number}" for number in range(8)]
    runs = [replace(graded(name, 20 + k, 32), costs=Costs(720.0, 600.0 + k, 500.0, 5.0, 2**30 + k))
            for k, name in enumerate(names)]  # fmt: skip
    path = tmp_path / "compare.html"
    path.write_text(page(compare_runs(runs)), encoding="utf-8")
    with browser_page() as browser:
        browser.open(path, width=width)
        assert browser.run("document.documentElement.scrollWidth") <= width
        drawn = browser.run(
            "[...document.querySelectorAll('.plot')].map(p => "
            "p.querySelector('svg.main-svg').getBoundingClientRect().width)"
        )
        assert len(drawn) == 6
        assert all(200 < wide <= width for wide in drawn)
        keys = browser.run(
            "[...document.querySelectorAll('.keys li')].map(k => "
            "[k.textContent, k.getBoundingClientRect().right])"
        )
        assert [label[2:] for label, _ in keys] == [*names, "base fp32"]
        assert all(right <= width for _, right in keys)
        in_plots = browser.run("[...document.querySelectorAll('.plot text')].map(t => t.textContent).join()")
        assert "rather-long" not in in_plots
        first = browser.run("document.querySelector('td').getBoundingClientRect()['width']")
        assert first >= 100, "a name is not squeezed into a column of letters"
        for dark in (False, True):
            browser.like_dark(dark)
            browser.open(path, width=width)
            assert min(browser.contrasts("body, .quiet, td, th, h2, li")) >= 4.5
            turned = browser.run(
                "[...document.querySelectorAll('.plot, .keys i')].map(p => getComputedStyle(p).filter)"
            )
            assert {"invert(1) hue-rotate(180deg)" if dark else "none"} == set(turned)
        assert browser.complaints() == []
        assert [url for url in browser.requests() if not url.startswith(("file:", "data:", "blob:"))] == []


def test_a_long_name_keeps_its_ends() -> None:
    """It would push everything else out of a table."""
    (name,) = names_of([Path("/" + "a" * 100 + "z")])
    assert (len(name), name[0], name[-1]) == (48, "a", "z")


def test_the_comparison_as_json_is_plain(folders: list[Path]) -> None:
    """No NaN, no tuple, no object: what is written is what was found."""
    answered = answers(good=(1, 0), worse=(0, 0), split=(1, 1))
    found: Comparison = compare_runs(gather(folders), {"arc": answered})
    values = as_json(found)
    assert json.loads(json.dumps(values, allow_nan=False))["format"] == 1
    assert [1.0, 0.5, 0.0] == [one["score"] for one in values["challenge"]["entrants"]]
    assert values["challenge"]["warnings"]
    assert DATA["valid_rows_sha256"] == values["runs"][0]["rows"]["valid_rows"]


def test_comparing_ledgers_needs_no_heavy_library(folders: list[Path]) -> None:
    """Neither torch nor optuna is imported, so it takes a second or two."""
    code = (
        "import sys; from budgetsearch import api; from budgetsearch.tools.compare.page import page;"
        f"page(api.compare({list(map(str, folders))!r}));"
        "assert not {'torch', 'optuna', 'transformers', 'lm_eval'} & set(sys.modules), sorted(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_python_api_takes_paths_as_text(folders: list[Path]) -> None:
    """``budgetsearch.api.compare`` is what the command calls."""
    found = api.compare([str(folders[0]), folders[1]], baseline=str(folders[1]))
    assert [["good", "base fp32"]] == [
        [pair.first for pair in one.pairs] for one in found.compared if one.measure.name == LOSS
    ]
