"""Gangs against plain PEFT: in float64 a member equals the same trial trained alone, whoever is beside it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from budgetsearch.core.records import Schedule, Segment, SegmentResult
from budgetsearch.core.schedule import rate_factor
from budgetsearch.training import checkpoints, modes, recipe
from budgetsearch.training import gang as gang_module
from budgetsearch.training.bases import load_base
from budgetsearch.training.batches import DataOrder
from budgetsearch.training.data.tokens import PreparedData
from budgetsearch.training.gang import Gang
from budgetsearch.training.members import LOSS_SCALE, Member, Shop
from budgetsearch.training.recipe import GangTraining, train_gang
from tests.support.tiny import make_tiny_model

EXACT = 1e-10
STOP = 900


@pytest.fixture
def base(tiny_model: Path) -> Any:
    """The tiny model in float64."""
    return load_base(str(tiny_model), "fp32", "cpu").double()


def trial(number: int, **changes: Any) -> Segment:
    """One of several unlike trials: rank, alpha, rate, batch and schedule depend on the number."""
    params = {
        "quantization": "fp32",
        "rank": (4, 2, 7, 1)[number % 4],
        "alpha": (8.0, 16.0, 3.0, 1.0)[number % 4],
        "learning_rate": (1e-2, 3e-3, 2e-2, 1e-3)[number % 4],
        "dropout": 0.0,
    }
    segment = Segment(
        trial_id=number,
        params=params,
        seed=100 + number,
        rung=0,
        start_tokens=0,
        stop_tokens=STOP,
        schedule=Schedule(200, STOP + 100 * number, (0, 300)[number % 2]),
        batch_size=(4, 4, 2, 6)[number % 4],
        micro_batch=(4, 2, 1, 3)[number % 4],
    )
    return dataclasses.replace(segment, **changes)


@dataclasses.dataclass
class Alone:
    """A trial trained by plain PEFT."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    tokens: int


