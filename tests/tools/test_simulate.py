"""The policy on recorded curves: tables, worlds, contests, and the command."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from budgetsearch.cli import app
from budgetsearch.core.decisions import Run
from budgetsearch.core.errors import DataError, UsageError
from budgetsearch.core.events import Closed, Decided
from budgetsearch.core.records import Schedule, Segment, SegmentResult, TrainJob
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.tools.simulate import play as playing
from budgetsearch.tools.simulate.contest import (
    OURS,
    Outcome,
    find_tables,
    read_budgets,
    standings,
)
from budgetsearch.tools.simulate.curves import CurveTable, load, save
from budgetsearch.tools.simulate.invariants import InvariantError, check
from budgetsearch.tools.simulate.play import play, play_random
from budgetsearch.tools.simulate.world import CurveWorld, Trace
from tests.support.curves import DIMENSIONS, make_table

# ---------------------------------------------------------------------------- tables


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    """What was saved is what is read: configurations, seconds, values and where they diverge."""
    table = make_table(tmp_path / "t.npz")
    params, number = table.nearest({"rate": 0.01, "layers": 3, "kind": "a"}, set())
    seconds, values = table.curve(params)
    assert len(seconds) == len(values) == table.points == 27
    assert table.nearest(params, set()) == (params, number)
    assert table.nearest(params, {number})[1] != number
    assert table.best < table.median < table.worst


def test_a_metric_to_maximise_is_turned_round(tmp_path: Path) -> None:
    """Inside, lower is better, whatever the file's direction."""
    curves = [[(1.0, 0.2), (2.0, 0.9)], [(1.0, 0.1), (2.0, 0.5)]]
    configurations = [{"x": 0.0}, {"x": 1.0}]
    dimensions = {"x": {"type": "float", "low": 0.0, "high": 1.0}}
    save(tmp_path / "t.npz", configurations, curves, dimensions, "maximize")
    assert load(tmp_path / "t.npz").best == -0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val": None}, "lacks val"),
        ({"space": np.array("{")}, "must be JSON"),
        ({"meta": np.array('{"direction": "up"}')}, "direction"),
        ({"hp": np.zeros((2, 7))}, "dimensions in space"),
        ({"sec": np.array([[2.0, 1.0], [1.0, 2.0]])}, "sec of run 0 must rise"),
        ({"sec": np.array([[np.nan, np.nan], [1.0, 2.0]])}, "each with a recorded time"),
        ({"val": np.full((2, 2), np.nan)}, "no finite value"),
    ],
)
def test_a_broken_table_is_refused_with_the_reason(tmp_path: Path, change: dict, message: str) -> None:
    """Every way to get the format wrong has a message that says what is wrong."""
    parts = {
        "hp": np.array([[0.0], [1.0]]),
        "val": np.array([[1.0, 0.5], [2.0, 1.5]]),
        "sec": np.array([[1.0, 2.0], [1.0, 2.0]]),
        "space": np.array(json.dumps({"x": {"type": "float", "low": 0, "high": 1}})),
        "meta": np.array(json.dumps({"direction": "minimize"})),
    }
    parts = {key: value for key, value in {**parts, **change}.items() if value is not None}
    np.savez(tmp_path / "t.npz", **parts)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "t.npz")


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    """A missing file, a text file and an archive of pickles are told apart from a table."""
    with pytest.raises(DataError, match="no curves"):
        load(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match="not a NumPy archive"):
        load(tmp_path / "text.npz")
    np.savez(tmp_path / "objects.npz", hp=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="pickled"):
        load(tmp_path / "objects.npz")


# ------------------------------------------------------------------------ the policy


@pytest.mark.slow
def test_the_policy_finds_more_than_random_search(tmp_path: Path) -> None:
    """On a smooth table its mean regret at 10 full runs is less than half of random search's."""
    table = make_table(tmp_path / "t.npz", count=600)
    deadline = 10 * table.mean_cost
    ours = [play(table, 10, seed).regret(table, deadline) for seed in range(6)]
    theirs = [play_random(table, 10, seed).regret(table, deadline) for seed in range(6)]
    assert sum(ours) < 0.5 * sum(theirs)


