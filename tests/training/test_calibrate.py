"""The calibration on a tiny model: what fits, what saturates, what is recorded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from budgetsearch.core.records import CalibrateJob, Calibration, Probe, Schedule, Segment
from budgetsearch.core.resources.memory import gang_micro_batches
from budgetsearch.training import calibrate, checkpoints
from budgetsearch.training.adapters import Adapter
from budgetsearch.training.bases import load_base
from budgetsearch.training.calibrate import flops_per_token
from budgetsearch.training.gang import GangLinear
from budgetsearch.training.members import Shop
from budgetsearch.training.recipe import GangTraining, train_gang
from budgetsearch.training.score import time_answers

JOB = CalibrateJob(-1, "fp32", ranks=(4,), batch_size=8, limit_seconds=3600.0, max_gang=4, probe_seconds=0.05)


@pytest.fixture
def base(tiny_model: Path) -> Any:
    """The tiny model."""
    return load_base(str(tiny_model), "fp32", "cpu")


def limited(base: Any, rows: int, shop: Shop, *, recomputed: int | None = None) -> Any:
    """Let the base run out of memory beyond so many of the longest rows; more with gradient checkpointing."""
    longest = max(shop.data.train.lengths)

    def look(module: Any, args: Any, kwargs: Any) -> None:
        on = any(getattr(m, "gradient_checkpointing", False) and m.training for m in module.modules())
        if kwargs["input_ids"].numel() > longest * (recomputed if on and recomputed else rows):
            raise torch.OutOfMemoryError("CUDA out of memory")

    return base.register_forward_pre_hook(look, with_kwargs=True)


def rates(monkeypatch: pytest.MonkeyPatch, by_size: dict[int, float]) -> None:
    """Let gangs of each size have the given rate: nothing depends on the machine."""
    real = calibrate._Bench.probe

    def probe(self: Any, members: int, micro: int, recompute: bool) -> Probe:
        found = real(self, members, micro, recompute)
        return dataclasses.replace(found, tokens_per_second=by_size[members] + 10.0 * recompute)

    monkeypatch.setattr(calibrate._Bench, "probe", probe)


def measured(base: Any, shop: Shop, **changes: Any) -> Calibration:
    """A calibration."""
    return calibrate.calibrate(base, dataclasses.replace(JOB, **changes), shop, 1.5)


def test_real_steps_give_a_rate_and_the_base_stays_bare(base: Any, shop: Shop) -> None:
    """Every figure is there; afterwards a trial trains as on a fresh base."""
    found = measured(base, shop)
    assert ("ok", 8, False) == (found.status, found.micro_batch, found.recompute)
    assert found.tokens_per_second > 0
    assert found.eval_seconds_per_example > 0
    assert found.checkpoint_seconds > 0
    assert found.load_seconds == 1.5
    assert found.answer_seconds == 0.0  # nobody asked for answers
    assert found.seconds["train"] > 0
    longest = max(shop.data.train.lengths)
    assert {longest} == {probe.length for probe in found.probes}
    assert 1 <= found.gang <= 4
    assert not any("Gang" in type(m).__name__ for m in base.modules())


@pytest.mark.parametrize(
    ("by_size", "gang", "tried"),
    [
        ({1: 100, 2: 150, 4: 200}, 4, [1, 2, 4]),
        ({1: 100, 2: 150, 4: 152}, 2, [1, 2, 4]),
        ({1: 100, 2: 101, 4: 200}, 4, [1, 2, 4]),
        ({1: 100, 2: 101, 4: 102}, 1, [1, 2, 4]),
    ],
)
def test_the_gang_grows_while_a_doubling_pays(
    base: Any,
    shop: Shop,
    monkeypatch: pytest.MonkeyPatch,
    by_size: dict[int, float],
    gang: int,
    tried: list[int],
) -> None:
    """The last size that paid is chosen, whatever one timing said; the reference rate is of one alone."""
    rates(monkeypatch, by_size)
    found = measured(base, shop)
    assert gang == found.gang
    assert tried == [probe.members for probe in found.probes]
    assert found.tokens_per_second == 100


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([100.0], (0, False)),
        ([100.0, 150.0, 149.0], (1, False)),
        ([100.0, 150.0, 149.0, 160.0], (3, False)),
        ([100.0, 150.0, 149.0, 150.0, 900.0], (1, True)),
    ],
)
def test_two_doublings_in_vain_are_enough(found: list[float], expected: tuple[int, bool]) -> None:
    """A gain counts against the last size that paid, so small gains add up."""
    assert expected == calibrate.saturated(found)


def test_the_user_may_forbid_gangs_and_int8_does(
    base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLM.int8() mixes rows in its outlier columns, so its gangs have one member."""
    rates(monkeypatch, {1: 100, 2: 200, 4: 400})
    assert measured(base, shop, max_gang=1).gang == 1
    assert measured(base, shop, quantization="int8").gang == 1
    assert measured(base, shop).gang == 4


