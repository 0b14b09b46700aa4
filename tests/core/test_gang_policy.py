"""Gangs in the policy: who trains beside whom, what that costs, and that no promise is broken by it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from budgetsearch.core.decisions import NeedCandidates, Run
from budgetsearch.core.events import Decided
from budgetsearch.core.history.fold import apply
from budgetsearch.core.history.history import History
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.costs import CostModel
from budgetsearch.core.policy.deadline import seconds_left
from budgetsearch.core.policy.gangs import LEFT_SHARE
from budgetsearch.core.policy.jobs import probe_seconds
from budgetsearch.core.policy.planning import gang_gains, make_plan
from budgetsearch.core.records import Calibration, Job, Probe, Segment, Status, TrainJob
from budgetsearch.core.schedule import rate_factor
from budgetsearch.sampler.sampler import OptunaSampler
from budgetsearch.storage.ledger import read_entries
from budgetsearch.tools.simulate.invariants import check
from tests.support.simulation import SMALL_DATA, Killed, Killer, make_driver, request, run
from tests.support.worlds import SyntheticWorld

GAINS = {2: 1.6, 4: 2.4}


def jobs(path: Path) -> list[TrainJob]:
    """Every job that was decided, in order."""
    events = [entry.event for entry in read_entries(path)]
    return [e.decision.job for e in events if isinstance(e, Decided) and isinstance(e.decision, Run)]


def ganged(
    path: Path, budget: float = 2400.0, world: SyntheticWorld | None = None, **changes: Any
) -> History:
    """A run in a world where gangs of four pay; its invariants are checked, every decision replayed."""
    changes = {"max_gang": 4, **changes}
    history = run(path, world or SyntheticWorld(gains=GAINS), budget=budget, **changes)
    check(read_entries(path), budget, replay=True)
    return history


@pytest.mark.whole
def test_what_pays_trains_together(tmp_path: Path) -> None:
    """Gangs form, never larger than calibrated, of one quantization, and no trial is in one twice."""
    path = tmp_path / "l.sqlite"
    history = ganged(path, budget=7200.0, **SMALL_DATA)
    sizes = [len(job.segments) for job in jobs(path)]
    assert max(sizes) == 4
    assert sum(size > 1 for size in sizes) >= 3
    for job in jobs(path):
        assert len({s.params["quantization"] for s in job.segments}) == 1
        assert len({s.trial_id for s in job.segments}) == len(job.segments)
    assert history.plan is not None
    assert history.plan.gang_gains["nf4"] == pytest.approx((1.0, 1.6, 2.0679700, 2.4))


@pytest.mark.whole
def test_more_trials_are_tried_in_the_same_time(tmp_path: Path) -> None:
    """With gangs that reach 2.4 times the rate the same budget holds clearly more trials."""
    alone = ganged(tmp_path / "a.sqlite", budget=7200.0, max_gang=1, **SMALL_DATA)
    together = ganged(tmp_path / "b.sqlite", budget=7200.0, **SMALL_DATA)
    count = [sum(t.started for t in history.trials.values()) for history in (alone, together)]
    assert count[1] >= 1.3 * count[0]
    assert {len(job.segments) for job in jobs(tmp_path / "a.sqlite")} == {1}


def test_gangs_that_do_not_pay_are_not_formed(tmp_path: Path) -> None:
    """Nothing was calibrated above one: every job has one segment."""
    ganged(tmp_path / "l.sqlite", world=SyntheticWorld())
    assert {len(job.segments) for job in jobs(tmp_path / "l.sqlite")} == {1}


def test_the_full_run_goes_alone(tmp_path: Path) -> None:
    """It wants all the time that is left."""
    path = tmp_path / "l.sqlite"
    history = ganged(path)
    assert history.plan is not None
    top = history.plan.top_rung
    full = [job for job in jobs(path) if any(s.rung == top for s in job.segments)]
    assert full
    assert all(len(job.segments) == 1 for job in full)


def test_candidates_wait_for_their_own_gang_but_not_for_long(tmp_path: Path) -> None:
    """Those of the other quantization are few at any time, and nearly all of them run in the end."""
    path = tmp_path / "l.sqlite"
    history = ganged(path, budget=3600.0)
    waiting, seen = 0, History()
    for entry in read_entries(path):
        apply(seen, entry)
        waiting = max(waiting, len(seen.candidates))
    assert waiting <= 4 + 4
    assert len(history.candidates) <= 4
    begun = [s.trial_id for job in jobs(path) for s in job.segments if s.start_tokens == 0]
    overtaken = [sum(other > one for other in begun[:k]) for k, one in enumerate(begun)]
    assert max(overtaken) <= 2 * 4  # nobody is passed over again and again


def test_costs_are_learned_as_if_alone(tmp_path: Path) -> None:
    """A member's share of a gang's time is multiplied with the gain: the factor stays one."""
    history = ganged(tmp_path / "l.sqlite")
    assert history.plan is not None
    model = CostModel.learn(history.plan, history)
    for name in ("fp32", "nf4"):
        assert model.factors[name, None][0] == pytest.approx(1.0, abs=1e-6)


def test_a_slower_machine_shows_in_gangs_too(tmp_path: Path) -> None:
    """Everything takes 1.5 times as long: the learned factor says so, whatever the gangs gain."""
    world = SyntheticWorld(gains=GAINS, slowdown=lambda s: 1.5)
    path = tmp_path / "l.sqlite"
    history = ganged(path, budget=7200.0, world=world, **SMALL_DATA)
    assert any(len(job.segments) == 4 for job in jobs(path))
    assert history.plan is not None
    model = CostModel.learn(history.plan, history)
    for name in ("fp32", "nf4"):
        assert model.factors[name, None][0] == pytest.approx(1.5, abs=0.01)


@dataclass
class Crowded(SyntheticWorld):
    """More than two at once never fit."""

    def perform(self, job: Job) -> tuple[tuple[Any, ...], float]:
        """The worker shrinks the gang by itself, and says so."""
        results, seconds = super().perform(job)
        if isinstance(job, TrainJob):
            results = tuple(replace(r, gang=min(2, r.gang)) for r in results)
        return results, seconds


def test_a_gang_that_had_to_shrink_is_not_tried_again(tmp_path: Path) -> None:
    """After the first that ran out of memory no job of that quantization is larger than what fitted."""
    path = tmp_path / "l.sqlite"
    history = ganged(path, budget=7200.0, world=Crowded(gains=GAINS), **SMALL_DATA)
    for name in ("fp32", "nf4"):
        sizes = [len(job.segments) for job in jobs(path) if job.quantization == name]
        first = next(i for i, size in enumerate(sizes) if size > 2)
        assert max(sizes[first + 1 :]) <= 2
    assert history.gang_limits == {"fp32": 2, "nf4": 2}


def test_what_crashed_goes_on_alone(tmp_path: Path) -> None:
    """One poisoned trial takes its neighbours down once; then each is tried alone and only it is given up."""

    def fate(segment: Segment) -> Status:
        return "crashed" if poisoned.intersection(current) else "ok"

    poisoned, current = {1}, set[int]()

    class Poisoned(SyntheticWorld):
        def perform(self, job: Job) -> tuple[tuple[Any, ...], float]:
            current.clear()
            if isinstance(job, TrainJob):
                current.update(s.trial_id for s in job.segments)
            return super().perform(job)

    path = tmp_path / "l.sqlite"
    history = ganged(path, world=Poisoned(gains=GAINS, fate=fate))
    assert {n for n, t in history.trials.items() if t.dead} == {1}
    again = [job for job in jobs(path) if any(s.attempt for s in job.segments)]
    assert len(again) >= 2
    assert all(len(job.segments) == 1 for job in again)


def test_a_smaller_micro_batch_is_remembered(tmp_path: Path) -> None:
    """What the worker had to halve is where the trial goes on."""

    class Small(SyntheticWorld):
        def perform(self, job: Job) -> tuple[tuple[Any, ...], float]:
            results, seconds = super().perform(job)
            if isinstance(job, TrainJob):
                results = tuple(replace(r, micro_batch=2) for r in results)
            return results, seconds

    path = tmp_path / "l.sqlite"
    ganged(path, world=Small(gains=GAINS))
    later = [s for job in jobs(path) for s in job.segments if s.start_tokens]
    assert later
    assert {2} == {s.micro_batch for s in later}


def test_members_share_what_one_alone_may_fill_and_get_it_back(tmp_path: Path) -> None:
    """In a gang each begins with what the calibration found to fit beside the others; alone, with its own."""

    class Short(SyntheticWorld):
        def perform(self, job: Job) -> tuple[tuple[Any, ...], float]:
            (*results,), seconds = super().perform(job)
            if isinstance(job, TrainJob):
                sizes = {s.trial_id: s.micro_batch for s in job.segments}
                results = [replace(r, micro_batch=sizes[r.trial_id]) for r in results]
            elif isinstance(results[0], Calibration):
                probes = [replace(p, micro_batch=4 // p.members) for p in results[0].probes]
                results = [replace(results[0], micro_batch=4, probes=tuple(probes))]
            return tuple(results), seconds

    path = tmp_path / "l.sqlite"
    ganged(path, world=Short(gains=GAINS), budget=7200.0, **SMALL_DATA)
    sizes = {(len(job.segments), s.micro_batch) for job in jobs(path) for s in job.segments}
    assert {(1, 4), (4, 1)} <= sizes <= {(1, 4), (2, 2), (3, 1), (4, 1)}


@pytest.mark.whole
@pytest.mark.whole
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    budget=st.floats(300, 4000),
    two=st.floats(1.03, 2.0),
    four=st.floats(1.0, 2.0),
    seed=st.integers(0, 5),
    slow=st.floats(0.5, 3.0),
    bad=st.sets(st.integers(0, 12), max_size=4),
)
def test_no_promise_breaks_whatever_gangs_do(
    tmp_path_factory: pytest.TempPathFactory,
    budget: float,
    two: float,
    four: float,
    seed: int,
    slow: float,
    bad: set[int],
) -> None:
    """Deadline, charges, promotions and replay hold for random gains, speeds and failures."""
    path = tmp_path_factory.mktemp("p") / "l.sqlite"
    world = SyntheticWorld(
        seed=seed,
        gains={2: two, 4: two * four},
        slowdown=lambda segment: slow,
        fate=lambda segment: "diverged" if segment.trial_id in bad else "ok",
    )
    history = run(path, world, budget=budget, seed=seed, max_gang=4)
    check(read_entries(path), budget, replay=True)
    assert history.plan is not None
    for entry in read_entries(path):
        if isinstance(entry.event, Decided) and isinstance(entry.event.decision, Run):
            left = seconds_left(history.plan, entry.event.now)
            assert entry.event.decision.job.limit_seconds <= left
    assert history.incumbent is not None or len(bad) >= 3


@pytest.mark.whole
def test_a_kill_in_a_gang_loses_only_the_running_segments(tmp_path: Path) -> None:
    """Every member starts again from its checkpoint, and the run goes on to its end."""
    path = tmp_path / "l.sqlite"
    whole = ganged(tmp_path / "whole.sqlite", budget=7200.0, **SMALL_DATA)
    entries = list(read_entries(tmp_path / "whole.sqlite"))
    first = next(
        e.seq
        for e in entries
        if isinstance(e.event, Decided)
        and isinstance(e.event.decision, Run)
        and len(e.event.decision.job.segments) == 4
    )
    driver = make_driver(path, SyntheticWorld(gains=GAINS), budget=7200.0, max_gang=4, **SMALL_DATA)
    driver.ledger.watch(Killer(first + 3))
    with pytest.raises(Killed):
        driver.run()
    driver.ledger.close()
    again = make_driver(path, SyntheticWorld(gains=GAINS), budget=7200.0, max_gang=4, **SMALL_DATA)
    history = again.run()
    check(read_entries(path), 7200.0)
    assert history.closed is not None
    assert history.closed.state == "finished"
    assert len(history.trials) >= len(whole.trials) - 4


def test_the_optuna_sampler_proposes_for_gangs_too(tmp_path: Path) -> None:
    """Trials that were proposed while others waited are all different."""
    history = ganged(tmp_path / "l.sqlite", budget=3600.0, sampler=OptunaSampler())
    points = {tuple(sorted(t.trial.params.items())) for t in history.trials.values()}
    assert len(points) == len(history.trials)
    asked = [
        e.event.decision.count
        for e in read_entries(tmp_path / "l.sqlite")
        if isinstance(e.event, Decided) and isinstance(e.event.decision, NeedCandidates)
    ]
    assert set(asked) == {1}


def test_gains_between_two_probes_are_interpolated() -> None:
    """And a probe that was slower than one alone counts as no gain."""
    probes = tuple(Probe(n, 4, False, 64, rate, 0) for n, rate in ((1, 100.0), (2, 90.0), (4, 200.0)))
    found = Calibration("fp32", "ok", 100.0, gang=4, probes=probes)
    assert gang_gains(found) == pytest.approx((1.0, 1.0, 1.5849625, 2.0))
    assert gang_gains(replace(found, gang=1)) == (1.0,)


@pytest.mark.parametrize(("budget", "seconds"), [(720, 1.0), (3600, 3.6), (86400, 20.0)])
def test_longer_budgets_are_calibrated_longer(budget: float, seconds: float) -> None:
    """One per mille for each size, 1 to 20 s."""
    assert probe_seconds(budget) == pytest.approx(seconds)


def test_a_gang_takes_a_part_of_what_is_left(tmp_path: Path) -> None:
    """No gang is planned over more than a quarter of it, its last member aside: first results, and an
    adapter, come soon, and each gang is planned from what the last one took."""
    path = tmp_path / "l.sqlite"
    history = ganged(path, budget=1200.0)
    assert history.plan is not None
    for entry in read_entries(path):
        if isinstance(entry.event, Decided) and isinstance(entry.event.decision, Run):
            segments = entry.event.decision.job.segments
            tokens = [s.stop_tokens - s.start_tokens for s in segments[:-1]]
            rate = history.plan.reference_rates[entry.event.decision.job.quantization]
            left = seconds_left(history.plan, entry.event.now)
            assert len(segments) == 1 or sum(tokens) / rate <= LEFT_SHARE * left


def test_the_cooldown_is_resized_when_the_machine_changes_its_speed(tmp_path: Path) -> None:
    """In the middle of the full run everything takes 1.6 times as long: the end moves, the ledger says so at
    the segment where it happens, and the rate still reaches zero at the last token that is trained."""

    def slowdown(segment: Segment) -> float:
        return 1.6 if segment.schedule.cooldown_tokens and segment.start_tokens > 20_000 else 1.0

    path = tmp_path / "l.sqlite"
    history = run(path, SyntheticWorld(slowdown=slowdown), budget=1800.0)
    events = [e.event for e in read_entries(path) if isinstance(e.event, Decided)]
    full = [
        e.decision
        for e in events
        if isinstance(e.decision, Run) and e.decision.job.segments[0].schedule.cooldown_tokens
    ]
    ends = [d.job.segments[0].schedule.stop_tokens for d in full]
    assert min(ends) < ends[0]
    for before, decision, end in zip(ends, full[1:], ends[1:], strict=False):
        assert (f"the end moves from {before}" in decision.reason) == (end != before)
    done = [history.trials[number] for number in history.full_done]
    assert any(state.tokens >= (state.full_stop_tokens or 0) for state in done)
    for state in done:
        last = next(s for s, _ in reversed(history.results) if s.trial_id == state.trial_id)
        assert rate_factor(last.schedule, last.schedule.stop_tokens) == 0.0


def test_a_full_run_is_evaluated_now_and_then(tmp_path: Path) -> None:
    """Its links write a checkpoint every 60 s; the loss is measured in few of them and at the end, so that it
    takes no more than about 3% of the training's time."""
    path = tmp_path / "l.sqlite"
    history = run(path, SyntheticWorld(overhead_seconds=12.0), budget=3600.0)
    assert history.plan is not None
    top = history.plan.top_rung
    links = [(s, r) for s, r in history.results if s.rung == top]
    measured = [s for s, r in links if r.loss is not None]
    assert len(links) >= 10
    assert len(measured) <= len(links) / 2
    assert all(r.checkpoint_out for _, r in links)
    assert [s.evaluate for s, _ in links] == [r.loss is not None for _, r in links]
    last = {s.trial_id: s for s, _ in links}
    assert all(s.evaluate for s in last.values() if s.stop_tokens == s.schedule.stop_tokens)
    train = sum(r.seconds["train"] for _, r in links)
    evaluate = sum(r.seconds.get("evaluate", 0.0) for _, r in links)
    assert evaluate <= 0.03 * train + 2 * 12.0


