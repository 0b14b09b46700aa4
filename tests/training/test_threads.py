"""The number of threads that computes fastest, and a machine that is not quiet."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from budgetsearch.core.records import Schedule, Segment, TrainJob, WorkerSetup
from budgetsearch.machine import neighbours
from budgetsearch.machine.neighbours import Neighbours
from budgetsearch.training import threads
from budgetsearch.training.calibrate import spread, unrest
from budgetsearch.training.threads import Threads, fastest, numbers
from budgetsearch.training.workshop import Workshop


class Clock:
    """Passes take as long as the machine says."""

    def __init__(self, seconds: dict[int, list[float]]) -> None:
        self.seconds, self.at, self.turns = seconds, 0.0, list[int]()

    def now(self) -> float:
        """Seconds."""
        return self.at

    def time_pass(self, number: int) -> float:
        """The next pass with so many threads; the last time again and again."""
        some = self.seconds[number]
        took = some.pop(0) if len(some) > 1 else some[0]
        self.at += took
        self.turns.append(number)
        return took


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({2: [0.5], 1: [0.9]}, (2, 1.0)),  # a quiet machine
        ({2: [3.0], 1: [0.6]}, (1, 5.0)),  # one busy core: the two wait for each other
        ({2: [1.0], 1: [0.95]}, (2, 1.0)),  # a little luck
        ({2: [0.9, 0.1], 1: [0.2]}, (2, 1.0)),  # one burst
        ({4: [1.0], 2: [0.5], 1: [0.8]}, (2, 2.0)),
        ({2: [50.0], 1: [10.0]}, (1, 5.0)),  # both have their turn, however long
    ],
)
def test_the_fastest_number_is_found_by_medians(
    seconds: dict[int, list[float]], expected: tuple[int, float]
) -> None:
    """Fewer than all only where that is clearly faster."""
    clock = Clock(seconds)
    found = fastest(clock.time_pass, max(seconds), clock.now)
    assert (expected[0], pytest.approx(expected[1])) == found


def test_what_is_hopeless_gets_no_further_turn_and_the_look_has_an_end() -> None:
    """Three rounds at the most."""
    clock = Clock({8: [0.1], 4: [0.12], 2: [0.5], 1: [0.9]})
    assert (8, 1.0) == fastest(clock.time_pass, 8, clock.now)
    assert [8, 4, 2, 1, 8, 4, 2, 1, 8, 4] == clock.turns
    assert [6, 3, 1] == numbers(6)
    slow = Clock({2: [5.0], 1: [5.0]})
    fastest(slow.time_pass, 2, slow.now)
    assert [2, 1] == slow.turns


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A process with two threads, of which nobody has decided; what they were set to."""
    monkeypatch.delenv(threads.VARIABLE)
    told = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


def segment(number: int) -> Segment:
    """A short one."""
    return Segment(
        trial_id=number,
        params={"quantization": "fp32", "rank": 4, "learning_rate": 1e-3},
        seed=0,
        rung=0,
        start_tokens=0,
        stop_tokens=300,
        schedule=Schedule(0, 300),
        batch_size=4,
        micro_batch=4,
    )


def test_a_worker_looks_again_when_its_rate_falls_and_says_with_what_it_computed(
    setup: WorkerSetup, two: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between segments alone, and each result carries its own number, by which it can be repeated."""
    said, machine = list[Any](), {2: [0.1], 1: [0.2]}
    monkeypatch.setattr(threads, "passes", lambda *_: Clock(machine).time_pass)
    workshop = Workshop(setup, said.append, lambda job: False)

    def train(number: int) -> str:
        job = TrainJob(number, (segment(number),), eval_examples=4, limit_seconds=60.0)
        (result,) = workshop.train(job)
        return result.computed_on["threads"]

    assert "2" == train(0)
    machine.update({2: [3.0], 1: [0.5]})  # another process has come
    assert "2" == train(1)
    kind = ("fp32", 1, False)
    workshop._threads.note(kind, 100.0)
    workshop._threads.note(kind, 40.0)
    assert "1" == train(2)
    texts = [one.text for one in said if hasattr(one, "text")]
    assert ["the CPU computes with 1 of 2 threads, 6.0 times as fast as 2 now"] == texts
    machine.update({2: [0.1], 1: [0.2]})  # and gone
    workshop._threads.note(kind, 100.0)
    assert "1" == train(3)
    workshop._threads.note(kind, 50.0)
    assert "2" == train(4)
    workshop.close()


def test_a_segment_that_is_repeated_computes_with_what_it_had(setup: WorkerSetup, two: list[int]) -> None:
    """Whoever sets the variable has decided, as a reproduction does; a course is never looked at either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(threads.VARIABLE, "2")
        patch.setattr(threads, "passes", lambda *_: pytest.fail("nobody asked"))
        chosen = Threads("cpu", pytest.fail)
        chosen.settle(None, None)  # type: ignore[arg-type]
    assert [2] == two


def test_a_machine_that_is_not_quiet_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores that others keep busy, and steps that differ; a quiet one says nothing."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert "" == unrest(spread([10.0, 11.0, 10.0, 9.0, 10.0]), 0.2)
    assert 0.0 == spread([1.0, 100.0])
    said = unrest(spread([10.0, 2.0, 11.0, 3.0, 10.0, 2.0]), 1.04)
    assert "other processes keep 1.0 of 2 cores busy; equal steps differ by" in said


def test_the_cores_of_others_are_those_that_this_process_did_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds on two cores: half of them idle, four seconds this process's own, six of others."""
    states = iter([(100.0, 200.0, 5.0), (110.0, 220.0, 9.0)])
    monkeypatch.setattr(Neighbours, "_now", staticmethod(lambda: next(states)))
    monkeypatch.setattr(neighbours.os, "cpu_count", lambda: 2)
    assert pytest.approx(0.6) == Neighbours().cores()
