"""The policy on recorded curves (the real driver and sampler, in virtual time), and random search."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from budgetsearch.core.events import Opened
from budgetsearch.core.history.history import History
from budgetsearch.core.ladders import ladders_for, scouts_for
from budgetsearch.core.plan import Plan
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.ports import Proposal, Sampler
from budgetsearch.core.records import Calibration
from budgetsearch.core.space.space import Space
from budgetsearch.engines.simulator import SimulatorEngine, VirtualClock
from budgetsearch.run.driver import Driver
from budgetsearch.run.incumbent import NoExport
from budgetsearch.sampler.sampler import OptunaSampler
from budgetsearch.storage.ledger import MemoryLedger
from budgetsearch.tools.simulate.curves import Curves
from budgetsearch.tools.simulate.invariants import check
from budgetsearch.tools.simulate.world import CurveWorld, Trace

ETA = 5
FULL_RUN_SECONDS = 360.0
"""Virtual seconds of a mean full run: long beside the driver's polling, short enough to simulate fast."""
RESERVE_SECONDS = 1.0
"""The watchdog looks twice a second."""


@dataclass
class OnCurves:
    """A sampler whose every proposal is replaced by what the curves hold; see the port ``Sampler``."""

    sampler: Sampler
    curves: Curves

    def propose(self, history: History, seed: int, first_number: int, count: int) -> list[Proposal]:
        """The sampler's proposals, each moved to the nearest configuration that is free."""
        taken: set[int] = set()
        for state in history.trials.values():
            taken.add(self.curves.nearest(state.trial.params, set())[1])
        found = []
        for proposal in self.sampler.propose(history, seed, first_number, count):
            params, number = self.curves.nearest(proposal.params, taken)
            taken.add(number)
            length = len(self.curves.curve(params)[0])
            found.append(Proposal(params, proposal.origin, length, proposal.entry))
        return found


def plan_for(curves: Curves, multiple: float, seed: int) -> Plan:
    """The plan of a budget of ``multiple`` mean full runs."""
    # Like a rung of too few steps, one below the first recorded point cannot be.
    ladders = ladders_for(multiple, None, ETA, curves.own_lengths)
    shares = next((shares for shares in ladders if shares[0] * curves.points >= 1), ladders[-1])
    scale = FULL_RUN_SECONDS / curves.mean_cost
    ladder = tuple(FULL_RUN_SECONDS * share for share in shares)
    budget = multiple * FULL_RUN_SECONDS
    return Plan(
        budget_seconds=budget,
        gpu="simulated",
        space=curves.space,
        seed=seed,
        eta=ETA,
        ladder=ladder,
        reference_rates={"any": 1.0 / (curves.point_cost * scale)},
        micro_batches={"any": 1},
        overheads={"any": 0.0},
        checkpoint_seconds={"any": 0.0},
        load_seconds={"any": 0.0},
        max_tokens=curves.points,
        batch_size=1,
        step_tokens=1.0,
        eval_examples=1,
        task_examples=0,
        reserve_seconds=RESERVE_SECONDS,
        score_seconds=0.0,
        checkpoint_every_seconds=10.0 * FULL_RUN_SECONDS,
        max_trials=curves.count,
        scouts=scouts_for(shares, multiple),
    )


def play(curves: Curves, multiple: float, seed: int, sampler: Sampler | None = None) -> Trace:
    """What the policy sees within ``multiple`` mean full runs.

    Raises:
        InvariantError: the run broke a promise of the policy; a bug.
    """
    plan = plan_for(curves, multiple, seed)
    clock = VirtualClock()
    world = CurveWorld(curves, clock, FULL_RUN_SECONDS / curves.mean_cost)
    ledger = MemoryLedger()

    def planner(request: PlanRequest, calibrations: Mapping[str, Calibration], now: float) -> Plan:
        return plan

    driver = Driver(
        ledger=ledger,
        engine=SimulatorEngine(world, clock),
        sampler=OnCurves(sampler or OptunaSampler(), curves),
        exporter=NoExport(),
        clock=clock,
        request=_request(plan, curves),
        opened=Opened(plan.budget_seconds, {}),
        quantizations=["any"],
        planner=planner,
    )
    driver.run()
    check(ledger.entries, plan.budget_seconds)
    return world.trace


def play_random(curves: Curves, multiple: float, seed: int) -> Trace:
    """What random configurations show within ``multiple`` mean full runs, each run to its end."""
    space, rng = Space.parse(curves.space), random.Random(seed)
    deadline, now, taken, trace = multiple * curves.mean_cost, 0.0, set[int](), Trace()
    while now < deadline and curves.left(taken):
        unit = {name: rng.random() for name in space.searched}
        params, number = curves.nearest(space.from_unit(unit), taken)
        taken.add(number)
        begun = now
        for seconds, value in zip(*curves.curve(params), strict=True):
            now = begun + float(seconds)
            if now > deadline or not math.isfinite(value):
                break
            trace.moments.append((now, float(value)))
    return trace


def _request(plan: Plan, curves: Curves) -> PlanRequest:
    return PlanRequest(
        budget_seconds=plan.budget_seconds,
        gpu=plan.gpu,
        space=plan.space,
        seed=plan.seed,
        eta=plan.eta,
        first_rung=plan.ladder[0] / plan.ladder[-1],
        full_share=1.0,
        max_epochs=1.0,
        eval_share=0.0,
        batch_size=1,
        train_tokens=curves.points,
        train_rows=curves.points,
        valid_rows=1,
        task_examples=0,
        max_trials=plan.max_trials,
    )