def test_early_losses_are_told_apart_however_much_worse_they_are_than_final_ones(tmp_path: Path) -> None:
    """Sixty runs whose curves fall late and never cross, and whose parameters say nothing: whoever is best at
    the first rung is best at the end, so the policy finds nearly the best there is."""
    rng, points = np.random.default_rng(0), 27
    qualities = [float(rng.uniform()) for _ in range(60)]
    rows = [{"rate": float(10 ** rng.uniform(-4, 0)), "layers": 1, "kind": "a"} for _ in qualities]
    curves = [
        [(k + 1.0, 1 + quality + (5 + quality) * (1 - (k + 1) / points) ** 2) for k in range(points)]
        for quality in qualities
    ]
    save(tmp_path / "t.npz", rows, curves, DIMENSIONS, "minimize")
    table = load(tmp_path / "t.npz")
    regrets = [play(table, 10, seed).regret(table, 10 * table.mean_cost) for seed in range(3)]
    assert sum(regrets) / len(regrets) < 0.05


def test_only_what_diverged_has_the_worst_value(tmp_path: Path) -> None:
    """No finite loss of a table is above it, and the simulated engine tells each one as it was recorded."""
    table = make_table(tmp_path / "t.npz", diverge=0.0)
    world = CurveWorld(table, VirtualClock())
    told, recorded, taken = [], [], set[int]()
    while table.left(taken):
        params, number = table.nearest({"rate": 0.01, "layers": 3, "kind": "a"}, taken)
        taken.add(number)
        segment = Segment(number, params, 0, 0, 0, 1, Schedule(0, 1), 1, 1)
        ((result,), _) = world.perform(TrainJob(number, (segment,), 1, math.inf))
        assert isinstance(result, SegmentResult)
        told.append(result.loss)
        recorded.append(float(table.curve(params)[1][0]))
    assert recorded == told
    assert max(recorded) == table.worst


@pytest.mark.slow
def test_the_same_seed_sees_the_same(tmp_path: Path) -> None:
    """A simulated run is a function of table, budget and seed."""
    table = make_table(tmp_path / "t.npz")
    assert play(table, 5, 3).moments == play(table, 5, 3).moments
    assert play(table, 5, 3).moments != play(table, 5, 4).moments


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(2, 60),
    points=st.integers(3, 60),
    multiple=st.floats(1.0, 12.0),
    diverge=st.floats(0.0, 0.9),
    short=st.booleans(),
)
def test_any_table_and_budget_keep_the_invariants(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    count: int,
    points: int,
    multiple: float,
    diverge: float,
    short: bool,
) -> None:
    """Small, short, diverging tables and odd budgets: ``play`` checks deadline, seconds and promotions."""
    path = tmp_path_factory.mktemp("tables") / "t.npz"
    table = make_table(path, count, points, seed, diverge=diverge, short=short)
    trace = play(table, multiple, seed)
    assert all(at <= multiple * table.mean_cost * (1 + 1e-9) for at, _ in trace.moments)


def _entries(table: CurveTable, multiple: float, monkeypatch: pytest.MonkeyPatch) -> list:
    seen: list = []
    monkeypatch.setattr(playing, "check", lambda entries, budget: seen.extend(entries))
    play(table, multiple, 0)
    return seen


