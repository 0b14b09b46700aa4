"""benchmarks/policy: the clock of the peers, and what each does with its time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.policy.baselines import BASELINES
from benchmarks.policy.peers import PEERS, Clockwork, OutOfBudget, play_peer, rungs_of
from benchmarks.policy.run import Task, outcomes_of, tasks_for
from budgetsearch.tools.simulate.contest import OURS
from budgetsearch.tools.simulate.curves import load, save
from tests.support.curves import make_table


@pytest.mark.parametrize("method", PEERS)
def test_a_peer_plays_to_the_deadline_and_no_further(tmp_path: Path, method: str) -> None:
    """Each sees values, none of them late, and as many as the time holds."""
    table = make_table(tmp_path / "t.npz")
    moments = play_peer(PEERS[method], table, 5, 0).moments
    assert 0.8 * 5 * table.mean_cost < max(at for at, _ in moments) <= 5 * table.mean_cost


def test_a_peer_ends_when_a_table_is_used_up(tmp_path: Path) -> None:
    """TPE without a pruner runs every row once, then stops."""
    table = make_table(tmp_path / "t.npz", count=5, diverge=0.0)
    trace = play_peer(PEERS["optuna-tpe"], table, 100, 0)
    assert len(trace.moments) == 5 * table.points
    assert trace.regret(table, math.inf) == 0.0


def test_the_clockwork_charges_only_what_is_added(tmp_path: Path) -> None:
    """Two steps to a point cost what one costs; beyond the deadline there is no step."""
    table = make_table(tmp_path / "t.npz", diverge=0.0)
    one, two = Clockwork(table, 1e9), Clockwork(table, 1e9)
    params = {"rate": 0.01, "layers": 3, "kind": "a"}
    one.start(params).advance(12)
    run = two.start(params)
    run.advance(5)
    run.advance(12)
    assert one.now == pytest.approx(two.now)
    with pytest.raises(OutOfBudget):
        Clockwork(table, one.now / 2).start(params).advance(12)


def test_a_diverged_run_stays_at_the_worst_value(tmp_path: Path) -> None:
    """Nothing behind the point where it diverged is ever read, however often it is asked to go on."""
    curve = [(1.0, 0.5), (2.0, math.nan), (3.0, 0.1)]
    dimensions = {"x": {"type": "float", "low": 0.0, "high": 1.0}}
    rows = [{"x": 0.0}, {"x": 1.0}]
    save(tmp_path / "t.npz", rows, [curve, [(1.0, 0.9), (2.0, 0.8), (3.0, 0.7)]], dimensions, "minimize")
    table = load(tmp_path / "t.npz")
    run = Clockwork(table, 1e9).start({"x": 0.0})
    assert [(0.5, False, False), (table.worst, True, True), (table.worst, True, True)] == [
        run.advance(point) for point in (1, 3, 3)
    ]


def test_a_peer_reads_every_budget_off_one_play(tmp_path: Path) -> None:
    """What it had seen by a smaller deadline is what a play of that budget sees; ours is played for each."""
    table = make_table(tmp_path / "t.npz")
    both, alone = (
        outcomes_of(table, Task("t", "optuna-sha", 0, multiples)) for multiples in ((3.0, 8.0), (3.0,))
    )
    assert both[0].regret == alone[0].regret
    plays = tasks_for([tmp_path / "t.npz"], [OURS, "random"], [3.0, 8.0], 1)
    assert [(OURS, (3.0,)), (OURS, (8.0,)), ("random", (3.0, 8.0))] == [
        (t.method, t.multiples) for t in plays
    ]


@pytest.mark.parametrize("method", BASELINES)
def test_a_textbook_scheduler_plays_to_the_deadline_and_no_further(tmp_path: Path, method: str) -> None:
    """Each uses its time, and no more."""
    table = make_table(tmp_path / "t.npz", count=300)
    moments = play_peer(BASELINES[method], table, 5, 0).moments
    assert 0.8 * 5 * table.mean_cost < max(at for at, _ in moments) <= 5 * table.mean_cost


def test_the_peers_ladder_starts_at_a_twenty_seventh() -> None:
    """In points, up to the whole run."""
    assert rungs_of(50) == [2, 6, 18, 50]
    assert rungs_of(24) == [1, 3, 9, 24]
