"""The policy's finer rules on virtual time: ladders, scouts, ties, random spaces, kills anywhere."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from budgetsearch.core.decisions import Run
from budgetsearch.core.errors import BudgetError
from budgetsearch.core.events import Decided, SegmentEnded, SegmentStarted
from budgetsearch.core.history.fold import apply
from budgetsearch.core.history.history import History
from budgetsearch.core.history.retention import needed_checkpoints
from budgetsearch.core.ladders import DEEP, FULL_RUNS, SCOUTS, USUAL, ladders_for, scouts_for
from budgetsearch.core.policy.costs import CostModel
from budgetsearch.core.policy.evidence import entry_rung, indistinguishable
from budgetsearch.core.records import Calibration, Segment, SegmentResult
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.sampler.sampler import OptunaSampler
from budgetsearch.storage.ledger import read_entries, read_history
from tests.support.simulation import SMALL_DATA, Killed, Killer, check_invariants, make_driver, run
from tests.support.worlds import SyntheticWorld


@dataclass
class Misleading(SyntheticWorld):
    """Until the second rung, what will end worst looks best."""

    until: int = 0

    def loss(self, segment: Segment, tokens: int) -> float:
        """Mirrored while the run is short."""
        true = super().loss(segment, tokens)
        return 20.0 - true if tokens <= self.until else true


def decisions(path: Path) -> list[Run]:
    """Every decision to run something, in order."""
    events = [entry.event for entry in read_entries(path)]
    return [e.decision for e in events if isinstance(e, Decided) and isinstance(e.decision, Run)]


def test_a_budget_of_many_full_runs_gets_a_shorter_first_rung_and_scouts(tmp_path: Path) -> None:
    """Little data: R is a small part of the budget, the ladder has four rungs, and eight trials scout."""
    history = run(tmp_path / "l.sqlite", budget=7200.0, **SMALL_DATA)
    plan = history.plan
    assert plan is not None
    assert (plan.top_rung, plan.scouts) == (3, SCOUTS)
    assert all(history.trials[number].rung >= 1 for number in range(SCOUTS))
    reasons = [d.reason for d in decisions(tmp_path / "l.sqlite")]
    assert sum(reason.startswith("scout") for reason in reasons) == SCOUTS


def test_the_ladder_deepens_with_the_budget_and_then_takes_scouts() -> None:
    """Three full runs and more take the deep ladder, eight and more scouts on it."""
    assert [USUAL, USUAL, DEEP, DEEP] == [ladders_for(multiple, None, 5)[0] for multiple in (1.0, 2.9, 3, 30)]
    assert [0, 0, SCOUTS] == [scouts_for(DEEP, multiple) for multiple in (3.0, 7.9, 8.0)]
    assert scouts_for(USUAL, 30.0) == 0
    ends = [ladders_for(multiple, None, 5, own_lengths=True)[0] for multiple in (3.0, 7.9, 8.0)]
    assert [USUAL, USUAL, DEEP] == ends  # unfinished runs say little there: deep only where scouts find out


def test_a_ladder_whose_first_rung_is_too_short_gives_way_to_the_next() -> None:
    """The deep one to the usual one, that to full runs; one that was asked for loses its first rung."""
    assert [DEEP, USUAL, FULL_RUNS] == ladders_for(30.0, None, 5)
    assert [(0.1, 0.3, 1.0), (0.3, 1.0), (1.0,)] == [
        tuple(round(share, 9) for share in shares) for shares in ladders_for(30.0, 0.1, 3)
    ]


def test_a_first_rung_that_was_asked_for_rises_by_eta() -> None:
    """Up to where a rung would stand just below the full run; the first is always there, without scouts."""
    assert ladders_for(30.0, 1 / 9, 3)[0] == pytest.approx((1 / 9, 1 / 3, 1.0))
    assert ladders_for(1.0, 1 / 27, 5)[0] == pytest.approx((1 / 27, 5 / 27, 1.0))
    assert ladders_for(1.0, 0.5, 5)[0] == (0.5, 1.0)
    assert ladders_for(1.0, 1.0, 3) == [(1.0,)]
    assert scouts_for(ladders_for(30.0, 1 / 27, 10)[0], 30.0) == 0


@pytest.mark.parametrize("seconds", [1000.0 + 37.7 * k for k in range(8)])
def test_a_deep_ladder_of_any_length_has_its_scouts(tmp_path: Path, seconds: float) -> None:
    """Whatever R is, rounding does not take them away."""
    small = {"train_rows": 1000, "train_tokens": 80_000 + int(seconds), "max_epochs": 2}
    driver = make_driver(tmp_path / "l.sqlite", budget=20_000.0, **small)
    plan = driver.planner(driver.request, _calibrations(), 30.0)
    assert (len(plan.ladder), plan.scouts) == (len(DEEP), SCOUTS)


def _calibrations() -> dict[str, Calibration]:
    return {"fp32": Calibration("fp32", "ok", 200.0, 0.05, 0.5, 1.0, micro_batch=8)}


def test_trials_that_never_answer_do_not_use_up_the_turn_of_those_that_would(tmp_path: Path) -> None:
    """Two trials hang until their limits; a third one enters, late as it is, and its adapter is exported."""
    world = SyntheticWorld(hang=lambda s: s.trial_id < 2)
    history = run(tmp_path / "l.sqlite", world)
    assert ["timeout", "timeout"] == [history.trials[number].dead for number in (0, 1)]
    assert history.incumbent is not None
    assert history.closed is not None
    assert history.closed.state == "finished"


@pytest.mark.whole
def test_on_two_rungs_the_last_part_of_the_budget_belongs_to_the_finalists(tmp_path: Path) -> None:
    """With 40% of the budget left no trial enters any more, and several trials run in full."""
    path = tmp_path / "l.sqlite"
    history = run(path, budget=7200.0, first_rung=1 / 6, max_epochs=1)
    assert history.plan is not None
    assert history.plan.top_rung == 1
    entering = [
        entry.event.now
        for entry in read_entries(path)
        if isinstance(entry.event, Decided)
        and isinstance(entry.event.decision, Run)
        and entry.event.decision.reason.startswith("new trial")
    ]
    assert max(entering) <= 0.6 * 7200 - history.plan.reserve_seconds
    assert len(history.full_done) >= 4


@pytest.mark.whole
def test_a_checkpoint_that_was_given_up_is_never_asked_for_again(tmp_path: Path) -> None:
    """Whoever was dropped stays dropped, however many worse trials come after it."""
    run(tmp_path / "l.sqlite", Tied(), budget=1000.0, sampler=OptunaSampler())
    for world in (SyntheticWorld(), Tied()):
        path = tmp_path / f"{type(world).__name__}.sqlite"
        run(path, world, budget=5000.0, max_epochs=1, sampler=OptunaSampler())
        history, swept = History(), set()
        for entry in read_entries(path):
            apply(history, entry)
            event = entry.event
            if isinstance(event, SegmentStarted):
                assert event.segment.checkpoint_in not in swept
            if isinstance(event, SegmentEnded):  # when the driver sweeps
                written = {r.checkpoint_out for _, r in history.results if r.checkpoint_out}
                swept |= written - needed_checkpoints(history)
        assert swept


def test_where_the_first_rung_misleads_trials_enter_at_the_second(tmp_path: Path) -> None:
    """The scouts disagree, so every later trial goes to rung 1 at once."""
    first = run(tmp_path / "a.sqlite", budget=7200.0, **SMALL_DATA).trials[0].trial.rung_tokens[0]
    world = Misleading(until=2 * first)
    history = run(tmp_path / "b.sqlite", world, budget=7200.0, **SMALL_DATA)
    assert history.plan is not None
    assert entry_rung(history.plan, history) == 1
    later = [t for t in history.trials.values() if t.trial_id >= SCOUTS and t.started]
    assert later
    assert all(0 not in t.losses for t in later)
    assert history.full_done


def test_where_it_predicts_they_enter_at_the_first(tmp_path: Path) -> None:
    """The scouts agree: later trials start at rung 0, and few go on."""
    history = run(tmp_path / "l.sqlite", budget=7200.0, **SMALL_DATA)
    assert history.plan is not None
    assert entry_rung(history.plan, history) == 0
    later = [t for t in history.trials.values() if t.trial_id >= SCOUTS and t.started]
    assert len([t for t in later if t.rung == 0]) > len(later) / 2


def test_what_fits_in_no_memory_has_not_competed(tmp_path: Path) -> None:
    """Infeasible trials do not count towards a rung's quota: the others fill it."""
    world = SyntheticWorld(fate=lambda s: "out_of_memory" if s.params["rank"] == 16 else "ok")
    history = run(tmp_path / "l.sqlite", world, budget=3600.0)
    feasible = len(history.at_rung(0))
    promoted = [t for t in history.trials.values() if t.goal >= 1]
    assert history.plan is not None
    assert 1 <= len(promoted) <= -(-feasible // history.plan.eta)


def test_the_time_that_is_left_goes_to_the_runner_up(tmp_path: Path) -> None:
    """Several full runs fit: more than one finalist is trained, and little of the budget is left."""
    history = run(tmp_path / "l.sqlite", budget=7200.0, max_epochs=1)
    assert len(history.full_done) >= 2
    assert history.spent > 0.85 * 7200


@pytest.mark.whole
def test_the_pessimistic_cost_covers_what_was_measured(tmp_path: Path) -> None:
    """Nine in ten of the segments took no longer than it says, and it stays above the expectation."""
    world = SyntheticWorld(slowdown=lambda s: 1.0 + (s.trial_id % 4) / 2)
    history = run(tmp_path / "l.sqlite", world, budget=7200.0, **SMALL_DATA)
    assert history.plan is not None
    costs = CostModel.learn(history.plan, history)
    trained = [(s, r) for s, r in history.results if r.status == "ok"]
    covered = [
        r.seconds["train"] <= costs.train_seconds(s.params, r.tokens - s.start_tokens, pessimistic=True)
        for s, r in trained
    ]
    assert sum(covered) >= 0.9 * len(trained) >= 9
    for segment, _ in trained:
        expected = costs.train_seconds(segment.params, 1000)
        assert costs.train_seconds(segment.params, 1000, pessimistic=True) > expected


@pytest.mark.whole
def test_a_runner_up_without_time_for_a_good_part_of_its_way_does_not_start(tmp_path: Path) -> None:
    """Whatever the budget, every full run after the first was begun with a fifth of its way affordable."""
    starts = 0
    for budget in (3000.0, 4000.0, 5000.0, 6500.0, 8000.0):
        path = tmp_path / f"{budget}.sqlite"
        history = run(path, budget=budget, max_epochs=1)
        assert history.plan is not None
        fulls = [d.job.segments[0] for d in decisions(path) if "starts: tokens" in d.reason]
        for segment in fulls[1:]:
            whole = history.trials[segment.trial_id].trial.rung_tokens[-1] - segment.start_tokens
            assert segment.goal_tokens - segment.start_tokens >= whole / history.plan.eta
            starts += 1
    assert starts


def test_a_configuration_that_costs_more_is_priced_by_its_rank(tmp_path: Path) -> None:
    """Rank 16 takes three times as long: its next segments are planned so, those of rank 4 are not."""
    world = SyntheticWorld(slowdown=lambda s: 3.0 if s.params["rank"] == 16 else 1.0)
    history = run(tmp_path / "l.sqlite", world, budget=7200.0, **SMALL_DATA)
    assert history.plan is not None
    costs = CostModel.learn(history.plan, history)
    seconds = [costs.train_seconds({"quantization": "fp32", "rank": rank}, 1000) for rank in (4, 8, 16)]
    assert seconds == pytest.approx([5.0, 5.0, 15.0])


def test_few_calm_segments_of_a_rank_do_not_make_it_certain(tmp_path: Path) -> None:
    """Other ranks vary fourfold: the pessimistic cost of a calm rank stays as far above its own."""
    world = SyntheticWorld(
        slowdown=lambda s: 1.0 if s.params["rank"] == 4 else (1.0, 1.0, 4.0)[s.trial_id % 3]
    )
    history = run(tmp_path / "l.sqlite", world, budget=7200.0, **SMALL_DATA)
    assert history.plan is not None
    costs = CostModel.learn(history.plan, history)
    calm = {"quantization": "fp32", "rank": 4}
    expected, worst = (costs.train_seconds(calm, 1000, pessimistic=p) for p in (False, True))
    assert expected == pytest.approx(5.0)
    assert worst > 3 * expected


def test_a_space_of_few_configurations_is_tried_once(tmp_path: Path) -> None:
    """Six configurations make six trials, whatever the budget; none is repeated."""
    space = {
        "name": "few",
        "dimensions": {
            "quantization": {"kind": "choice", "values": ["fp32", "nf4"]},
            "rank": {"kind": "choice", "values": [4, 8, 16]},
            "learning_rate": {"kind": "constant", "value": 1e-3},
        },
    }
    history = run(tmp_path / "l.sqlite", budget=7200.0, sampler=OptunaSampler(), space=space, **SMALL_DATA)
    assert history.plan is not None
    assert history.plan.max_trials == len(history.trials) == 6
    assert len({str(t.trial.params) for t in history.trials.values()}) == 6


@dataclass
class Tied(SyntheticWorld):
    """All configurations are equally good but for noise; each example has a difficulty of its own."""

    def loss(self, segment: Segment, tokens: int) -> float:
        """Falls from rung to rung; among equals the earlier trial is a little better."""
        return 1.0 - 0.2 * segment.rung + 1e-4 * segment.trial_id

    def _train(self, segment: Segment, examples: int) -> SegmentResult:
        result = super()._train(segment, examples)
        if result.loss is None:
            return result
        rng = random.Random(f"{segment.trial_id}/{segment.stop_tokens}")
        noise = [rng.gauss(0.0, 0.05) for _ in range(16)]
        mean = sum(noise) / 16
        return replace(result, example_losses=tuple(result.loss + x - mean for x in noise))


def test_a_tie_goes_to_a_rank_or_quantization_that_nobody_has_carried_up(tmp_path: Path) -> None:
    """Losses that the examples cannot tell apart: the promotions cover both quantizations and all ranks."""
    history = run(tmp_path / "l.sqlite", Tied(), budget=5000.0, sampler=OptunaSampler(), max_epochs=1)
    reasons = [d.reason for d in decisions(tmp_path / "l.sqlite") if d.reason.startswith("tie")]
    assert reasons
    told = r"tie: place \d+ of \d+ at rung \d, (-?[\d.]+) from place \d+ with a standard error of ([\d.]+), "
    for gap, error in (re.match(told, reason).groups() for reason in reasons):  # type: ignore[union-attr]
        assert abs(float(gap)) <= float(error)
    promoted = [t.trial.params for t in history.trials.values() if t.goal >= 1]
    assert {p["quantization"] for p in promoted} == {"fp32", "nf4"}
    assert {p["rank"] for p in promoted} == {4, 8, 16}


def test_examples_that_differ_clearly_are_no_tie() -> None:
    """A constant difference on every example is beyond doubt however small; few examples say nothing."""
    losses = [0.5, 1.5, 0.7, 2.0, 1.0, 0.9, 1.1, 0.3]
    assert not indistinguishable(losses, [x + 0.001 for x in losses])
    assert indistinguishable(losses, [x + d for x, d in zip(losses, [0.2, -0.2] * 4, strict=True)])
    assert not indistinguishable(losses[:4], losses[:4])
    assert not indistinguishable((), ())


def test_with_six_full_runs_two_finalists_are_trained(tmp_path: Path) -> None:
    """A budget of six full runs and more keeps room for a second finalist."""
    history = run(tmp_path / "l.sqlite", budget=7200.0, max_epochs=1)
    assert history.plan is not None
    assert history.plan.budget_seconds >= 6 * history.plan.full_seconds
    assert len([t for t in history.trials.values() if t.full_losses]) >= 2


DIMENSIONS = st.fixed_dictionaries(
    {
        "quantization": st.just({"kind": "choice", "values": ["fp32", "nf4"]}),
        "rank": st.sampled_from(
            [
                {"kind": "choice", "values": [4, 8, 16], "ordered": True},
                {"kind": "choice", "values": [8]},
                {"kind": "int", "low": 4, "high": 64, "log": True},
            ]
        ),
        "learning_rate": st.sampled_from(
            [
                {"kind": "float", "low": 1e-4, "high": 1e-2, "log": True},
                {"kind": "choice", "values": [1e-3]},
                {"kind": "float", "low": 1e-4, "high": 1e-2, "prior": {"center": 1e-3, "spread": 0.5}},
            ]
        ),
        "dropout": st.sampled_from(
            [{"kind": "choice", "values": [0.0, 0.05]}, {"kind": "float", "low": 0.01, "high": 0.2}]
        ),
    }
)


@pytest.mark.whole
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dimensions=DIMENSIONS,
    budget=st.floats(300, 6_000),
    rows=st.integers(100, 20_000),
    tail=st.floats(0.0, 2.5),
    seed=st.integers(0, 10_000),
    kill=st.integers(5, 400),
)
def test_random_spaces_heavy_tails_and_kills_keep_the_invariants(
    tmp_path_factory: pytest.TempPathFactory,
    dimensions: dict,
    budget: float,
    rows: int,
    tail: float,
    seed: int,
    kill: int,
) -> None:
    """With the real sampler, segments that take up to ten times their estimate, and a kill -9 anywhere."""

    def slowdown(segment: Segment) -> float:
        draw = random.Random(f"{seed}/{segment.trial_id}/{segment.rung}/{segment.start_tokens}")
        return min(10.0, draw.paretovariate(3.0 - tail))

    world = SyntheticWorld(seed=seed, slowdown=slowdown)
    path = tmp_path_factory.mktemp("run") / "ledger.sqlite"
    more = {
        "space": {"name": "random", "dimensions": dimensions},
        "train_rows": rows,
        "train_tokens": rows * 80,
        "seed": seed,
    }
    first = make_driver(path, world, budget=budget, sampler=OptunaSampler(), **more)

    first.ledger.watch(Killer(kill))
    try:
        history = first.run()
    except Killed:
        first.ledger.close()
        spent = read_history(path).spent
        clock = VirtualClock(spent + 3.0)
        assume(spent + 3.0 < budget)
        second = make_driver(path, world, budget=budget, sampler=OptunaSampler(), clock=clock, **more)
        try:
            history = second.run()
        except BudgetError:
            return
        finally:
            second.ledger.close()
    except BudgetError:
        return  # refused at the start: another test looks at that
    finally:
        first.ledger.close()
    check_invariants(list(read_entries(path)), history, budget)
    finished = any(result.status == "ok" for _, result in history.results)
    assert finished == (history.exported is not None)