def test_the_reserve_for_answers_is_what_they_were_measured_to_take() -> None:
    """Not a flat share of the budget: what the calibration timed and a fifth more, for base and adapter."""
    found = {"fp32": Calibration("fp32", "ok", 200.0, 0.1, 0.5, 1.0, micro_batch=8)}
    flat = make_plan(request(3600.0), found, 30.0)
    timed = make_plan(request(3600.0), {"fp32": replace(found["fp32"], answer_seconds=0.5)}, 30.0)
    slow = make_plan(request(3600.0), {"fp32": replace(found["fp32"], answer_seconds=50.0)}, 30.0)
    assert flat.score_seconds == pytest.approx(0.06 * 3600 + losses_of(flat))
    assert timed.score_seconds == pytest.approx(1.2 * 2 * 32 * 0.5 + losses_of(timed))
    assert slow.score_seconds == pytest.approx(0.06 * 3600 + losses_of(slow))


def losses_of(plan: Plan) -> float:
    """Seconds of the final losses in the reserve: a load, and base and adapter on the subset."""
    return 1.0 + 2 * plan.eval_examples * 0.1 * 1.5


@pytest.mark.parametrize(
    ("budget", "deaf"), [(720.0, False), (1500.0, False), (1500.0, True), (3600.0, True)]
)
def test_one_that_hangs_does_not_take_its_gang_with_it(tmp_path: Path, budget: float, deaf: bool) -> None:
    """The watchdog ends the gang in time, its members go on alone, only the hanging one is given up, and the
    run ends with an adapter."""
    world = SyntheticWorld(
        gains=GAINS, hang=lambda s: s.trial_id == 1, deaf=lambda s: deaf and s.trial_id == 1
    )
    history = ganged(tmp_path / "l.sqlite", budget=budget, world=world)
    assert history.incumbent is not None
    assert {n for n, t in history.trials.items() if t.dead} <= {1}
    assert sum(t.rung >= 0 for t in history.trials.values()) >= 2