def test_every_decision_of_a_simulated_run_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``decide`` repeats each recorded decision from the ledger before it."""
    entries = _entries(make_table(tmp_path / "t.npz"), 6, monkeypatch)
    history = check(entries, 6 * playing.FULL_RUN_SECONDS, replay=True)
    assert history.decisions > 20


def test_the_check_tells_a_broken_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late run, a run that was never closed, a lost second and an unexplained promotion are found."""
    entries = _entries(make_table(tmp_path / "t.npz"), 6, monkeypatch)
    budget = 6 * playing.FULL_RUN_SECONDS
    with pytest.raises(InvariantError, match="spent"):
        check(entries, budget / 2)
    with pytest.raises(InvariantError, match="never closed"):
        check([e for e in entries if not isinstance(e.event, Closed)], budget)
    charges = [e for e in entries if type(e.event).__name__ == "Charged"]
    with pytest.raises(InvariantError, match="charged"):
        check([e for e in entries if e is not charges[len(charges) // 2]], budget)
    with pytest.raises(InvariantError, match="promoted"):
        check(_with_the_worst_promoted(entries), budget)


def _with_the_worst_promoted(entries: list) -> list:
    """The first promotion goes to the trial that is worst at that moment."""
    from dataclasses import replace

    from budgetsearch.core.history.fold import apply
    from budgetsearch.core.history.history import History

    history, changed = History(), []
    for entry in entries:
        event = entry.event
        if isinstance(event, Decided) and isinstance(event.decision, Run):
            segment = event.decision.job.segments[0]
            if event.decision.reason.startswith("promotion"):
                worst = history.at_rung(segment.rung - 1)[-1]
                job = replace(event.decision.job, segments=(replace(segment, trial_id=worst.trial_id),))
                event = replace(event, decision=Run(job, ("promotion: because",)))
                return [*changed, replace(entry, event=event)]
        changed.append(entry)
        apply(history, entry)
    raise AssertionError("nothing was promoted")


def test_a_trial_with_a_short_run_of_its_own_has_rungs_in_proportion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded run of a third of the length is complete there: no segment goes beyond its end."""
    table = make_table(tmp_path / "t.npz", short=True, diverge=0.0)
    history = check(_entries(table, 6, monkeypatch), 6 * playing.FULL_RUN_SECONDS)
    tops = {state.trial.rung_tokens[-1] for state in history.trials.values()}
    assert tops == {9, 27}
    assert all(result.tokens <= history.trials[s.trial_id].trial.max_tokens for s, result in history.results)


def test_a_stopped_segment_keeps_its_points_and_sees_no_others(tmp_path: Path) -> None:
    """After 40% of a segment's time the world keeps the points of that time, in the trace and in tokens."""
    table = make_table(tmp_path / "t.npz", diverge=0.0)
    clock = VirtualClock()
    world = CurveWorld(table, clock)
    params, _ = table.nearest({"rate": 0.01, "layers": 3, "kind": "a"}, set())
    segment = Segment(0, params, 0, 0, 0, 20, Schedule(0, 20), 1, 1)
    job = TrainJob(0, (segment,), 1, math.inf)
    _, seconds = world.perform(job)
    assert len(world.trace.moments) == 20
    clock.advance(0.4 * seconds)
    (result,) = world.interrupt(job, 0.4)
    assert (result.status, result.tokens) == ("cancelled", 8)
    assert len(world.trace.moments) == 8
    assert max(at for at, _ in world.trace.moments) <= clock.now()


# ----------------------------------------------------------------------- the contest


def test_random_search_runs_each_row_once_and_ends_in_time(tmp_path: Path) -> None:
    """It stops at the deadline, in the middle of a run; with time enough it has seen all there is."""
    table = make_table(tmp_path / "t.npz", count=5, diverge=0.0)
    deadline = 2.5 * table.mean_cost
    moments = play_random(table, 2.5, 0).moments
    assert 0.9 * deadline < max(at for at, _ in moments) <= deadline
    whole = play_random(table, 100, 0)
    assert 5 * table.points == len(whole.moments)
    assert 0.0 == whole.regret(table, math.inf)


def _outcome(method: str, curves: str, seed: int, regret: float) -> Outcome:
    return Outcome(curves, method, seed, 4.0, regret, (regret,))


def test_standings_average_over_tables_and_rank_by_mean_regret() -> None:
    """Means and errors over seeds, places per table and budget, ties shared."""
    found = standings(
        [
            _outcome("a", "t", 0, 0.2), _outcome("a", "t", 1, 0.4), _outcome("b", "t", 0, 0.5),
            _outcome("b", "t", 1, 0.5), _outcome("a", "u", 0, 0.1), _outcome("a", "u", 1, 0.1),
            _outcome("b", "u", 0, 0.1), _outcome("b", "u", 1, 0.1),
        ]
    )  # fmt: skip
    assert [("a", 1.25), ("b", 1.75)] == [(s.method, s.rank) for s in found]
    mean, error = found[0].regrets[4.0]
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx(0.05)


def test_regret_is_scaled_between_the_best_and_the_median(tmp_path: Path) -> None:
    """Nothing seen is 1, the median is 1, the best is 0."""
    table = make_table(tmp_path / "t.npz")
    assert Trace().regret(table, 1.0) == 1.0
    assert Trace([(1.0, table.median)]).regret(table, 1.0) == 1.0
    assert Trace([(1.0, table.best)]).regret(table, 1.0) == 0.0
    assert Trace([(2.0, table.best)]).regret(table, 1.0) == 1.0


@pytest.mark.parametrize("text", ["", "x", "0x", "4x,,", "nan", "-3"])
def test_budgets_that_are_no_numbers_are_refused(text: str) -> None:
    """The message shows how to write them."""
    with pytest.raises(UsageError, match="4x,10x"):
        read_budgets(text)
    assert read_budgets("4x, 10X,2.5") == [4.0, 10.0, 2.5]


def test_folders_and_files_name_tables_once(tmp_path: Path) -> None:
    """A folder stands for its tables; nothing found and the same name twice are errors."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match=r"no \.npz files"):
        find_tables([tmp_path])
    for name in ("a/x.npz", "b/y.npz"):
        (tmp_path / name).touch()
    assert [tmp_path / "a/x.npz", tmp_path / "b/y.npz"] == find_tables([tmp_path])
    (tmp_path / "b/x.npz").touch()
    with pytest.raises(UsageError, match="Two tables are called x"):
        find_tables([tmp_path])


def test_the_command_prints_a_table_json_and_a_plot(tmp_path: Path) -> None:
    """``budgetsearch simulate`` plays in several processes and shows who won."""
    make_table(tmp_path / "t.npz", count=60)
    base = ["simulate", "--curves", str(tmp_path), "--budget", "4x", "--seeds", "2"]
    page = tmp_path / "out" / "plot.html"
    shown = CliRunner().invoke(app, [*base, "--plot", str(page), "--jobs", "1"])
    assert shown.exit_code == 0, shown.output
    assert re.search(rf"{OURS}.*\d", shown.output)
    assert "normalised regret" in page.read_text()
    told = CliRunner().invoke(app, [*base, "--json", "--jobs", "2"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert {OURS, "random"} == {row["method"] for row in found["standings"]}
    assert len(found["runs"]) == 4


# -------------------------------------------------------------------------- the docs


def test_the_snippets_that_make_tables_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/curves.md: from a CSV and from an Optuna study, as written there."""
    import optuna

    text = (Path(__file__).parents[2] / "docs" / "curves.md").read_text()
    from_csv, from_study = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    lines = [f"{run},{10 ** -(3 + run)},{8 * run},{k},{run + 1 / k}" for run in (1, 2) for k in (1, 2, 3)]
    Path("runs.csv").write_text("run,learning_rate,rank,seconds,loss\n" + "\n".join(lines) + "\n")
    exec(from_csv, {})
    assert load(Path("curves.npz")).points == 3
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name="mine", storage="sqlite:///study.db", direction="maximize")

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1) + len(trial.suggest_categorical("kind", ["a", "b"]))
        trial.report(x, 1)
        trial.report(2 * x, 2)
        return 2 * x

    study.optimize(objective, n_trials=4)
    exec(from_study, {})
    assert load(Path("study.npz")).best == -study.best_value


def test_the_snippet_that_samples_in_a_study_runs() -> None:
    """docs/policy.md: the sampler in an Optuna study, as written there."""
    text = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(snippet, names)
    names["study"].optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=12)
    assert names["study"].best_value < 0.5
