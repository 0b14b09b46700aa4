"""Budgets around the minimum: refused with a number that suffices, or one configuration instead of none."""

from __future__ import annotations

import dataclasses
import math

import pytest

from budgetsearch.core.errors import BudgetError
from budgetsearch.core.events import Noticed
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.history import History
from budgetsearch.core.policy.minimum import as_hours
from budgetsearch.core.records import CalibrateJob, Calibration, Job
from budgetsearch.core.space.space import Space
from budgetsearch.engines.simulator import Result
from budgetsearch.run.driver import Driver
from budgetsearch.run.fields import read_hours
from budgetsearch.sampler.sampler import OptunaSampler
from budgetsearch.views.report.numbers import numbers_of
from budgetsearch.views.tables import final_lines
from tests.support.simulation import check_invariants, make_driver
from tests.support.worlds import SyntheticWorld

SINGLE = "too little time for a search: one configuration"


class Measuring(SyntheticWorld):
    """Calibrations take so many seconds."""

    calibration_seconds = 10.0

    def perform(self, job: Job) -> tuple[tuple[Result, ...], float]:
        """See ``World``."""
        results, seconds = super().perform(job)
        return results, self.calibration_seconds if isinstance(job, CalibrateJob) else seconds

    def interrupt(self, job: Job, share: float) -> tuple[Result, ...] | None:
        """Nobody can stop a calibration that loads."""
        return None if isinstance(job, CalibrateJob) else super().interrupt(job, share)


def played(budget: float, world: SyntheticWorld | None = None) -> tuple[Driver, History]:
    """A run with the sampler of real runs, of which the invariants are checked."""
    driver = make_driver(None, world, budget=budget, sampler=OptunaSampler())
    history = driver.run()
    check_invariants(list(driver.ledger.entries), history, budget)  # type: ignore[attr-defined]
    return driver, history


@pytest.mark.parametrize("rate", [50.0, 200.0, 3000.0])
def test_whatever_is_not_refused_ends_with_an_adapter(rate: float) -> None:
    """With growing budgets: first all are refused, then none is, and each ends in time, scored."""
    refused, accepted = [], []
    for budget in range(20, 300, 4):
        try:
            _, history = played(float(budget), SyntheticWorld(tokens_per_second=rate))
        except BudgetError as error:
            refused.append((budget, error.minimum_seconds))
            continue
        accepted.append(budget)
        assert history.incumbent is not None
        assert history.score is not None
        assert history.score.adapter_loss is not None
    assert max((budget for budget, _ in refused), default=0) < min(accepted)
    assert all(minimum > budget for budget, minimum in refused)


def test_the_number_in_a_refusal_suffices() -> None:
    """A run with the hours that the refusal names ends with an adapter."""
    with pytest.raises(BudgetError, match="--hours") as caught:
        played(30.0)
    hours = str(caught.value).split("--hours ")[1].split()[0]
    assert "s" == hours[-1]
    assert played(float(hours[:-1]))[1].incumbent is not None


@pytest.mark.parametrize(
    ("seconds", "text"), [(35.2, "36s"), (599.5, "600s"), (601.0, "11m"), (8000.0, "2.3h"), (7200.0, "2h")]
)
def test_a_refusal_names_hours_in_the_unit_that_reads_well(seconds: float, text: str) -> None:
    """Never less than it takes, and `--hours` reads it."""
    assert text == as_hours(seconds)
    assert seconds <= 3600 * read_hours(text)


