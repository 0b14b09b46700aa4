"""What fits: foreseen, found by the calibration, taught by failures, and never started."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.errors import DeviceError
from budgetsearch.core.events import SegmentEnded, SegmentStarted, TrialAdded
from budgetsearch.core.footprint import Footprint
from budgetsearch.core.history.history import History
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.jobs import calibration_job, new_trial
from budgetsearch.core.policy.planning import make_plan
from budgetsearch.core.ports import Proposal
from budgetsearch.core.records import (
    CalibrateJob,
    Calibration,
    Job,
    Probe,
    Schedule,
    Segment,
    SegmentResult,
    TrainJob,
)
from budgetsearch.core.resources.memory import DOUBT, foresee, plain_positions, problem
from budgetsearch.engines.simulator import Result
from budgetsearch.sampler.sampler import OptunaSampler
from budgetsearch.storage.ledger import MemoryLedger
from tests.support.simulation import RandomSampler, make_driver, request
from tests.support.worlds import SyntheticWorld

RULE = Footprint(fixed=1000.0, per_rank=10.0, per_token=2.0, per_token_recompute=1.0)


def test_foresight_leaves_out_what_cannot_fit() -> None:
    """One row of 100 tokens at rank r needs 1100 + 10 r bytes with checkpointing."""
    limit = math.ceil((1100 + 10 * 64) / DOUBT)
    found = foresee(RULE, limit, (8, 64, 128), 8, 100)
    assert found.ranks == (64, 8)
    assert found.micro_batches == ((0, 1), (2, 4))
    assert not found.refusal


def test_foresight_refuses_with_the_numbers() -> None:
    """Not even the smallest rank: what it needs and what there is."""
    found = foresee(Footprint(30 * 2**30, 1.0, 1.0, 1.0), 8 * 2**30, (8, 16), 8, 100)
    assert found.ranks == ()
    assert "rank 8 needs 30.0 GiB, and there are 8.0 GiB" in found.refusal


@pytest.mark.parametrize(("footprint", "limit"), [(None, 10), (RULE, None)])
def test_where_nothing_is_known_everything_is_tried(footprint: Footprint | None, limit: int | None) -> None:
    """No shape, or no limit: the calibration finds out."""
    assert foresee(footprint, limit, (8, 64), 8, 100).ranks == (64, 8)
    assert foresee(footprint, limit, (8, 64), 8, 100).micro_batches == ()


def test_a_hopeless_quantization_is_never_loaded(tmp_path: Path) -> None:
    """Foreseen as too large: no job, the ledger says why, and the search goes on with the other."""
    large = Footprint(10**12, 1.0, 1.0, 1.0)
    driver = make_driver(
        tmp_path / "l",
        sampler=OptunaSampler(),
        footprints={"fp32": large, "nf4": RULE},
        limit_bytes=10**9,
    )
    history = driver.run()
    assert history.calibrations["fp32"].status == "out_of_memory"
    assert "foreseen" in history.calibrations["fp32"].detail
    assert {state.trial.params["quantization"] for state in history.trials.values()} == {"nf4"}
    assert history.closed is not None
    assert history.closed.state == "finished"


def test_a_model_that_does_not_fit_at_all_is_the_users_to_mend(tmp_path: Path) -> None:
    """Exit code 2 and what to do, before anything was loaded."""
    large = Footprint(10**12, 1.0, 1.0, 1.0)
    driver = make_driver(tmp_path / "l", footprints={"fp32": large, "nf4": large}, limit_bytes=10**9)
    with pytest.raises(DeviceError, match=r"does not fit\. fp32: .*foreseen.*budgetsearch plan"):
        driver.run()


def test_the_calibration_is_told_what_may_fit() -> None:
    """Ranks from the largest on, and where to begin with the micro-batch."""
    job = calibration_job(
        request(footprints={"fp32": RULE}, limit_bytes=2000, ranks=(8, 16), longest=100), "fp32", -1, 60.0
    )
    assert isinstance(job, CalibrateJob)
    assert job.ranks == (16, 8)
    assert job.micro_batches == ((4, 8), (4, 8))


def plan_with(**changes: Any) -> Plan:
    """A plan in which rank 16 is the largest that fits."""
    probe = Probe(1, 2, False, 100, 200.0, 1560)
    found = Calibration(
        "fp32", "ok", 200.0, 0.05, 0.5, 1.0, micro_batch=2, rank=16, probes=(probe,), peak_bytes=1560
    )
    asked = request(
        footprints={"fp32": RULE}, limit_bytes=2100, ranks=(8, 16), longest=100, batch_size=8, **changes
    )
    return make_plan(asked, {"fp32": found}, 10.0)


def params(rank: int, dropout: float = 0.0) -> dict[str, Any]:
    """A configuration."""
    return {"quantization": "fp32", "rank": rank, "learning_rate": 1e-3, "dropout": dropout}


def test_a_larger_rank_than_the_calibration_found_is_infeasible() -> None:
    """What was measured counts."""
    plan = plan_with()
    assert problem(plan, [], params(16)) is None
    assert "16 is the most that fits" in (problem(plan, [], params(32)) or "")


def test_needing_as_much_in_every_respect_is_infeasible_too() -> None:
    """Rank and dropout both count; another quantization says nothing."""
    plan, refused = plan_with(), [params(8, dropout=0.05)]
    assert problem(plan, refused, params(16, dropout=0.1))
    assert problem(plan, refused, params(8, dropout=0.05))
    assert problem(plan, refused, params(16)) is None  # no masks
    assert problem(plan, refused, params(4, dropout=0.05)) is None
    assert problem(plan, refused, {**params(16, 0.05), "quantization": "nf4"}) is None


def test_a_smaller_rank_gets_a_larger_micro_batch_where_it_fits() -> None:
    """The corrected rule: 1000 + 10 r + 200 m bytes within 93% of 2100."""
    plan = plan_with()
    assert plan.footprints["fp32"].bytes(rank=16, tokens=200) == pytest.approx(1560)
    sizes = [new_trial(plan, 0, Proposal(params(rank), "prior")).micro_batch for rank in (16, 8)]
    assert sizes == [2, 4]


def test_only_passes_that_do_not_fit_compute_their_activations_again() -> None:
    """The corrected rule without checkpointing: 1000 + 10 r + 2 positions within 93% of 2100."""
    plan = plan_with()
    assert 0 == plain_positions(plan, params(16))  # 396 are too few to be worth their launches
    plan = replace(plan, footprints={"fp32": replace(plan.footprints["fp32"], per_token=1.0)})
    assert [793, 833] == [plain_positions(plan, params(rank)) for rank in (16, 12)]
    assert 0 == plain_positions(replace(plan, footprints={}), params(16))


def history_of(*ranks: int) -> tuple[MemoryLedger, History]:
    """A history in which trials of these ranks wait."""
    from budgetsearch.core.events import Opened, Planned
    from budgetsearch.engines.simulator import VirtualClock

    ledger, plan = MemoryLedger(), replace(plan_with(), largest_ranks={})
    clock = VirtualClock()
    for event in (Opened(720.0, {}), Planned(plan)):
        ledger.append(event, clock)
    for number, rank in enumerate(ranks):
        ledger.append(TrialAdded(new_trial(plan, number, Proposal(params(rank), "prior"))), clock)
    return ledger, ledger.history


def ended(ledger: MemoryLedger, number: int, **result: Any) -> None:
    """Run one trial to this result."""
    from budgetsearch.engines.simulator import VirtualClock

    trial = ledger.history.trials[number].trial
    segment = Segment(
        trial_id=number,
        params=trial.params,
        seed=0,
        rung=0,
        start_tokens=0,
        stop_tokens=trial.rung_tokens[0],
        schedule=Schedule(0, trial.rung_tokens[0]),
        batch_size=trial.batch_size,
        micro_batch=ledger.history.trials[number].micro_batch,
    )
    job = ledger.history.next_job
    ledger.append(SegmentStarted(job, segment), VirtualClock())
    values = {"status": "ok", "tokens": segment.stop_tokens, **result}
    ledger.append(SegmentEnded(job, SegmentResult(number, 0, **values)), VirtualClock())


def test_an_infeasible_trial_takes_its_like_along() -> None:
    """What waits and needs at least as much never starts; the sampler is not told of it as a loss."""
    ledger, history = history_of(16, 8, 16, 32)
    ended(ledger, 0, status="out_of_memory", micro_batch=1)
    assert [history.trials[n].dead for n in range(4)] == ["infeasible", None, "infeasible", "infeasible"]
    assert [state.trial_id for state in history.candidates] == [1]
    assert history.standing(history.trials[2]) == "infeasible"


def test_a_trial_that_had_to_shrink_teaches_its_like() -> None:
    """Whoever needs as much starts with what was left; whoever needs less does not."""
    ledger, history = history_of(16, 8, 32)
    before = [history.trials[n].micro_batch for n in range(3)]
    ended(ledger, 0, micro_batch=1)
    assert before[1] > 1
    assert [history.trials[n].micro_batch for n in range(3)] == [1, before[1], 1]
    assert history.trials[0].dead is None


class _Small(SyntheticWorld):
    """A card in which nothing above rank 8 fits."""

    def perform(self, job: Job) -> tuple[tuple[Result, ...], float]:
        """See ``World``."""
        if isinstance(job, TrainJob) and any(int(s.params["rank"]) > 8 for s in job.segments):
            raise AssertionError("a configuration that cannot fit was started")
        results, seconds = super().perform(job)
        if isinstance(job, CalibrateJob):
            (found,) = results
            assert isinstance(found, Calibration)
            return (replace(found, rank=8),), seconds
        return results, seconds


@pytest.mark.parametrize("sampler", [RandomSampler(), OptunaSampler()], ids=["random", "own"])
def test_infeasible_configurations_are_never_started(tmp_path: Path, sampler: Any) -> None:
    """In a space of ranks up to 16: our own sampler does not even propose them."""
    history = make_driver(tmp_path / "l", _Small(), sampler=sampler, budget=3600.0).run()
    large = [s for s in history.trials.values() if int(s.trial.params["rank"]) > 8]
    assert all(state.dead == "infeasible" and not state.started for state in large)
    assert any(state.started for state in history.trials.values())
    if isinstance(sampler, OptunaSampler):
        assert not large
    else:
        assert large


@pytest.mark.parametrize(
    "space",
    [
        None,
        {
            "name": "one",
            "dimensions": {
                "quantization": {"kind": "constant", "value": "fp32"},
                "rank": {"kind": "constant", "value": 8},
                "learning_rate": {"kind": "float", "low": 1e-4, "high": 1e-2, "log": True},
            },
        },
    ],
    ids=["several ranks", "one rank"],
)
@pytest.mark.parametrize("full_share", [0.4, 0.9])
def test_a_run_in_which_nothing_fits_ends(
    tmp_path: Path, space: dict[str, Any] | None, full_share: float
) -> None:
    """Every trial runs out of memory all alone: the samples that are ruled out are not endless."""
    world = SyntheticWorld(fate=lambda segment: "out_of_memory")
    changes = {"full_share": full_share} | ({"space": space} if space else {})
    driver = make_driver(tmp_path / "l", world, sampler=OptunaSampler(), **changes)
    if space:
        driver.quantizations = ["fp32"]
    history = driver.run()
    assert history.closed is not None
    assert (history.closed.state, history.incumbent) == ("failed", None)
    assert "fits into memory" in history.closed.reason
    assert len(history.trials) < 80
    assert history.spent <= 720


def test_what_shrank_for_others_teaches_nothing() -> None:
    """It may have its memory back with the next segment."""
    ledger, history = history_of(16, 8, 32)
    before = [history.trials[n].micro_batch for n in range(3)]
    ended(ledger, 0, micro_batch=1, yielded=True)
    assert [history.trials[n].micro_batch for n in range(3)] == before
    assert history.gang_limits == {}
