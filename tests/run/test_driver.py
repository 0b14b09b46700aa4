"""The loop on virtual time: deadline, charges, replay, interruption, faults."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from budgetsearch.core.decisions import NeedCandidates, Run
from budgetsearch.core.errors import BudgetError, EngineError, LedgerError
from budgetsearch.core.events import Charged, Decided, SegmentStarted
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.retention import needed_checkpoints
from budgetsearch.core.policy.situation import RULED_OUT
from budgetsearch.core.records import Job, Segment
from budgetsearch.core.resources.disk import RUNNERS_UP
from budgetsearch.core.schedule import rate_factor
from budgetsearch.engines.simulator import Result, VirtualClock
from budgetsearch.sampler.sampler import OptunaSampler
from budgetsearch.storage.ledger import Ledger, read_entries, read_history
from budgetsearch.storage.seals import FORMAT
from tests.support.simulation import Killed, Killer, check_invariants, make_driver, run
from tests.support.worlds import SyntheticWorld


def test_a_run_searches_promotes_and_trains_one_trial_in_full(tmp_path: Path) -> None:
    """720 s at the speed of a small CPU: at least 6 trials, of which the best runs in full.

    Its end is fixed where the cooldown begins, with a margin for the last fifth: at least 95% of R.
    """
    history = run(tmp_path / "ledger.sqlite")
    plan = history.plan
    assert plan is not None
    assert history.closed is not None
    assert history.closed.state == "finished"
    assert len(history.at_rung(0)) >= 6
    assert len(history.at_rung(1)) >= 1
    assert len(history.full_done) >= 1
    winner = history.trials[history.full_done[0]]
    assert winner.rung == plan.top_rung
    assert winner.tokens == winner.full_stop_tokens
    assert winner.tokens >= 0.95 * winner.trial.rung_tokens[plan.top_rung]
    assert history.incumbent is winner
    assert history.spent > 0.7 * 720, "the budget was left unused"


class Respawning(SyntheticWorld):
    """Where a worker has died, the next one takes 30 s to start, before its segment begins."""

    crashed = False

    def perform(self, job: Job) -> tuple[tuple[Result, ...], float]:
        """See ``World``."""
        results, seconds = super().perform(job)
        start = 30.0 if self.crashed else 0.0
        self.crashed = any(result.status == "crashed" for result in results)
        return results, seconds + start


def test_the_start_of_a_worker_after_a_crash_is_no_cost_of_every_segment(tmp_path: Path) -> None:
    """On a short budget with few segments it would make each of them look too dear to begin."""
    world = Respawning(fate=lambda s: "crashed" if (s.trial_id, s.attempt, s.rung) == (1, 0, 0) else "ok")
    history = run(tmp_path / "ledger.sqlite", world, budget=400.0)
    assert history.charged["crash"] >= 30.0
    assert history.charged.get("idle", 0.0) < 5.0
    assert history.plan is not None
    assert history.plan.top_rung in [history.trials[number].rung for number in history.full_done]


def test_promotions_are_the_best_of_their_rung(tmp_path: Path) -> None:
    """Every trial that went beyond the first rung was in its top ceil(n / eta)."""
    history = run(tmp_path / "ledger.sqlite", budget=3600.0)
    entered = history.at_rung(0)
    quota = math.ceil(len(entered) / 5)
    promoted = {t.trial_id for t in history.trials.values() if t.goal > 0}
    assert promoted <= {t.trial_id for t in entered[:quota]}


def test_the_cooldown_of_the_full_run_ends_at_its_last_token(tmp_path: Path) -> None:
    """The last link of a full run stops where its schedule reaches zero, a fifth of it long; between
    links the rate of learning does not jump."""
    history = run(tmp_path / "ledger.sqlite")
    links = [pair for pair in history.results if pair[0].trial_id == history.full_done[0] and pair[0].landing]
    flown = [(segment.flown(result.revisions), result) for segment, result in links]
    segment, result = flown[-1]
    assert segment.schedule.stop_tokens == segment.stop_tokens == result.tokens
    assert 0.15 <= segment.schedule.cooldown_tokens / segment.stop_tokens <= 0.3
    assert len(links) > 1
    for (before, ended), (after, _) in pairwise(flown):
        there = [rate_factor(one.schedule, ended.tokens) for one in (before, after)]
        assert there[0] == pytest.approx(there[1], abs=0.02)


@pytest.mark.parametrize("slots", [2, 5])
def test_several_slots_keep_the_invariants(tmp_path: Path, slots: int) -> None:
    """With more than one slot the deadline holds, no token is trained twice, and decisions replay."""
    driver = make_driver(tmp_path / "ledger.sqlite", slots=slots)
    history = driver.run()
    driver.ledger.close()
    check_invariants(list(read_entries(tmp_path / "ledger.sqlite")), history, 720.0)
    assert history.incumbent is not None


def test_a_budget_below_the_minimum_is_refused_with_the_minimum(tmp_path: Path) -> None:
    """The error names the hours that would do, and a run of that length then works."""
    with pytest.raises(BudgetError, match=r"--hours \d+s or more") as caught:
        make_driver(tmp_path / "a.sqlite", budget=35.0).run()
    enough = caught.value.minimum_seconds * 1.1
    assert run(tmp_path / "b.sqlite", budget=enough).closed is not None


def test_a_diverged_trial_is_counted_and_never_promoted(tmp_path: Path) -> None:
    """Trial 0 diverges: it keeps no loss, and another trial wins."""
    world = SyntheticWorld(fate=lambda s: "diverged" if s.trial_id == 0 else "ok")
    history = run(tmp_path / "ledger.sqlite", world)
    assert history.trials[0].dead == "diverged"
    assert history.trials[0].losses == {}
    assert history.incumbent is not None
    assert history.incumbent.trial_id != 0


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(tmp_path: Path) -> None:
    """A segment that does not fit is issued again with half the micro-batch and the same batch."""
    world = SyntheticWorld(fate=lambda s: "out_of_memory" if s.micro_batch > 2 else "ok")
    history = run(tmp_path / "ledger.sqlite", world)
    mine = [segment for segment, _ in history.results if segment.trial_id == 0]
    assert [8, 4, 2] == [segment.micro_batch for segment in mine[:3]]
    assert {8} == {segment.batch_size for segment in mine}
    assert history.incumbent is not None


def test_a_configuration_that_fits_at_no_micro_batch_is_infeasible(tmp_path: Path) -> None:
    """Rank 16 never fits: such trials are infeasible, and the run goes on without them."""
    world = SyntheticWorld(fate=lambda s: "out_of_memory" if s.params["rank"] == 16 else "ok")
    history = run(tmp_path / "ledger.sqlite", world)
    big = [t for t in history.trials.values() if t.trial.params["rank"] == 16 and t.started]
    assert big
    assert all(t.dead == "infeasible" for t in big)
    assert history.incumbent is not None


def test_a_ladder_of_one_rung_uses_the_whole_budget(tmp_path: Path) -> None:
    """Without a first rung to choose from, one configuration after the other runs in full."""
    few = {"train_rows": 250, "train_tokens": 20_000, "max_epochs": 1}
    history = run(tmp_path / "ledger.sqlite", first_rung=1.0, **few)
    assert len(history.full_done) >= 3
    assert history.spent > 0.6 * 720


def test_on_a_ladder_of_one_rung_a_diverged_trial_is_not_the_end(tmp_path: Path) -> None:
    """Another configuration takes its place."""
    world = SyntheticWorld(fate=lambda s: "diverged" if s.trial_id == 0 else "ok")
    history = run(tmp_path / "ledger.sqlite", world, budget=180.0)
    assert history.trials[0].dead == "diverged"
    assert history.incumbent is not None


@pytest.mark.parametrize("factor", [5.0, 8.0, 10.0])
def test_a_machine_that_is_slower_than_calibrated_still_delivers(tmp_path: Path, factor: float) -> None:
    """Everything takes many times as long: segments that were stopped for it teach the cost model."""
    history = run(tmp_path / "ledger.sqlite", SyntheticWorld(slowdown=lambda s: factor), budget=1800.0)
    assert history.incumbent is not None


def test_losing_trials_give_up_their_checkpoints(tmp_path: Path) -> None:
    """Once promotions began, only the promoted ones and a few behind them keep theirs."""
    history = run(tmp_path / "ledger.sqlite", budget=3600.0)
    assert history.incumbent is not None
    assert needed_checkpoints(history) == {history.incumbent.best_checkpoint}
    history.closed = None
    assert history.plan is not None
    entered = sum(1 for t in history.trials.values() if t.started)
    behind = max(RUNNERS_UP, int(3600 / history.plan.full_seconds))
    quota = math.ceil(entered / 5)
    assert len(needed_checkpoints(history)) <= quota + behind + 1  # the best one, if an older checkpoint


def test_a_quantization_that_cannot_be_calibrated_is_never_sampled(tmp_path: Path) -> None:
    """nf4 fails to load: the plan's space holds only fp32, and the search goes on with it."""
    world = SyntheticWorld(broken=("nf4",))
    history = run(tmp_path / "ledger.sqlite", world, sampler=OptunaSampler())
    assert history.plan is not None
    assert list(history.plan.reference_rates) == ["fp32"]
    assert {t.trial.params["quantization"] for t in history.trials.values()} == {"fp32"}