def test_the_micro_batch_is_halved_until_it_fits(
    base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows fit: the micro-batch is two; of two members one each fits, and of four nothing does."""
    rates(monkeypatch, {1: 100, 2: 200, 4: 400})
    handle = limited(base, 2, shop)
    found = measured(base, shop)
    handle.remove()
    assert (2, 2, False) == (found.micro_batch, found.gang, found.recompute)
    assert (2, 1) == gang_micro_batches(found)


def test_gradient_checkpointing_is_taken_where_it_pays(
    base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lets eight rows fit in place of two and is faster: on. Where everything fits it is not tried."""
    rates(monkeypatch, {1: 100, 2: 100, 4: 100})
    handle = limited(base, 2, shop, recomputed=8)
    found = measured(base, shop)
    handle.remove()
    assert (8, True) == (found.micro_batch, found.recompute)
    assert not any(probe.recompute for probe in measured(base, shop).probes)


def test_what_does_not_fit_at_all_is_an_error(base: Any, shop: Shop) -> None:
    """Not even one row: the worker reports it as out of memory."""
    handle = limited(base, 0, shop)
    with pytest.raises(MemoryError, match="does not fit at rank 4"):
        measured(base, shop)
    handle.remove()


def test_answers_are_timed_where_some_will_be_graded(base: Any, shop: Shop) -> None:
    """Seconds of one answer of full length: given up after the first token it extrapolates."""
    assert measured(base, shop, task_examples=4).answer_seconds > 0
    whole = time_answers(base, shop, 4, 60.0)
    hurried = time_answers(base, shop, 4, 0.0)
    assert 0 < hurried < 50 * whole
    assert 0 < whole < 50 * hurried


def test_a_probe_that_diverges_is_an_error_and_not_a_loop(base: Any, shop: Shop) -> None:
    """A base that gives NaN: the worker reports a crash, and another quantization may work."""
    base.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="diverged"):
        measured(base, shop)


def test_told_to_stop_a_calibration_ends(base: Any, shop: Shop) -> None:
    """Whatever it was timing, it does not go on for ever."""
    found = measured(base, dataclasses.replace(shop, stopping=lambda: True), probe_seconds=3600.0)
    assert found.micro_batch == 8


def test_where_time_is_short_only_the_indispensable_is_measured(base: Any, shop: Shop) -> None:
    """No gang is tried and no answer timed, but there is a rate, an evaluation and a checkpoint."""
    found = measured(base, shop, limit_seconds=0.01, task_examples=4)
    assert [1] == [probe.members for probe in found.probes]
    assert found.answer_seconds == 0.0
    assert min(found.tokens_per_second, found.eval_seconds_per_example, found.checkpoint_seconds) > 0


