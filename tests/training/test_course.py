"""A job done once can be done again to the bit: its course stands in the result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from budgetsearch.core.course import Stint
from budgetsearch.core.records import Schedule, Segment, SegmentResult
from budgetsearch.machine.host import processor
from budgetsearch.training import checkpoints
from budgetsearch.training.bases import load_base
from budgetsearch.training.machine import computed_on
from budgetsearch.training.members import OWN, Shop
from budgetsearch.training.recipe import train_gang

STOP = 900


@pytest.fixture
def base(tiny_model: Path) -> Any:
    """The tiny model in fp32, where the order of a sum shows."""
    return load_base(str(tiny_model), "fp32", "cpu")


def trial(number: int, **changes: Any) -> Segment:
    """One of several unlike trials; they leave their gang at different times."""
    params = {
        "quantization": "fp32",
        "rank": (4, 2, 7)[number],
        "learning_rate": (1e-2, 3e-3, 2e-2)[number],
        "dropout": (0.1, 0.0, 0.05)[number],
    }
    segment = Segment(
        trial_id=number,
        params=params,
        seed=100 + number,
        rung=0,
        start_tokens=0,
        stop_tokens=STOP + 300 * number,
        schedule=Schedule(200, 5000),
        batch_size=(4, 6, 2)[number],
        micro_batch=(4, 2, 1)[number],
        evaluate=False,
    )
    return dataclasses.replace(segment, **changes)


def state_of(shop: Shop, result: SegmentResult) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds."""
    return checkpoints.load(shop.checkpoint_path / str(result.checkpoint_out)).tensors


def assert_same(shop: Shop, known: SegmentResult, again: SegmentResult, before: dict[str, Any]) -> None:
    """Same tokens, same losses, and the same bits in weights, average and moments."""
    after = state_of(shop, again)
    assert (known.tokens, known.steps, known.train_loss) == (again.tokens, again.steps, again.train_loss)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def repeated(base: Any, shop: Shop, segments: list[Segment], known: list[SegmentResult]) -> None:
    """Each member of the job equals itself when the job is done by its course."""
    states = [state_of(shop, result) for result in known]
    again = train_gang(base, segments, shop, 4, course=known[0].course)
    for one, other, before in zip(known, again, states, strict=True):
        assert_same(shop, one, other, before)


def test_a_gang_whose_members_leave_one_by_one(base: Any, shop: Shop) -> None:
    """The course names who trained side by side and for how many passes, and leads to the same bits."""
    segments = [trial(n) for n in (0, 1, 2)]
    known = train_gang(base, segments, shop, 4)
    course = known[0].course
    assert [(0, 1, 2), 2, 1] == [course[0].trial_ids, len(course[1].trial_ids), len(course[2].trial_ids)]
    assert course == known[1].course
    assert not any(stint.cut for stint in course)
    repeated(base, shop, segments, known)


def test_a_gang_that_shrank_because_memory_was_full(base: Any, shop: Shop) -> None:
    """Fewer at a time, then smaller micro-batches, at the very passes at which it happened, dropping what was
    not complete; the second time memory is never full."""
    calls = [0]

    def pressed() -> str:
        calls[0] += 1
        return OWN if calls[0] in (3, 5, 8) else ""

    segments = [trial(n) for n in (0, 1)]
    known = train_gang(base, segments, dataclasses.replace(shop, pressed=pressed), 4)
    cut = [stint for stint in known[0].course if stint.cut]
    assert [((0, 1), 3), ((1,), 1)] == [(stint.trial_ids, stint.passes) for stint in cut]
    assert known[0].course[-1].micro_batches == (1,)
    repeated(base, shop, segments, known)


def test_a_job_that_was_told_to_stop(base: Any, shop: Shop) -> None:
    """It ends at the same token, although nobody tells it to stop the second time."""
    calls = [0]

    def stopping() -> bool:
        calls[0] += 1
        return calls[0] > 5

    segments = [trial(n, stop_tokens=50_000) for n in (0, 1)]
    known = train_gang(base, segments, dataclasses.replace(shop, stopping=stopping), 4)
    assert {"cancelled"} == {result.status for result in known}
    repeated(base, shop, segments, known)


def test_a_neighbour_without_its_checkpoint_stands_in_for_itself(base: Any, shop: Shop) -> None:
    """Fresh weights at the neighbour's place in the data: the other member's bits are the same."""
    (first,) = train_gang(base, [trial(1)], shop, 4)
    rest = trial(
        1, start_tokens=first.tokens, stop_tokens=first.tokens + 700, checkpoint_in=first.checkpoint_out
    )
    segments = [rest, trial(0)]
    known = train_gang(base, segments, shop, 4)
    before = state_of(shop, known[1])
    frozen = {**rest.params, "learning_rate": 0.0}
    stand_in = dataclasses.replace(rest, checkpoint_in=None, params=frozen)
    again = train_gang(base, [stand_in, trial(0)], shop, 4, course=known[0].course)
    assert_same(shop, known[1], again[1], before)
    assert known[0].tokens == again[0].tokens
    (alone,) = train_gang(base, [trial(0)], shop, 4)
    assert known[1].course != alone.course


def test_a_neighbour_that_diverges_leaves_at_the_same_pass(base: Any, shop: Shop) -> None:
    """Also when it is only its course that says so."""
    wild = trial(1, params={**trial(1).params, "learning_rate": 1e7})
    known = train_gang(base, [trial(0), wild], shop, 4)
    assert [r.status for r in known] == ["ok", "diverged"]
    before = state_of(shop, known[0])
    again = train_gang(base, [trial(0), wild], shop, 4, course=known[0].course)
    assert_same(shop, known[0], again[0], before)


def test_a_lost_checkpoint_is_no_fresh_start(base: Any, shop: Shop) -> None:
    """Repeating from a checkpoint that is gone trains nothing, and names it."""
    gone = trial(0, start_tokens=300, checkpoint_in="gone")
    (result,) = train_gang(base, [gone], shop, 4, course=(Stint((0,), (4,), 3),))
    assert "lost" == result.status and "gone" in result.detail


def test_what_rounds_sums_is_named(tmp_path: Path) -> None:
    """Processor, vector unit, threads, libraries and torch; a machine that does not tell is unknown."""
    found = computed_on("cpu")
    assert {"processor", "vector unit", "threads", "libraries", "torch"} <= set(found)
    assert str(torch.get_num_threads()) == found["threads"]
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n", encoding="utf-8")
    assert ("Some CPU @ 2 GHz", "unknown") == (processor(info), processor(tmp_path / "none"))