def test_no_usable_quantization_is_an_error_that_says_why(tmp_path: Path) -> None:
    """Every calibration fails: the details of each are in the message, and the run is closed."""
    driver = make_driver(tmp_path / "ledger.sqlite", SyntheticWorld(broken=("nf4", "fp32")))
    with pytest.raises(EngineError, match=r"fp32: crashed broken; nf4: crashed broken"):
        driver.run()
    assert driver.history.closed is not None
    assert driver.history.closed.state == "failed"
    driver.ledger.close()


def test_a_crashed_segment_is_issued_again_once(tmp_path: Path) -> None:
    """Trial 1 crashes on every attempt: two attempts, then it is given up."""
    world = SyntheticWorld(fate=lambda s: "crashed" if s.trial_id == 1 else "ok")
    history = run(tmp_path / "ledger.sqlite", world)
    assert [0, 1] == [s.attempt for s, _ in history.results if s.trial_id == 1]
    assert history.trials[1].dead == "crashed"


def test_a_hanging_segment_cannot_pass_the_deadline(tmp_path: Path) -> None:
    """A segment that never ends by itself is stopped at its limit; its trial is given up."""
    world = SyntheticWorld(hang=lambda s: s.trial_id == 0)
    history = run(tmp_path / "ledger.sqlite", world)
    assert history.trials[0].dead == "timeout"
    assert history.incumbent is not None