def test_memory_that_runs_out_beside_training_makes_gangs_smaller(tmp_path: Path) -> None:
    """A gang that cannot even be set up or evaluated costs no trial: smaller ones are formed."""

    class Tight(SyntheticWorld):
        def perform(self, job: Job) -> tuple[tuple[Any, ...], float]:
            results, seconds = super().perform(job)
            if isinstance(job, TrainJob) and len(job.segments) > 2:
                fate = {"status": "out_of_memory", "tokens": 0, "loss": None, "checkpoint_out": None}
                results = tuple(
                    replace(r, **{**fate, "tokens": s.start_tokens}, gang=len(job.segments))
                    for s, r in zip(job.segments, results, strict=True)
                )
            return results, seconds

    path = tmp_path / "l.sqlite"
    history = ganged(path, budget=7200.0, world=Tight(gains=GAINS), **SMALL_DATA)
    assert not any(t.dead for t in history.trials.values())
    assert set(history.gang_limits.values()) == {2}
    assert sum(len(job.segments) > 2 for job in jobs(path)) <= 2


def test_a_gang_that_gains_more_than_calibrated_makes_nobody_faster_alone(tmp_path: Path) -> None:
    """Its members' shares say nothing about the full run's rate, which stays the calibrated one."""

    class Better(SyntheticWorld):
        def perform(self, job: Job) -> tuple[tuple[Any, ...], float]:
            results, seconds = super().perform(job)
            if isinstance(job, TrainJob) and len(job.segments) > 1:
                results = tuple(
                    replace(r, seconds={**r.seconds, "train": r.seconds["train"] / 2}) for r in results
                )
            return results, seconds

    history = ganged(tmp_path / "l.sqlite", world=Better(gains=GAINS))
    assert history.plan is not None
    model = CostModel.learn(history.plan, history)
    assert all(model.factors[name, None][1] >= 1.0 for name in ("fp32", "nf4"))