def plain_peft(base: Any, segment: Segment, data: PreparedData, tokens: int | None = None) -> Alone:
    """The textbook loop: PEFT, attention mask, labels, torch's AdamW; the whole batch in one pass."""
    from peft import LoraConfig, get_peft_model

    params = segment.params
    config = LoraConfig(
        r=int(params["rank"]),
        lora_alpha=float(params["alpha"]),
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(segment.seed)
    model = get_peft_model(base, config)
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
    order, alone = DataOrder(data.train.lengths, segment.batch_size, 0), Alone([], {}, 0)
    for step in itertools.count():
        if alone.tokens >= (tokens or segment.stop_tokens):
            break
        rows = [data.train.row(row) for row in order.step_rows(step)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids.tolist() + [0] * (width - len(ids)) for ids, _ in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
        labels = torch.full_like(ids, -100)
        for i, (row, trained) in enumerate(rows):
            labels[i, : len(row)] = torch.where(torch.tensor(trained), ids[i, : len(row)], -100)
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = float(params["learning_rate"]) * rate_factor(segment.schedule, alone.tokens)
        optimizer.step()
        optimizer.zero_grad()
        alone.losses.append(float(loss.detach()))
        alone.tokens += int(mask.sum())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            layer = name.removeprefix("base_model.model.").split(".lora_")[0]
            a = "lora_A" in name
            alone.weights[f"{layer}/{'A' if a else 'B'}"] = (
                (parameter if a else parameter.t()).detach().clone()
            )
    model.unload()
    return alone


def assert_equal(
    expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor], atol: float
) -> None:
    """Same names, same values to ``atol``."""
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.allclose(tensor, actual[name], rtol=0.0, atol=atol), name


def trained(base: Any, segments: Sequence[Segment], shop: Shop) -> GangTraining:
    """A gang after its training."""
    training = GangTraining.set_up(base, segments, shop)
    training.train()
    return training


@pytest.mark.parametrize("numbers", [(0,), (1, 0), (0, 1, 2, 3), (3, 0, 0), (2, 2)])
def test_a_gang_equals_separate_peft_runs(base: Any, shop: Shop, numbers: tuple[int, ...]) -> None:
    """Losses and weights of every member, with mixed ranks, alphas, rates, schedules, batch sizes and
    micro-batches, so with different lengths side by side and steps that end at different passes."""
    training = trained(base, [trial(number) for number in numbers], shop)
    for number, member in zip(numbers, training.members, strict=True):
        alone = plain_peft(base, trial(number), shop.data)
        assert member.status == "ok"
        assert member.tokens == alone.tokens
        assert len(alone.losses) > 3
        assert alone.losses == pytest.approx(member.recent, abs=EXACT)
        assert_equal(alone.weights, member.adapter.weights(), EXACT)


def test_gradients_equal_those_of_peft(base: Any, shop: Shop) -> None:
    """Before any step: what backward leaves in a member's tensors is what PEFT's parameters get."""
    from peft import LoraConfig, get_peft_model

    numbers = (0, 2)
    training = GangTraining.set_up(base, [trial(n, micro_batch=8) for n in numbers], shop)
    for member in training.members:
        for weight in member.adapter.b.values():
            torch.manual_seed(1)
            weight.normal_(0.0, 0.05)  # at B = 0 the gradient of A is zero
    seen: list[dict[str, torch.Tensor]] = []
    for member in training.members:
        member.take = lambda loss, m=member: bool(  # type: ignore[method-assign]
            seen.append({n: w.grad.clone() for n, w in m.adapter.weights().items()})
        )
    with Gang(base, [m.adapter for m in training.members]).worn() as gang:
        training.step_on(gang, training.members)
    for member, found in zip(training.members, seen, strict=True):
        params = member.segment.params
        config = LoraConfig(
            r=int(params["rank"]), lora_alpha=float(params["alpha"]), target_modules="all-linear"
        )
        model = get_peft_model(base, config)
        parameters = {n: p for n, p in model.named_parameters() if "lora_" in n}
        for name, parameter in parameters.items():
            layer = name.removeprefix("base_model.model.").split(".lora_")[0]
            side = member.adapter.a if "lora_A" in name else member.adapter.b
            value = side[layer] if "lora_A" in name else side[layer].t()
            parameter.data.copy_(value)
        rows = member.order.step_rows(0)
        total, targets = torch.zeros((), dtype=torch.float64), 0
        for row in rows:  # one at a time, so there is no padding at all
            ids, trained = map(torch.tensor, shop.data.train.row(row))
            logits = model(input_ids=ids[None].long()).logits[0, :-1][trained[1:]]
            total = total + cross_entropy(logits, ids[trained].long(), reduction="sum")
            targets += int(trained.sum())
        (total / targets).backward()
        for name, parameter in parameters.items():
            layer = name.removeprefix("base_model.model.").split(".lora_")[0]
            grad = found[f"{layer}/A"] if "lora_A" in name else found[f"{layer}/B"].t()
            assert parameter.grad is not None
            assert float(parameter.grad.abs().max()) > 0
            assert torch.allclose(parameter.grad, grad, rtol=0.0, atol=EXACT), name
        model.unload()


def test_order_in_the_gang_does_not_matter(base: Any, shop: Shop) -> None:
    """The same members in another order end with the same weights."""
    first = trained(base, [trial(n) for n in (0, 1, 2)], shop)
    second = trained(base, [trial(n) for n in (2, 0, 1)], shop)
    by_trial = {m.segment.trial_id: m for m in second.members}
    for member in first.members:
        assert_equal(member.adapter.weights(), by_trial[member.segment.trial_id].adapter.weights(), EXACT)


@pytest.mark.parametrize("rate", [1e30, float("nan"), float("inf")])
def test_a_neighbour_that_diverges_changes_nothing(base: Any, shop: Shop, rate: float) -> None:
    """It is quarantined and reported; the others end where plain PEFT ends, all numbers finite."""
    wild = trial(
        1, params={**trial(1).params, "learning_rate": rate}, schedule=Schedule(1, 9999), stop_tokens=9999
    )
    segments = [trial(0, stop_tokens=4000), wild, trial(2, stop_tokens=3000)]
    results = train_gang(base, segments, shop, 8)
    assert [r.status for r in results] == ["ok", "diverged", "ok"]
    assert "step" in results[1].detail
    assert results[1].checkpoint_out is None
    for segment, result in ((segments[0], results[0]), (segments[2], results[2])):
        alone = plain_peft(base, segment, shop.data)
        saved = checkpoints.load(shop.checkpoint_path / str(result.checkpoint_out))
        assert_equal(alone.weights, weights_of(saved.tensors), EXACT)


def weights_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint."""
    return {n.removeprefix("weight/"): t for n, t in tensors.items() if n.startswith("weight/")}


def test_a_nan_in_one_member_stays_there(base: Any, shop: Shop) -> None:
    """Even its own forward and backward full of NaN leave the neighbours' gradients finite and equal."""
    segments = [trial(0), trial(1), trial(2)]
    clean = trained(base, segments, shop)
    training = GangTraining.set_up(base, segments, shop)
    next(iter(training.members[1].adapter.a.values())).fill_(float("nan"))
    training.train()
    assert [m.status for m in training.members] == ["ok", "diverged", "ok"]
    for k in (0, 2):
        assert_equal(clean.members[k].adapter.weights(), training.members[k].adapter.weights(), EXACT)


def test_a_member_that_leaves_early_changes_nothing(base: Any, shop: Shop) -> None:
    """Shorter segments end first, in the middle of the others' accumulation."""
    segments = [trial(0, stop_tokens=450), trial(2, stop_tokens=200), trial(3, stop_tokens=500), trial(1)]
    training = trained(base, segments, shop)
    # One pass makes a step of the first and two a step of the last, which is then half done.
    assert training.members[0].steps % 2 == 1
    assert 2 * training.members[3].steps > training.members[0].steps
    for segment, member in zip(segments, training.members, strict=True):
        assert_equal(plain_peft(base, segment, shop.data).weights, member.adapter.weights(), EXACT)


@pytest.mark.parametrize("gang_first", [True, False])
def test_checkpoints_go_between_gang_and_alone(base: Any, shop: Shop, gang_first: bool) -> None:
    """Half in a gang and half alone, or the other way round, ends where an unbroken plain run ends."""
    half = [trial(n, stop_tokens=400) for n in (0, 1)]
    if gang_first:
        first = train_gang(base, half, shop, 4)
    else:
        first = [train_gang(base, [segment], shop, 4)[0] for segment in half]
    rest = [goes_on(segment, result) for segment, result in zip(half, first, strict=True)]
    if gang_first:
        second = [train_gang(base, [segment], shop, 4)[0] for segment in rest]
    else:
        second = train_gang(base, [*reversed(rest), trial(2)], shop, 4)[1::-1]
    for number, result in zip((0, 1), second, strict=True):
        saved = checkpoints.load(shop.checkpoint_path / str(result.checkpoint_out))
        alone = plain_peft(base, trial(number), shop.data)
        assert saved.progress.tokens == alone.tokens
        assert_equal(alone.weights, weights_of(saved.tensors), EXACT)


def goes_on(segment: Segment, result: SegmentResult) -> Segment:
    """The segment that follows a result."""
    return dataclasses.replace(
        segment, start_tokens=result.tokens, stop_tokens=STOP, checkpoint_in=result.checkpoint_out
    )


def test_every_member_exports_a_peft_adapter_with_its_reported_losses(
    base: Any, shop: Shop, tiny_model: Path
) -> None:
    """Loaded by PEFT on a fresh base, each adapter has the losses that the packed evaluation reported."""
    from peft import PeftModel

    for result in train_gang(base, [trial(n) for n in (0, 1, 2)], shop, 6):
        fresh = load_base(str(tiny_model), "fp32", "cpu").double()
        model = PeftModel.from_pretrained(fresh, shop.checkpoint_path / str(result.checkpoint_out)).double()
        losses = []
        for index in range(6):
            ids, trained = map(torch.tensor, shop.data.valid.row(index))
            with torch.no_grad():
                logits = model(input_ids=ids[None].long()).logits[0, :-1][trained[1:]]
            losses.append(float(cross_entropy(logits, ids[trained].long())))
        assert losses == pytest.approx(list(result.example_losses), abs=EXACT)


def test_dropout_is_the_members_own(base: Any, shop: Shop) -> None:
    """With dropout a member in a gang of different lengths still equals itself alone; and it does drop."""
    wet = [trial(n, params={**trial(n).params, "dropout": p}) for n, p in ((0, 0.1), (2, 0.3), (1, 0.0))]
    together = trained(base, wet, shop)
    for segment, member in zip(wet, together.members, strict=True):
        alone = trained(base, [segment], shop).members[0]
        assert_equal(alone.adapter.weights(), member.adapter.weights(), EXACT)
    dry = trained(base, [trial(0)], shop).members[0]
    assert together.members[0].recent != pytest.approx(dry.recent, abs=1e-3)


def test_every_pass_and_every_layer_has_a_mask_of_its_own(
    base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No seed of a mask comes twice: not in another step, micro-batch, layer or trial."""
    seen: list[str] = []
    real = gang_module.number_of
    monkeypatch.setattr(gang_module, "number_of", lambda text: (seen.append(text), real(text))[1])
    wet = [trial(n, params={**trial(n).params, "dropout": 0.1}) for n in (0, 1)]
    members = trained(base, wet, shop).members
    passes = sum(m.steps * -(-m.segment.batch_size // m.micro_batch) for m in members)
    assert len(seen) == len(set(seen)) == 14 * passes
    assert len({real(text) for text in seen}) == len(seen)


@pytest.mark.parametrize("numbers", [(0,), (0, 1)])
def test_gradient_checkpointing_changes_nothing(base: Any, shop: Shop, numbers: tuple[int, ...]) -> None:
    """Recomputed activations give the same weights, dropout included, and the base forgets about it."""
    wet = [trial(n, params={**trial(n).params, "dropout": 0.1}) for n in numbers]
    plain = trained(base, wet, shop)
    calls: list[int] = []
    handle = base.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    again = trained(base, [dataclasses.replace(s, recompute=True) for s in wet], shop)
    handle.remove()
    passes = sum(-(-m.segment.batch_size // m.micro_batch) * m.steps for m in again.members) / len(numbers)
    assert len(calls) >= 2 * passes  # it did recompute
    for one, other in zip(plain.members, again.members, strict=True):
        assert_equal(one.adapter.weights(), other.adapter.weights(), EXACT)
    assert not any(module.training for module in base.modules())


@pytest.mark.slow
def test_torch_compile_changes_nothing_and_is_paid_for_once(tmp_path: Path, shop: Shop) -> None:
    """Compiled layers give the same weights to the rounding of their float32 norms, with gradient
    checkpointing too; another trial on the same base compiles nothing new, and outside of training nothing
    is compiled."""
    from torch._dynamo.utils import counters

    model = load_base(str(make_tiny_model(tmp_path / "one", layers=1)), "fp32", "cpu").double()
    fast = dataclasses.replace(shop, torch_compile=True)
    plain = trained(model, [trial(0)], shop).members[0]
    counters.clear()
    compiled = trained(model, [trial(0)], fast).members[0]
    assert_equal(plain.adapter.weights(), compiled.adapter.weights(), 1e-4)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    trained(model, [trial(0, seed=1)], fast)
    assert graphs == counters["stats"]["unique_graphs"]
    again = trained(model, [trial(0, recompute=True)], fast).members[0]
    assert_equal(plain.adapter.weights(), again.adapter.weights(), 1e-4)
    assert model.model.layers[0]._compiled_call_impl is None


@pytest.mark.parametrize("quantization", ["fp32", "bf16", "nf4"])
def test_quantized_bases_carry_gangs(shop: Shop, tiny_model: Path, quantization: str) -> None:
    """In lower precision the same arithmetic rounds differently for another shape of the batch. After
    these few steps a member's validation loss is within half a percent (bf16: 2%) of its loss alone."""
    model = load_base(str(tiny_model), quantization, "cpu")
    segments = [
        trial(n, params={**trial(n).params, "quantization": quantization}, stop_tokens=1500)
        for n in (0, 1, 2)
    ]
    together = train_gang(model, segments, shop, 8)
    for segment, result in zip(segments, together, strict=True):
        (alone,) = train_gang(model, [segment], shop, 8)
        assert result.loss == pytest.approx(alone.loss, rel=0.02 if quantization == "bf16" else 0.005)


@pytest.mark.parametrize("numbers", [(0, 1, 3), (0, 2)])
def test_autocast_computes_in_16_bits_and_keeps_adapters_in_32(
    shop: Shop, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, ...]
) -> None:
    """What a card does: products in bf16, weights and moments in fp32, losses near those without."""
    model = load_base(str(tiny_model), "bf16", "cpu")
    segments = [trial(n, stop_tokens=1500) for n in numbers]
    plain = train_gang(model, segments, shop, 8)
    monkeypatch.setattr(recipe, "mixed", lambda device, half: torch.autocast("cpu", dtype=torch.bfloat16))
    training = trained(model, segments, shop)
    training.evaluate(8)
    for member, result in zip(training.members, plain, strict=True):
        assert {torch.float32} == {w.dtype for w in member.adapter.weights().values()}
        assert {torch.float32} == {s["exp_avg"].dtype for s in member.optimizer.state.values()}
        found = training.evaluated[member.segment.trial_id]
        assert found.loss == pytest.approx(result.loss, rel=0.02)


def test_fp16_scales_the_loss_and_learns_the_same(
    shop: Shop, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a card without bf16 units does, computed here."""
    segments = [trial(n, stop_tokens=1500) for n in (0, 1)]
    plain = train_gang(load_base(str(tiny_model), "fp32", "cpu"), segments, shop, 8)
    monkeypatch.setitem(modes.HALVES, "bf16", torch.float16)
    model = load_base(str(tiny_model), "bf16", "cpu")
    assert model.dtype == torch.float16
    monkeypatch.setattr(recipe, "mixed", lambda device, half: torch.autocast("cpu", dtype=torch.float16))
    training = GangTraining.set_up(model, segments, shop)
    for member in training.members:
        member.scale = LOSS_SCALE
    training.train()
    training.evaluate(8)
    for member, result in zip(training.members, plain, strict=True):
        assert {torch.float32} == {w.dtype for w in member.adapter.weights().values()}
        found = training.evaluated[member.segment.trial_id]
        assert found.loss == pytest.approx(result.loss, rel=0.02)


def test_a_gradient_that_overflows_is_made_again_with_half_the_scale(
    base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaling changes nothing: the same weights as without, for it and for its neighbour."""
    segments = [trial(0), trial(1)]
    expected = [m.adapter.weights() for m in trained(base, segments, shop).members]
    measure = Member.measure

    def overflowing(self: Member) -> torch.Tensor:
        found = measure(self)
        return torch.stack([found[0], found[1] / 0.0]) if self.scale > 2.0**10 else found

    monkeypatch.setattr(Member, "measure", overflowing)
    training = GangTraining.set_up(base, segments, shop)
    training.members[0].scale = 2.0**12
    training.train()
    assert [m.scale for m in training.members] == [2.0**10, 1.0]
    assert [m.status for m in training.members] == ["ok", "ok"]
    for member, weights in zip(training.members, expected, strict=True):
        assert_equal(weights, member.adapter.weights(), EXACT)


def test_a_gradient_that_overflows_without_a_scale_has_diverged(
    base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halving ends at one."""
    measure = Member.measure
    monkeypatch.setattr(Member, "measure", lambda self: measure(self) * torch.tensor([1.0, torch.inf]))
    training = GangTraining.set_up(base, [trial(0)], shop)
    training.members[0].scale = 4.0
    training.train()
    assert training.members[0].status == "diverged"


class Hungry:
    """Runs out of memory when a batch has more positions than so many of the longest rows."""

    def __init__(self, longest: int, rows: float) -> None:
        self.longest, self.rows, self.most = longest, rows, 0.0

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        rows = kwargs["input_ids"].numel() / self.longest
        if rows > self.rows:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {rows} of the longest rows")
        self.most = max(self.most, rows)


@pytest.fixture
def hungry(base: Any, shop: Shop, request: pytest.FixtureRequest) -> Iterator[Hungry]:
    """The base with memory for so many rows."""
    hook = Hungry(max(shop.data.train.lengths), request.param)
    handle = base.register_forward_pre_hook(hook, with_kwargs=True)
    yield hook
    handle.remove()


@pytest.mark.parametrize(
    ("hungry", "width", "micro"),
    [(9, 2, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((5, 1, 4), (3, 1, 2))), (1, 1, 1)],
    indirect=["hungry"],
)
def test_out_of_memory_is_survived(base: Any, shop: Shop, hungry: Hungry, width: int, micro: int) -> None:
    """First the gang shrinks, then the micro-batch is halved; the weights are the same, and it is told."""
    segments = [dataclasses.replace(trial(0), trial_id=n, seed=n, micro_batch=4) for n in range(3)]
    results = train_gang(base, segments, shop, 4)
    assert width * micro / 2 < hungry.most  # as much at once as was left
    for segment, result in zip(segments, results, strict=True):
        assert result.status == "ok"
        assert (width, micro) == (result.gang, result.micro_batch)
        saved = checkpoints.load(shop.checkpoint_path / str(result.checkpoint_out))
        hungry.rows = 99
        assert_equal(plain_peft(base, segment, shop.data).weights, weights_of(saved.tensors), EXACT)
    assert "out of memory" in results[0].detail


def test_short_rows_that_do_not_fit_together_go_one_after_the_other(
    base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass has room for the longest row, and something else took half of it: no trial is given up."""
    segment, made = trial(0, micro_batch=1, batch_size=6), DataOrder.__init__

    def with_a_longer_row(self: DataOrder, *args: Any) -> None:
        made(self, *args)
        self.longest *= 3

    monkeypatch.setattr(DataOrder, "__init__", with_a_longer_row)

    def tighter(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = base.register_forward_pre_hook(tighter, with_kwargs=True)
    (result,) = train_gang(base, [segment], shop, 1)
    handle.remove()
    assert ("ok", 1) == (result.status, result.micro_batch)
    assert "one row after the other" in result.detail
    assert 0 == result.course[-1].micro_batches[0]
    saved = checkpoints.load(shop.checkpoint_path / str(result.checkpoint_out))
    assert_equal(plain_peft(base, segment, shop.data).weights, weights_of(saved.tensors), EXACT)


def test_only_passes_that_do_not_fit_compute_their_activations_again(
    base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that fit without gradient checkpointing come in passes of their own; the weights are the same."""
    longest = max(shop.data.train.lengths)
    segment = trial(0, recompute=True, plain_positions=int(0.9 * longest), micro_batch=2)
    seen, real = set(), GangTraining.step_on

    def step_on(self: GangTraining, gang: Any, group: Any) -> None:
        real(self, gang, group)
        seen.add(self._plain)

    monkeypatch.setattr(GangTraining, "step_on", step_on)
    (result,) = train_gang(base, [segment], shop, 1)
    assert {True, False} == seen
    saved = checkpoints.load(shop.checkpoint_path / str(result.checkpoint_out))
    assert_equal(plain_peft(base, segment, shop.data).weights, weights_of(saved.tensors), EXACT)


def test_a_gang_pads_nobody_beyond_what_fits(base: Any, shop: Shop) -> None:
    """Members at long and at short rows: together they never take more than each for itself, nobody waits for
    ever, and whoever waits ends where it would alone."""
    segments = [trial(0, micro_batch=1, batch_size=b, trial_id=n) for n, b in enumerate((1, 6, 4))]
    hook = Hungry(max(shop.data.train.lengths), 3.0)
    handle = base.register_forward_pre_hook(hook, with_kwargs=True)
    results = train_gang(base, segments, shop, 1)
    handle.remove()
    assert {"ok"} == {result.status for result in results}
    assert {3} == {result.gang for result in results}
    for segment, result in zip(segments, results, strict=True):
        saved = checkpoints.load(shop.checkpoint_path / str(result.checkpoint_out))
        assert_equal(plain_peft(base, segment, shop.data).weights, weights_of(saved.tensors), EXACT)


def test_what_one_rank_cannot_do_a_smaller_one_may_still(base: Any, shop: Shop) -> None:
    """Of the members that are left, only those that need as much get the smaller micro-batch."""
    training = GangTraining.set_up(base, [trial(2, micro_batch=4), trial(1), trial(0)], shop)
    ranks = [int(member.segment.params["rank"]) for member in training.members]
    assert ranks == [7, 2, 4]
    for member in training.members:
        member.micro_batch = 4
    training.width = 1
    training._make_smaller(training.members[2:], "out of memory")
    assert [member.micro_batch for member in training.members] == [2, 4, 2]


@pytest.mark.parametrize("hungry", [0], indirect=True)
def test_a_sample_that_does_not_fit_is_infeasible(base: Any, shop: Shop, hungry: Hungry) -> None:
    """Each member says so, and the base is bare again."""
    results = train_gang(base, [trial(0), trial(1)], shop, 4)
    assert [r.status for r in results] == ["out_of_memory", "out_of_memory"]
    assert [r.micro_batch for r in results] == [1, 1]
    assert "one sample alone" in results[0].detail
    assert not any("Gang" in type(m).__name__ for m in base.modules())


def test_another_resident_base_goes_before_the_gang_shrinks(base: Any, shop: Shop) -> None:
    """Memory runs out once: the shop gives up what the job does not need, and both members go on at once."""
    held = [True]

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if held[0] and len(kwargs["input_ids"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def make_room() -> bool:
        had, held[0] = held[0], False
        return had

    handle = base.register_forward_pre_hook(look, with_kwargs=True)
    first, second = train_gang(
        base, [trial(0), trial(0, trial_id=5)], dataclasses.replace(shop, make_room=make_room), 4
    )
    handle.remove()
    assert ["ok", "ok"] == [first.status, second.status]
    assert (2, 4) == (first.gang, first.micro_batch)
    assert "another base had to go" in first.detail


def test_whatever_fails_while_putting_on_the_base_is_bare_again(
    base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the middle of the stacks; the next trial trains as on a fresh base."""
    expected = trained(base, [trial(0)], shop).members[0].adapter.weights()
    calls = itertools.count()
    real = gang_module.stacked

    def failing(*args: Any) -> Any:
        if next(calls) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(gang_module, "stacked", failing)
    training = GangTraining.set_up(base, [trial(1)], shop)
    with pytest.raises(torch.OutOfMemoryError), Gang(base, [training.members[0].adapter]).worn():
        raise AssertionError("it was put on")
    assert not any("Gang" in type(m).__name__ for m in base.modules())
    assert_equal(expected, trained(base, [trial(0)], shop).members[0].adapter.weights(), EXACT)


def test_told_to_stop_finished_members_are_saved_and_evaluated_later(base: Any, shop: Shop) -> None:
    """The time of a stop is for checkpoints; going on, the finished one is only evaluated."""
    segments = [trial(0, stop_tokens=300), trial(1, stop_tokens=5000)]
    whole = train_gang(base, [segments[0]], shop, 6)[0]
    calls = itertools.count()
    hasty = dataclasses.replace(shop, stopping=lambda: next(calls) > 12)
    first, second = train_gang(base, segments, hasty, 6)
    assert ["cancelled", "cancelled"] == [first.status, second.status]
    assert first.loss is None
    assert first.tokens >= 300
    assert first.checkpoint_out is not None
    assert 0 < second.tokens < 5000
    again = dataclasses.replace(
        segments[0], start_tokens=first.tokens, stop_tokens=first.tokens, checkpoint_in=first.checkpoint_out
    )
    (later,) = train_gang(base, [again], shop, 6)
    assert ("ok", first.tokens, first.checkpoint_out) == (later.status, later.tokens, later.checkpoint_out)
    assert later.example_losses == pytest.approx(list(whole.example_losses), abs=EXACT)


def test_a_checkpoint_that_cannot_be_read_costs_only_its_own_trial(base: Any, shop: Shop) -> None:
    """It is reported as lost with the reason, and not as a crash; the neighbour trains."""
    lost = trial(1, start_tokens=100, checkpoint_in="gone")
    first, second = train_gang(base, [lost, trial(0)], shop, 4)
    assert ["lost", "ok"] == [first.status, second.status]
    assert "gone" in first.detail
    assert (1, 1) == (second.gang, second.began)  # it was alone from the start, memory did not run out
    (only,) = train_gang(base, [lost], shop, 4)
    assert "lost" == only.status


def test_a_full_disk_costs_only_what_did_not_fit(
    base: Any, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint is written, the second is not: the first trial has lost nothing."""
    real, calls = checkpoints.save, itertools.count()

    def save(*args: Any, **kwargs: Any) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save", save)
    first, second = train_gang(base, [trial(0), trial(1)], shop, 4)
    assert ["ok", "unwritten"] == [first.status, second.status]
    assert first.loss is not None
    assert second.loss is None
    assert "No space left" in second.detail


def test_members_share_the_time_by_their_tokens(base: Any, shop: Shop) -> None:
    """The shares are those of the tokens, and together no more than what passed."""
    first, second = train_gang(base, [trial(0), trial(0, trial_id=9, stop_tokens=300)], shop, 4)
    assert first.seconds["train"] > second.seconds["train"] > 0
    assert first.seconds["evaluate"] == second.seconds["evaluate"]
    assert 0.0 <= first.padding < 0.5
    for result in train_gang(base, [trial(0), trial(3)], shop, 4):  # unequal numbers of rows
        assert 0.0 <= result.padding < 0.5


def test_padding_is_counted(base: Any, shop: Shop) -> None:
    """What is reported is the share of the computed positions that held no token."""
    (result,) = train_gang(base, [trial(0)], shop, 4)
    order, data = DataOrder(shop.data.train.lengths, 4, 0), shop.data.train
    positions = tokens = 0
    for step in range(result.steps):
        lengths = [data.lengths[row] for row in order.step_rows(step)]
        positions += 4 * max(lengths)
        tokens += sum(lengths)
    assert result.padding == pytest.approx(1 - tokens / positions)
