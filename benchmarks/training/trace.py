"""The project's own training step on fake CUDA tensors of a real shape: every kernel, its bytes, every wait.

No card is needed: shapes, types and devices are true, numbers there are none. What a card would do is
recorded: kernels with their operations and bytes, storage alive, waits for the device, meetings of CPU and
CUDA tensors. Launch gaps, the effects of tiles and the allocator's rounding beyond 512 bytes are not in it.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import bitsandbytes.functional
import numpy
import torch
import torch.utils._foreach_utils as foreach
import transformers.masking_utils
import transformers.modeling_utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.training import false_cuda
from benchmarks.training.fused import fuse
from benchmarks.training.kernels import (
    MATH,
    Kernel,
    Trace,
)
from budgetsearch.core.records import Schedule, Segment
from budgetsearch.machine.configs import known_models
from budgetsearch.machine.memory import Training, estimate
from budgetsearch.machine.shapes import shape_of
from budgetsearch.training import attention, losses, modes
from budgetsearch.training.adapters import Adapter
from budgetsearch.training.bases import read_together
from budgetsearch.training.batches import CARD_WIDTHS
from budgetsearch.training.gang import Gang
from budgetsearch.training.members import Member, Shop
from budgetsearch.training.modes import training_mode
from budgetsearch.training.parts import Parts
from budgetsearch.training.recipe import GangTraining
from budgetsearch.training.targets import KNOWN, Known

os.environ.setdefault("HF_HUB_OFFLINE", "1")
MODEL = "mistralai/Mistral-7B-v0.1"


@dataclass
class Setup:
    """What is traced."""

    model: str = MODEL
    layers: int = 2
    quantization: str = "bf16"
    rank: int = 16
    dropout: float = 0.0
    members: int = 1
    recompute: bool = False
    rows: Sequence[int] = (200, 120)
    """Lengths of the rows of a step; half of each is trained on."""
    micro_batch: int = 0
    """0: all rows at once."""
    capability: tuple[int, int] = (9, 0)
    half: str = "bf16"
    fused: bool = False
    """With what stands in for Liger's kernels."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the model's configuration."""


# ------------------------------------------------------------------------------ the stand-ins


class _Silu(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """One kernel each way, as on a card; on fake tensors its gradient falls apart."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.ops.aten.silu(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.budgetsearch_trace.silu_backward(grads[0], ctx.saved_tensors[0])
        return found


def _sdpa(trace: Trace, capability: tuple[int, int]) -> Any:
    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        query, key, value = (part.to(half) for part in (query, key, value))
        grouped = enable_gqa and query.shape[1] != key.shape[1]
        if query.dtype == torch.float32 or attn_mask is not None or (grouped and capability < (8, 0)):
            trace.meetings[MATH] += 1
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        found: torch.Tensor = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return found

    return attention


@contextmanager
def fake_card(capability: tuple[int, int] = (9, 0)) -> Iterator[Trace]:
    """Inside, CUDA tensors are fake and every kernel is recorded."""
    false_cuda.install()
    warnings.filterwarnings("ignore")
    if not hasattr(torch.ops.budgetsearch_trace, "silu_backward"):
        torch.library.define("budgetsearch_trace::silu_backward", "(Tensor g, Tensor x) -> Tensor")
        torch.library.register_fake("budgetsearch_trace::silu_backward", lambda g, x: torch.empty_like(x))
    trace = Trace()
    real = torch.Generator
    with ExitStack() as stack:
        for target, name, value in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *args, **rest: True),
            (torch.cuda, "get_device_capability", lambda *args: capability),
            (torch.Tensor, "pin_memory", lambda self, *args: self),
            (transformers.masking_utils, "is_tracing", lambda *args: False),
            (foreach, "_foreach_supported_types", [*foreach._foreach_supported_types, FakeTensor]),
            (torch, "Generator", lambda device="cpu": real()),
            (torch.nn.functional, "silu", lambda x, inplace=False: _Silu.apply(x)),
            (torch.nn.functional, "scaled_dot_product_attention", _sdpa(trace, capability)),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.callback(attention._capability.cache_clear)
        attention._capability.cache_clear()
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(trace)
        yield trace