def test_what_is_optional_may_fail(base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gangs or checkpointing cannot train, or that cannot generate: one alone stands."""
    real = calibrate._Bench.probe

    def probe(self: Any, members: int, micro: int, recompute: bool) -> Probe:
        if members > 1 or recompute:
            raise ValueError("not this model")
        return real(self, members, micro, recompute)

    def silent(*args: Any) -> float:
        raise RuntimeError("cannot generate")

    monkeypatch.setattr(calibrate._Bench, "probe", probe)
    monkeypatch.setattr(calibrate, "time_answers", silent)
    handle = limited(base, 4, shop)
    found = measured(base, shop, task_examples=4)
    handle.remove()
    assert ("ok", 4, 1, False) == (found.status, found.micro_batch, found.gang, found.recompute)
    assert found.answer_seconds == 0.0
    assert found.tokens_per_second > 0


def test_operations_are_counted_from_the_layers(base: Any, shop: Shop) -> None:
    """Four for a frozen weight, six for a trained one; the output layer for the completion only."""
    segment = Segment(
        0, {"quantization": "fp32", "rank": 4, "learning_rate": 1e-3}, 0, 0, 0, 9, Schedule(0, 9), 2, 2
    )
    training = GangTraining.set_up(base, [segment], shop)
    stats = shop.data.train_stats
    attention, mlp = 4 * 64 * 64, 3 * 64 * 128
    frozen = 2 * (attention + mlp) + 64 * 300 * stats.target_tokens / stats.tokens
    trained = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
    assert flops_per_token(base, training) == pytest.approx(4 * frozen + 6 * trained)


def test_eight_bit_states_resume_exactly_and_stay_alone(base: Any, shop: Shop) -> None:
    """A trial with AdamW8bit that was paused ends to the bit where the unbroken one ends."""
    eight = dataclasses.replace(shop, optimizer="adamw8bit")
    params = {"quantization": "fp32", "rank": 64, "learning_rate": 1e-2}  # large enough for 8-bit blocks
    segment = Segment(3, params, 7, 0, 0, 1500, Schedule(0, 1500), 4, 4)
    (whole,) = train_gang(base, [segment], eight, 4)
    half = dataclasses.replace(segment, stop_tokens=700, attempt=1)
    (first,) = train_gang(base, [half], eight, 4)
    rest = dataclasses.replace(
        segment, start_tokens=first.tokens, checkpoint_in=first.checkpoint_out, attempt=2
    )
    (resumed,) = train_gang(base, [rest], eight, 4)
    one, other = (checkpoints.load(shop.checkpoint_path / str(r.checkpoint_out)) for r in (whole, resumed))
    assert any(tensor.dtype == torch.uint8 for tensor in one.tensors.values())
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    with pytest.raises(ValueError, match="one member"):
        train_gang(base, [segment, dataclasses.replace(segment, trial_id=4)], eight, 4)


def test_another_resident_base_goes_before_anything_gets_smaller(base: Any, shop: Shop) -> None:
    """A rank that is refused here is refused for good, so the neighbour's memory must not decide."""
    held = [True]

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if held[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def make_room() -> bool:
        had, held[0] = held[0], False
        return had

    handle = base.register_forward_pre_hook(look, with_kwargs=True)
    found = measured(base, dataclasses.replace(shop, make_room=make_room), ranks=(4, 2))
    handle.remove()
    assert (found.rank, found.micro_batch) == (4, JOB.batch_size)


def test_the_peak_is_without_the_bases_beside(base: Any, shop: Shop) -> None:
    """What the estimate is corrected by is this quantization's own."""
    beside = dataclasses.replace(shop, peak_bytes=lambda: 1000, other_bases=lambda: 300)
    assert {probe.peak_bytes for probe in measured(base, beside).probes} == {700}


def test_the_largest_dropout_is_measured(base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps masks and copies, so what fits without it may not fit with it."""
    seen: list[Any] = []
    fresh = Adapter.fresh

    def remembered(base: Any, params: Any, **options: Any) -> Adapter:
        seen.append(params["dropout"])
        return fresh(base, params, **options)

    monkeypatch.setattr(Adapter, "fresh", remembered)
    measured(base, shop, dropout=0.25)
    assert set(seen) == {0.25}


@pytest.mark.slow
def test_the_next_rank_is_measured_where_the_largest_does_not_fit(base: Any, shop: Shop) -> None:
    """At one row, with checkpointing or without."""

    def look(module: Any, args: Any) -> None:
        wide = [m.mine.b.shape[1] for m in module.modules() if isinstance(m, GangLinear)]
        if wide and max(wide) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = base.register_forward_pre_hook(look)
    found = measured(base, shop, ranks=(16, 8, 4, 2))
    handle.remove()
    assert (found.status, found.rank, found.micro_batch) == ("ok", 4, JOB.batch_size)


@pytest.mark.slow
def test_pressure_does_not_forbid_one_row(base: Any, shop: Shop) -> None:
    """Training would go on with it, so the calibration must not say that nothing fits."""
    found = measured(base, dataclasses.replace(shop, pressed=lambda: "others left too little memory"))
    assert (found.status, found.micro_batch, found.gang) == ("ok", 1, 1)


def test_what_was_foreseen_is_where_it_begins(base: Any, shop: Shop) -> None:
    """No probe of more rows than may fit; a rank that may only fit recomputing is not tried plain."""
    found = measured(base, shop, ranks=(4,), micro_batches=((2, 4),))
    alone = [(probe.micro_batch, probe.recompute) for probe in found.probes if probe.members == 1]
    assert alone == [(2, False), (4, True)]
    found = measured(base, shop, ranks=(4,), micro_batches=((0, 4),))
    assert [p.recompute for p in found.probes if p.members == 1] == [True]


def test_a_model_that_cannot_recompute_is_tried_plain_after_all(
    base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Foresight is no proof."""
    real = calibrate._Bench.probe

    def probe(self: Any, members: int, micro: int, recompute: bool) -> Probe:
        if recompute:
            raise ValueError("this model does not support gradient checkpointing")
        return real(self, members, micro, recompute)

    monkeypatch.setattr(calibrate._Bench, "probe", probe)
    found = measured(base, shop, ranks=(4,), micro_batches=((0, 4),))
    assert (found.status, found.micro_batch, found.recompute) == ("ok", 1, False)


@pytest.mark.parametrize("mixing", [False, True])
def test_gangs_are_of_one_where_members_would_change_each_other(
    base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch, mixing: bool
) -> None:
    """A layer that looks at all rows at once is found out by trying, and said."""
    rates(monkeypatch, {1: 100.0, 2: 200.0, 4: 400.0})
    said: list[str] = []
    handle = base.model.layers[0].register_forward_hook(
        lambda module, args, output: output + 0.5 * output.mean(dim=0, keepdim=True) if mixing else output
    )
    try:
        found = measured(base, dataclasses.replace(shop, notice=said.append))
    finally:
        handle.remove()
    assert (1 if mixing else 4) == found.gang
    assert mixing == any("change each other" in text for text in said)