def test_a_hanging_and_deaf_segment_is_killed_within_the_reserve(tmp_path: Path) -> None:
    """The full run never ends and does not react: it is killed, and the deadline still holds."""
    world = SyntheticWorld(hang=lambda s: s.schedule.cooldown_tokens > 0, deaf=lambda s: True)
    history = run(tmp_path / "ledger.sqlite", world)
    assert "crashed" in {result.status for _, result in history.results}
    assert history.exported is not None


def test_answers_that_fail_leave_the_losses(tmp_path: Path) -> None:
    """The accuracy's job dies: base and adapter loss are recorded all the same."""
    history = run(tmp_path / "ledger.sqlite", SyntheticWorld(mute=True))
    assert history.score is not None
    assert (history.score.base_loss, history.score.adapter_loss) == (3.0, 1.0)
    assert history.score.base_accuracy is None
    assert "mute" in history.score.detail


def test_nothing_works_then_the_run_says_so(tmp_path: Path) -> None:
    """If every segment crashes the run ends as failed, before its deadline, without an adapter."""
    history = run(tmp_path / "ledger.sqlite", SyntheticWorld(fate=lambda s: "crashed"))
    assert history.closed is not None
    assert history.closed.state == "failed"
    assert history.incumbent is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    budget=st.floats(90, 5_000),
    slow=st.lists(st.sampled_from([0.7, 1.0, 1.0, 1.0, 1.3, 3.0, 10.0]), min_size=1, max_size=12),
    fates=st.lists(
        st.sampled_from(["ok", "ok", "ok", "ok", "diverged", "out_of_memory", "crashed"]),
        min_size=1,
        max_size=12,
    ),
    rows=st.integers(50, 50_000),
)
def test_whatever_happens_the_deadline_holds(
    tmp_path_factory: pytest.TempPathFactory, budget: float, slow: list[float], fates: list[str], rows: int
) -> None:
    """Random budgets, data sizes, slowdowns up to ten times and failures: the invariants hold, and
    once a segment has finished there is an adapter."""

    def slowdown(segment: Segment) -> float:
        return float(slow[(segment.trial_id + segment.rung) % len(slow)])

    def fate(segment: Segment) -> str:
        key = segment.trial_id * 7 + segment.rung * 3 + segment.attempt + segment.micro_batch
        return fates[key % len(fates)]

    world = SyntheticWorld(slowdown=slowdown, fate=fate)  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("run") / "ledger.sqlite"
    driver = make_driver(path, world, budget=budget, train_rows=rows, train_tokens=rows * 80)
    try:
        history = driver.run()
    except BudgetError:
        return  # refused at the start: another test looks at that
    finally:
        driver.ledger.close()
    check_invariants(list(read_entries(path)), history, budget)
    finished = any(result.status == "ok" for _, result in history.results)
    assert finished == (history.exported is not None)
    if not finished:
        tried_all = len(history.trials) >= driver.request.max_trials
        last = list(history.trials.values())[-RULED_OUT:]
        tried_all |= all(state.dead == "infeasible" for state in last)  # what is left needs as much memory
        assert tried_all or history.spent > 0.3 * budget, "given up with the budget unused"