class Rows:
    """Rows of given lengths, in the place of tokenized data."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = numpy.array(lengths, dtype=numpy.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> tuple[Any, Any]:
        """Ids, and the second half of them trained on."""
        length = int(self.lengths[index])
        return numpy.ones(length, dtype=numpy.int32), numpy.arange(length) >= length - self.targets(index)

    def targets(self, index: int) -> int:
        """Half of a row."""
        return int(self.lengths[index]) // 2


class Packed4bit(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """bitsandbytes' Linear4bit, whose weight cannot be a subclass of a fake tensor: the same call."""

    def __init__(self, linear: torch.nn.Linear, half: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.half = linear.in_features, linear.out_features, half
        packed, self.state = bitsandbytes.functional.quantize_4bit(
            linear.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.weight.quant_state, self.compute_dtype, self.bias = self.state, half, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As Linear4bit does it."""
        found = bitsandbytes.matmul_4bit(x.to(self.half), self.weight, bias=None, quant_state=self.state)
        return found.to(x.dtype)


def build(setup: Setup) -> Any:
    """The frozen base on the fake card, as the pool of bases would load it."""
    half = modes.HALVES[setup.half]
    values = {**known_models()[setup.model], **setup.config, "num_hidden_layers": setup.layers}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config._attn_implementation = "sdpa"
    dtype = torch.float32 if setup.quantization == "fp32" else half
    with (
        torch.device("cuda"),
        patch.object(transformers.modeling_utils.PreTrainedModel, "init_weights", lambda self: None),
    ):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if setup.quantization == "nf4":
        for name, layer in list(base.named_modules()):
            if type(layer) is torch.nn.Linear and layer is not base.get_output_embeddings():
                parent, _, child = name.rpartition(".")
                setattr(base.get_submodule(parent), child, Packed4bit(layer, half))
    code, usual = sys.modules[type(base).__module__], "apply_rotary_pos_emb"
    setattr(code, usual, getattr(code, f"_{usual}", getattr(code, usual)))
    if setup.fused:
        setattr(code, f"_{usual}", getattr(code, usual))
        fuse(base)
    base.requires_grad_(False)
    base.config.use_cache = False
    base.eval()
    together = read_together(base, Parts(base).linears)
    setattr(base, KNOWN, Known(together=together))
    for found_once in (losses._PLAIN, attention._AGREES):  # by comparing numbers: there are none
        setattr(base, found_once, True)
    return base


@dataclass
class Traced:
    """A base on the fake card, ready to train."""

    setup: Setup
    trace: Trace
    base: Any
    shop: Shop
    base_bytes: int

    @classmethod
    def on(cls, setup: Setup, trace: Trace) -> Traced:
        """Build the base."""
        base, rows = build(setup), Rows(setup.rows)
        stats = SimpleNamespace(tokens=sum(setup.rows), target_tokens=sum(setup.rows) // 2)
        shop = Shop(
            data=SimpleNamespace(train=rows, valid=rows, train_stats=stats),  # type: ignore[arg-type]
            model_path=Path(),
            checkpoint_path=Path(),
            device="cuda:0",
            targets="all-linear",
            base_name="",
            seed=0,
            pad=0,
            beat=lambda *args: None,
            stopping=lambda: False,
            peak_bytes=lambda: trace.peak,
            start_peak=trace.start_peak,
            half=setup.half,
        )
        trace.clear()
        return cls(setup, trace, base, shop, trace.live)

    def segment(self, number: int) -> Segment:
        """What a member trains."""
        setup = self.setup
        params: dict[str, str | int | float | bool] = {"quantization": setup.quantization, "rank": setup.rank}
        params |= {"learning_rate": 1e-4, "dropout": setup.dropout}
        count = len(setup.rows)
        return Segment(
            trial_id=number,
            params=params,
            seed=number,
            rung=0,
            start_tokens=0,
            stop_tokens=10**12,
            schedule=Schedule(0, 10**12),
            batch_size=count,
            micro_batch=setup.micro_batch or count,
            recompute=setup.recompute,
        )

    def adapter(self) -> Adapter:
        """What PEFT would make, without asking it: it looks into the classes of layers."""
        setup, head = self.setup, self.base.get_output_embeddings()
        layers = {n: m for n, m in self.base.named_modules() if hasattr(m, "in_features") and m is not head}
        sides = ("in_features", "out_features")
        a, b = (
            {n: torch.zeros(setup.rank, getattr(m, side), device="cuda") for n, m in layers.items()}
            for side in sides
        )
        config = {"lora_alpha": 2 * setup.rank, "r": setup.rank, "lora_dropout": setup.dropout}
        return Adapter(a, b, config)

    @contextmanager
    def training(self) -> Iterator[tuple[GangTraining, Gang]]:
        """Members at the beginning of a step."""
        members = [Member._new(self.segment(n), self.shop, self.adapter()) for n in range(self.setup.members)]
        for member in members:  # its own order of the data would ask fake tensors for numbers
            member.order.step_rows = lambda step: list(range(len(self.setup.rows)))  # type: ignore[method-assign]
        training = GangTraining(self.base, self.shop, members, len(members), self.setup.recompute)
        gang = Gang(self.base, [m.adapter for m in members])
        mode = training_mode(self.base, recompute=self.setup.recompute, torch_compile=False)
        with mode, gang.worn():
            yield training, gang


@dataclass(frozen=True)
class Step:
    """What one optimizer step of all members did, once their states existed."""

    kernels: tuple[Kernel, ...]
    passes: int
    waits: Mapping[str, int]
    meetings: Mapping[str, int]
    widths: frozenset[int]
    base_bytes: int
    peak_bytes: int


def step(traced: Traced, warm: int = 1) -> Step:
    """The step after ``warm`` others."""
    trace = traced.trace
    with traced.training() as (training, gang):
        for number in range(warm + 1):
            trace.clear()
            passes = 0
            while training.members[0].steps == number:
                training.step_on(gang, training.members)
                passes += 1
        return _record(traced, passes)


def evaluation(traced: Traced, rows: int = 8) -> Step:
    """An evaluation of as many rows."""
    with traced.training() as (training, _):
        pass
    trace = traced.trace
    trace.clear()
    training.evaluate(rows, training.members[:1], rows)
    return _record(traced, 1)


def _record(traced: Traced, passes: int) -> Step:
    trace = traced.trace
    found = Step(
        kernels=tuple(trace.kernels),
        passes=passes,
        waits=dict(trace.waits),
        meetings=dict(trace.meetings),
        widths=frozenset(trace.widths),
        base_bytes=traced.base_bytes,
        peak_bytes=trace.peak,
    )
    return found


def traced_step(setup: Setup) -> Step:
    """Build, train two steps and tell of the second."""
    with fake_card(setup.capability) as trace:
        return step(Traced.on(setup, trace))


def foreseen(setup: Setup) -> float:
    """Bytes that ``plan`` expects torch's allocator to give at most, in a step of these rows in one pass."""
    shape = shape_of({**known_models()[setup.model], **setup.config, "num_hidden_layers": setup.layers})
    width = -(-max(setup.rows) // CARD_WIDTHS) * CARD_WIDTHS
    training = Training(
        setup.quantization,
        rank=setup.rank,
        micro_batch=setup.micro_batch or len(setup.rows),
        length=width,
        recompute=setup.recompute,
        gang=setup.members,
        dropout=bool(setup.dropout),
        repeated=setup.capability < attention.GROUPED_FROM,
    )
    return estimate(shape, training).allocated


def per_layer(few: Setup, more: int = 2) -> tuple[float, float]:
    """(kernels, bytes) that each further layer adds to a step."""
    small, large = traced_step(few), traced_step(replace(few, layers=few.layers + more))
    kernels = (len(large.kernels) - len(small.kernels)) / more
    moved = sum(k.bytes for k in large.kernels) - sum(k.bytes for k in small.kernels)
    return kernels, moved / more
