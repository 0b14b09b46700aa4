"""Settings of training as dimensions, on real steps: the optimizer, the scale, noise on the embeddings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from budgetsearch.storage.ownership import checkpoint_in
from budgetsearch.training import checkpoints
from budgetsearch.training.adapters import Adapter, check_plain, worn
from budgetsearch.training.members import Member, Shop
from budgetsearch.training.recipe import train_gang
from tests.support.training import PARAMS, base, make_segment

PLAIN = {**PARAMS, "dropout": 0.0}


def stepped(model: Any, shop: Shop, **more: Any) -> Member:
    """A member after one step of AdamW on gradients of one."""
    member = Member.set_up(model, make_segment(params={**PLAIN, **more}), shop)
    for weight in member.adapter.weights().values():
        weight.grad = torch.ones_like(weight)
    member.begin_step([0])
    member.tokens = 1000  # behind the warmup
    member.finish_step(1.0, 1.0)
    return member


def test_the_optimizer_follows_the_configuration(shop: Shop, tiny_model: Path) -> None:
    """LoRA+ moves B so many times as far as A; weight decay shrinks what there is."""
    model = base(tiny_model)
    fresh = Member.set_up(model, make_segment(params=PLAIN), shop).adapter
    usual, plus, decayed = (
        stepped(model, shop, **more).adapter for more in ({}, {"lora_plus_ratio": 4.0}, {"weight_decay": 0.5})
    )
    name = next(iter(fresh.a))
    assert torch.equal(usual.a[name], plus.a[name])
    assert torch.allclose(4 * usual.b[name], plus.b[name])
    rate = float(PLAIN["learning_rate"])
    assert torch.allclose(usual.a[name] - 0.5 * rate * fresh.a[name], decayed.a[name], atol=1e-6)


def test_gradients_are_clipped_where_the_configuration_says(shop: Shop, tiny_model: Path) -> None:
    """To its own norm."""
    member = Member.set_up(base(tiny_model), make_segment(params={**PLAIN, "clip_norm": 0.25}), shop)
    for weight in member.adapter.weights().values():
        weight.grad = torch.ones_like(weight)
    member.begin_step([0])
    member.take(torch.tensor(1.0))
    member.measure()
    grads = [weight.grad for weight in member.adapter.weights().values()]
    assert math.isclose(0.25, float(torch.stack([g.norm() for g in grads]).norm()), rel_tol=1e-3)  # type: ignore[union-attr]


def test_rslora_is_what_peft_makes_of_it(shop: Shop, tiny_model: Path) -> None:
    """Its scale in training, in the checkpoint, and in what PEFT loads."""
    model = base(tiny_model)
    segment = make_segment(stop=300, params={**PLAIN, "rslora": True})
    (result,) = train_gang(model, [segment], shop, 8)
    assert result.checkpoint_out is not None
    folder = checkpoint_in(shop.checkpoint_path, result.checkpoint_out)
    saved = checkpoints.load(folder)
    check_plain(saved.config)
    adapter = Adapter.saved(saved, segment.params, "cpu")
    assert math.isclose(8 / math.sqrt(4), adapter.scale)
    loaded = worn(model, folder)
    scales = {m.scaling["default"] for m in loaded.modules() if isinstance(getattr(m, "scaling", 0), dict)}
    assert {adapter.scale} == scales


def test_noise_on_the_embeddings_is_each_members_own(shop: Shop, tiny_model: Path) -> None:
    """Beside others as alone; without it another result; evaluations have none."""
    model = base(tiny_model)
    noisy = make_segment(stop=600, params={**PLAIN, "neftune_alpha": 5.0})
    plain = make_segment(stop=600, params=PLAIN, trial_id=4)
    (alone,) = train_gang(model, [noisy], shop, 8)
    (quiet,) = train_gang(model, [plain], shop, 8)
    together = train_gang(model, [noisy, plain], shop, 8)
    assert alone.loss is not None and quiet.loss is not None
    assert math.isclose(alone.loss, together[0].loss or 0.0, rel_tol=1e-5)
    assert math.isclose(quiet.loss, together[1].loss or 0.0, rel_tol=1e-5)
    assert abs(alone.loss - quiet.loss) > 1e-4


def test_rows_are_cut_where_the_configuration_says(shop: Shop, tiny_model: Path) -> None:
    """A step never sees a token behind it; rows whose answers lie there wholly are not trained on."""
    whole = shop.data.train
    length = int(whole.lengths.max()) - 8
    member = Member.set_up(base(tiny_model), make_segment(params={**PLAIN, "max_length": length}), shop)
    assert member.rows is shop.data.train_to(length), "made once"
    assert int(member.rows.lengths.max()) == length < int(whole.lengths.max())
    within = [sum(whole.row(row)[1][1:length]) for row in range(len(whole))]
    assert [member.rows.targets(row) for row in range(len(member.rows))] == [n for n in within if n]
    rows = member.order.step_rows(0)
    member.begin_step(rows)
    assert member.step_targets == sum(member.rows.targets(row) for row in rows)
    assert shop.data.train_to(10**6) is whole
    assert whole.sha256() == member.rows.sha256()
    short = shop.data.train_to(3)
    assert len(short) < len(whole)


def test_members_of_other_lengths_train_side_by_side_as_alone(shop: Shop, tiny_model: Path) -> None:
    """Each on its own rows, which have other numbers; and the longest is worth what it says."""
    model = base(tiny_model)
    length = int(sorted(shop.data.train.lengths)[len(shop.data.train) // 2])
    cut = make_segment(stop=600, params={**PLAIN, "max_length": length})
    plain = make_segment(stop=600, params=PLAIN, trial_id=4)
    (alone,) = train_gang(model, [cut], shop, 8)
    (whole,) = train_gang(model, [plain], shop, 8)
    together = train_gang(model, [cut, plain], shop, 8)
    assert alone.loss is not None and whole.loss is not None
    assert math.isclose(alone.loss, together[0].loss or 0.0, rel_tol=1e-5)
    assert math.isclose(whole.loss, together[1].loss or 0.0, rel_tol=1e-5)
    assert abs(alone.loss - whole.loss) > 1e-4


def test_a_cooldown_of_ones_own_shape_is_followed(shop: Shop, tiny_model: Path) -> None:
    """The rate of every step is that of the segment's schedule."""
    segment = make_segment(stop=10_000, params=PLAIN)
    segment = replace(segment, schedule=replace(segment.schedule, cooldown_tokens=8_000, shape="cosine"))
    member = Member.set_up(base(tiny_model), segment, shop)
    for weight in member.adapter.weights().values():
        weight.grad = torch.ones_like(weight)
    member.begin_step([0])
    member.tokens = segment.schedule.stop_tokens - 2_000
    member.finish_step(1.0, 1.0)
    rates = {group["lr"] for group in member.optimizer.param_groups}
    left = 0.5 * (1 + math.cos(0.75 * math.pi))
    assert rates
    assert all(math.isclose(rate, float(PLAIN["learning_rate"]) * left) for rate in rates)
