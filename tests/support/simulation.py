"""A whole run on virtual time, for the tests of driver and policy."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from budgetsearch.core.events import Entry, Opened
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.policy.request import PlanRequest
from budgetsearch.core.ports import Proposal, Sampler
from budgetsearch.core.space.space import Space
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.run.driver import Driver
from budgetsearch.storage.ledger import Ledger, MemoryLedger, read_entries
from budgetsearch.tools.simulate.invariants import check
from tests.support.worlds import Change, ChangingEngine, SyntheticWorld

SPACE = {
    "name": "test",
    "dimensions": {
        "quantization": {"kind": "choice", "values": ["fp32", "nf4"]},
        "rank": {"kind": "choice", "values": [4, 8, 16], "ordered": True},
        "learning_rate": {"kind": "float", "low": 1e-4, "high": 1e-2, "log": True},
    },
}

SMALL_DATA = {"train_rows": 1000, "train_tokens": 80_000, "max_epochs": 2}


class RandomSampler:
    """Uniform configurations; a pure function of seed and number."""

    def propose(self, history: History, seed: int, first_number: int, count: int) -> list[Proposal]:
        """See the port."""
        assert history.plan is not None
        usable = Space.parse(history.plan.space).quantizations
        return [self._one(seed, number, usable) for number in range(first_number, first_number + count)]

    def _one(self, seed: int, number: int, quantizations: Sequence[str]) -> Proposal:
        rng = random.Random(f"{seed}/{number}")
        params = {
            "quantization": rng.choice(quantizations),
            "rank": rng.choice([4, 8, 16]),
            "learning_rate": 10 ** rng.uniform(-4, -2),
        }
        return Proposal(params, "random")


class Killed(BaseException):
    """Stands for kill -9: nothing of the driver runs after it."""


class Killer:
    """A watcher that kills the run once the ledger has so many entries."""

    def __init__(self, entries: int) -> None:
        self.entries = entries

    def see(self, entry: Entry, history: History) -> None:
        """See the port."""
        if entry.seq >= self.entries:
            raise Killed


class NoExporter:
    """Remembers what it was asked to export."""

    def __init__(self) -> None:
        self.exported: list[tuple[int, str | None, bool]] = []

    def export(self, history: History, state: TrialState, *, final: bool) -> str:
        """See the port."""
        self.exported.append((state.trial_id, state.best_checkpoint, final))
        return "adapter"

    def damage(self, state: TrialState) -> str:
        """See the port."""
        return ""

    def stands(self, checkpoint: str) -> bool:
        """See the port."""
        return bool(self.exported) and self.exported[-1][1] == checkpoint

    def missing(self, names: Iterable[str]) -> dict[str, str]:
        """See the port."""
        return {}

    def sweep(self, history: History) -> None:
        """See the port."""


def request(budget: float = 720.0, **changes: object) -> PlanRequest:
    """A plan request for the synthetic world."""
    values: dict[str, object] = {
        "budget_seconds": budget,
        "gpu": "cpu",
        "space": SPACE,
        "seed": 0,
        "eta": 5,
        "first_rung": None,
        "full_share": 0.4,
        "max_epochs": 4,
        "eval_share": 0.08,
        "batch_size": 8,
        "train_tokens": 160_000,
        "train_rows": 2_000,
        "valid_rows": 200,
        "task_examples": 32,
        "max_trials": 200,
    }
    return PlanRequest(**{**values, **changes})  # type: ignore[arg-type]


def make_driver(
    path: Path | None,
    world: SyntheticWorld | None = None,
    *,
    budget: float = 720.0,
    slots: int = 1,
    node_changes: Sequence[Change] = (),
    clock: VirtualClock | None = None,
    sampler: Sampler | None = None,
    **changes: object,
) -> Driver:
    """A driver on virtual time with its ledger at ``path``, or in memory."""
    clock = clock or VirtualClock(2.0)
    ledger = Ledger(path) if path is not None else MemoryLedger()
    return Driver(
        ledger=ledger,
        engine=ChangingEngine(world or SyntheticWorld(), clock, slots, node_changes),
        sampler=sampler or RandomSampler(),
        exporter=NoExporter(),
        clock=clock,
        request=request(budget, **changes),
        opened=Opened(budget, {}),
        quantizations=["fp32", "nf4"],
    )


def check_invariants(entries: list[Entry], history: History, budget: float) -> None:
    """What must hold for every run, whatever happened in it."""
    assert history.closed is not None
    assert history.spent <= budget, "the deadline was passed"
    assert math.isclose(sum(history.charged.values()), history.spent, abs_tol=1e-6), "a second is lost"
    assert history.running == {}, "a segment is lost"
    seen: dict[int, int] = {}
    for segment, result in history.results:
        assert segment.start_tokens == seen.get(segment.trial_id, 0), "tokens are trained twice or left out"
        if result.checkpoint_out:
            seen[segment.trial_id] = result.tokens
    check(entries, budget, replay=True)


def run(path: Path, world: SyntheticWorld | None = None, budget: float = 720.0, **more: object) -> History:
    """Run to the end and check the invariants."""
    driver = make_driver(path, world, budget=budget, **more)  # type: ignore[arg-type]
    history = driver.run()
    driver.ledger.close()
    check_invariants(list(read_entries(path)), history, budget)
    return history


"""So little that an hour of the synthetic machine holds several full runs."""