def test_where_no_rung_comes_first_the_first_link_is_evaluated(tmp_path: Path) -> None:
    """On a ladder of one rung an adapter with a known loss is there after the first link."""
    world = SyntheticWorld(overhead_seconds=20.0)
    history = run(tmp_path / "l.sqlite", world, budget=3600.0, first_rung=1.0)
    assert history.plan is not None
    assert history.plan.top_rung == 0
    (first, result), *rest = history.results
    assert first.evaluate
    assert result.loss is not None
    assert not all(segment.evaluate for segment, _ in rest)


@pytest.mark.parametrize("budget", [1800.0, 3600.0, 7200.0])
@pytest.mark.parametrize("where", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_the_last_tokens_of_a_full_run_are_evaluated(
    tmp_path: Path, budget: float, where: float, factor: float
) -> None:
    """However much the machine slows down in the full run: nobody has to stop it, and what it trained is
    measured and exported."""

    def slowdown(segment: Segment) -> float:
        full = segment.schedule.cooldown_tokens > 0
        return factor if full and segment.start_tokens > where * segment.schedule.stop_tokens else 1.0

    path = tmp_path / "l.sqlite"
    history = run(path, SyntheticWorld(slowdown=slowdown, overhead_seconds=12.0), budget=budget)
    assert history.full_done
    for number in history.full_done:
        state = history.trials[number]
        assert state.evaluated_tokens == state.tokens
    assert {result.status for segment, result in history.results if segment.landing} == {"ok"}


def reasons_of(event: Decided) -> tuple[str, ...]:
    """Why a decision's segments run."""
    return event.decision.reasons if isinstance(event.decision, Run) else ()


@pytest.mark.parametrize("seed", range(6))
def test_in_a_short_run_nobody_is_passed_over(tmp_path: Path, seed: int) -> None:
    """An hour holds some eight trials in gangs of two: whoever was sampled starts before what was sampled
    later, or at its side, so no configuration waits in vain while others enter."""
    world = SyntheticWorld(tokens_per_second=170.0, gains={2: 1.06}, overhead_seconds=14.0)
    data = {"batch_size": 4, "train_tokens": 145_800, "train_rows": 1800}
    history = ganged(
        tmp_path / "l.sqlite", 3600.0, world, seed=seed, max_gang=8, sampler=OptunaSampler(), **data
    )
    started = [n for n, t in history.trials.items() if t.started]
    waiting = [n for n, t in history.trials.items() if not t.started]
    assert len(started) >= 7
    assert all(number > max(started) for number in waiting)