def test_where_time_is_too_short_for_a_search_one_configuration_is_trained() -> None:
    """It is the likeliest one, takes all the time, is evaluated on few examples, and the run says so."""
    driver, history = played(64.0)
    plan = history.plan
    assert plan is not None
    assert plan.single
    assert (plan.max_trials, len(plan.ladder), plan.task_examples) == (1, 2, 0)
    assert plan.eval_examples <= 16
    assert [Space.parse(plan.space).default()] == [dict(s.trial.params) for s in history.trials.values()]
    entries = list(driver.ledger.entries)  # type: ignore[attr-defined]
    told = [e.event.text for e in entries if isinstance(e.event, Noticed)]
    assert [f"{SINGLE} is trained"] == told
    assert f"{SINGLE} was trained" in final_lines(history)
    assert f"{SINGLE} is trained" in final_lines(fold(entries[:-1]))
    assert history.closed is not None
    assert "no time for another" in history.closed.reason
    assert "--max-trials" not in history.closed.reason
    assert numbers_of(entries, history).answer.caveat == f"{SINGLE.capitalize()} was trained."


class Kept:
    """Calibrations of an earlier run; see the port."""

    def __init__(self) -> None:
        self.found: dict[str, Calibration] = {}

    def find(self, quantization: str) -> Calibration | None:
        """See the port."""
        known = self.found.get(quantization)
        return known and dataclasses.replace(known, measured="yesterday")

    def keep(self, found: Calibration) -> None:
        """See the port."""
        self.found[found.quantization] = found


def test_the_next_try_uses_what_the_last_one_measured() -> None:
    """It is written down as always, with its date, costs nothing, and the decisions can be replayed."""
    kept = Kept()
    first, second = (make_driver(None, budget=720.0, sampler=OptunaSampler()) for _ in range(2))
    first.kept = second.kept = kept
    before, after = first.run(), second.run()
    assert {"fp32": "", "nf4": ""} == {n: c.measured for n, c in before.calibrations.items()}
    assert {"fp32": "yesterday", "nf4": "yesterday"} == {n: c.measured for n, c in after.calibrations.items()}
    assert before.charged["calibrate"] > 0
    assert after.charged.get("calibrate", 0.0) == 0
    check_invariants(list(second.ledger.entries), after, 720.0)  # type: ignore[attr-defined]


def test_a_search_says_nothing_of_the_kind() -> None:
    """With time to compare, nothing changes."""
    _, history = played(720.0)
    assert history.plan is not None
    assert not history.plan.single
    assert not any(SINGLE in text for _, text in history.notices)


@pytest.mark.parametrize("slow", [2.0, 5.0, 30.0])
def test_one_configuration_keeps_the_deadline_on_a_machine_that_slows_down(slow: float) -> None:
    """Training that takes many times as long as measured is stopped in time."""
    _, history = played(64.0, SyntheticWorld(slowdown=lambda segment: slow))
    assert history.plan is not None
    assert history.plan.single
    assert history.spent <= 64.0


@pytest.mark.parametrize("seconds", [60.0, math.inf])
def test_a_calibration_that_takes_most_of_the_budget_is_ended_and_the_budget_refused(seconds: float) -> None:
    """Also one that does not hear that it is to stop: the refusal comes before the deadline."""
    world = Measuring()
    world.calibration_seconds = seconds
    driver = make_driver(None, world, budget=60.0, sampler=OptunaSampler())
    with pytest.raises(BudgetError, match="too small"):
        driver.run()
    assert driver.history.spent <= 60.0


def test_what_the_first_quantization_leaves_no_time_for_is_not_measured() -> None:
    """Then the one that is known is trained; the ledger says why the other one is not."""
    world = Measuring()
    world.calibration_seconds = 25.0
    _, history = played(70.0, world)
    assert {"fp32": "ok", "nf4": "timeout"} == {n: c.status for n, c in history.calibrations.items()}
    assert history.incumbent is not None


@pytest.mark.parametrize("rate", [0.0, math.nan, math.inf])
def test_a_calibration_without_a_rate_is_no_measurement(rate: float) -> None:
    """One that was stopped before its first step knows none, and no plan can rest on it."""
    found = played(64.0)[1].calibrations["fp32"]
    assert found.sound
    assert not dataclasses.replace(found, tokens_per_second=rate).sound