# ------------------------------------------------------------------ stop and resume


@pytest.mark.parametrize("after", [15.0, 40.0, 130.0, 400.0, 600.0])
def test_a_stopped_run_resumes_and_ends_like_any_other(tmp_path: Path, after: float) -> None:
    """A clean stop at any time: the time between the processes is not charged, nothing is lost."""
    path = tmp_path / "ledger.sqlite"
    clock = VirtualClock(2.0)
    first = make_driver(path, clock=clock)
    first.stop_requested = lambda: "SIGTERM" if clock.now() > after else ""
    history = first.run()
    first.ledger.close()
    assert history.closed is not None
    assert history.closed.state == "interrupted"
    second = make_driver(path, clock=VirtualClock(history.spent + 3.0))
    history = second.run()
    second.ledger.close()
    check_invariants(list(read_entries(path)), history, 720.0)
    assert history.closed is not None
    assert history.closed.state == "finished"


@pytest.mark.parametrize("entries", [3, 8, 11, 17, 31, 47])
def test_a_killed_run_loses_at_most_the_running_segment(tmp_path: Path, entries: int) -> None:
    """Killed after any entry: the segment under way starts again from its checkpoint, and what had
    passed is charged as a crash."""
    path = tmp_path / "ledger.sqlite"
    first = make_driver(path)

    first.ledger.watch(Killer(entries))
    with pytest.raises(Killed):
        first.run()
    first.ledger.close()
    before = read_history(path)
    lost = [s for segments in before.running.values() for s in segments]
    second = make_driver(path, clock=VirtualClock(before.spent + 3.0))
    history = second.run()
    second.ledger.close()
    check_invariants(list(read_entries(path)), history, 720.0)
    after = [e.event for e in read_entries(path) if e.seq > entries]
    uncharged = before.spent - sum(before.charged.values())
    charged = sum(e.seconds for e in after if isinstance(e, Charged) and e.phase == "crash")
    assert math.isclose(charged, uncharged, abs_tol=1e-6)
    again = [e.segment for e in after if isinstance(e, SegmentStarted)]
    for segment in lost:
        assert segment in again


# ------------------------------------------------------------------------ the ledger


def test_the_ledger_refuses_to_change_or_delete(tmp_path: Path) -> None:
    """The file itself enforces that events are only ever added."""
    import sqlite3

    run(tmp_path / "ledger.sqlite")
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    for statement in ("UPDATE events SET at = 0", "DELETE FROM events"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    connection.close()


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    """Garbage in the file gives an error with its path, not a traceback from SQLite."""
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite is damaged"):
        Ledger(path)


def test_the_history_read_back_equals_the_one_in_memory(tmp_path: Path) -> None:
    """Encoding and decoding every event loses nothing."""
    history = run(tmp_path / "ledger.sqlite")
    again = fold(read_entries(tmp_path / "ledger.sqlite"))
    assert history.trials == again.trials
    assert history.plan == again.plan
    assert history.charged == again.charged


def test_the_first_decisions_ask_for_a_candidate_and_run_it(tmp_path: Path) -> None:
    """The ledger starts with a question to the sampler, then a segment at rung 0."""
    run(tmp_path / "ledger.sqlite")
    decisions = [
        e.event.decision for e in read_entries(tmp_path / "ledger.sqlite") if isinstance(e.event, Decided)
    ]
    assert isinstance(decisions[0], NeedCandidates)
    assert isinstance(decisions[1], Run)
    assert decisions[1].job.segments[0].rung == 0


def test_a_ledger_of_another_format_is_refused(tmp_path: Path) -> None:
    """Its plans have other fields: the message names both formats, and nothing is written."""
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={FORMAT + 1}")
    with pytest.raises(
        LedgerError, match=f"has format {FORMAT + 1}, and this version of budgetsearch has {FORMAT}"
    ):
        Ledger(path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (FORMAT + 1,)
