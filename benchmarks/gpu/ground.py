"""What the sections of the acceptance stand on: a card under test, random bases, steps of members."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from benchmarks.training.trace import MODEL, Rows
from budgetsearch.core.records import Schedule, Segment
from budgetsearch.machine.configs import known_models
from budgetsearch.machine.memory import MemoryParts, Training, estimate
from budgetsearch.machine.shapes import shape_of
from budgetsearch.training import memory
from budgetsearch.training.adapters import Adapter
from budgetsearch.training.bases import read_together
from budgetsearch.training.fused import fuse
from budgetsearch.training.gang import Gang
from budgetsearch.training.members import Member, Shop
from budgetsearch.training.modes import HALVES, training_mode
from budgetsearch.training.parts import Parts
from budgetsearch.training.recipe import GangTraining
from budgetsearch.training.targets import KNOWN, Known

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 300}
SHAPES: Mapping[str, Mapping[str, Any]] = {"7b": {}, "tiny": TINY}
ROOM = 0.95
"""Of the card's memory, for what a way is foreseen to take."""


@dataclass
class Check:
    """A card under test, and what was found."""

    device: str
    shape: str
    half: str
    seconds: float
    """Of a timed piece."""
    found: dict[str, Any] = field(default_factory=dict)
    unmet: list[str] = field(default_factory=list)
    _bases: dict[str, Any] = field(default_factory=dict)

    @property
    def on_card(self) -> bool:
        """Wants about speed and memory are for a card."""
        return self.device != "cpu"

    def want(self, what: str, met: bool, value: object) -> None:
        """Note what is wanted; where it is not met the check fails in the end."""
        self.found.setdefault("wants", {})[what] = {"met": met, "found": value}
        if not met:
            self.unmet.append(f"{what}: {value}")

    def base(self, quantization: str) -> Any:
        """A base of random weights, made on the device."""
        if quantization not in self._bases:
            self._bases.clear()
            memory.free(self.device)
            self._bases[quantization] = make_base(self, quantization)
        return self._bases[quantization]


def config_of(check: Check) -> Any:
    """Of the shape under test."""
    from transformers import AutoConfig

    values = {**known_models()[MODEL], **SHAPES[check.shape]}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def make_base(check: Check, quantization: str) -> Any:
    """As ``load_base`` would return it, without a file: 14 GB of random weights are not worth a disk."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM

    half = HALVES[check.half] if check.on_card else torch.float32
    with torch.device(check.device):
        base = AutoModelForCausalLM.from_config(config_of(check), dtype=half)
    if quantization == "nf4":
        for name, linear in list(base.named_modules()):
            if type(linear) is torch.nn.Linear and linear is not base.get_output_embeddings():
                new = bitsandbytes.nn.Linear4bit(
                    *(linear.in_features, linear.out_features),
                    bias=False,
                    compute_dtype=half,
                    quant_type="nf4",
                    device="meta",  # or its own weights would be drawn, on the CPU
                )
                new.weight = bitsandbytes.nn.Params4bit(
                    linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                parent, _, child = name.rpartition(".")
                setattr(base.get_submodule(parent), child, new.to(check.device))
    base.requires_grad_(False)
    base.config.use_cache = False
    base.eval()
    if check.on_card:
        check.found["fused kernels"] = fuse(base, check.device) or "yes"
    setattr(base, KNOWN, Known(together=read_together(base, Parts(base).linears)))
    return base


class Drawn(Rows):
    """Rows of random tokens: what repeats itself is learnt in a dozen steps, and losses near zero differ by
    multiples."""

    def __init__(self, lengths: Sequence[int], vocabulary: int) -> None:
        super().__init__(lengths)
        self._vocabulary = vocabulary

    def row(self, index: int) -> tuple[Any, Any]:
        """The same ids each time."""
        ids, trained = super().row(index)
        drawn = numpy.random.default_rng(index).integers(self._vocabulary, size=len(ids))
        return drawn.astype(ids.dtype), trained


def shop_of(check: Check, lengths: Sequence[int], folder: Path) -> Shop:
    """Rows of these lengths, half of each trained on."""
    rows, target = Drawn(lengths, config_of(check).vocab_size), sum(lengths) // 2
    stats = SimpleNamespace(tokens=sum(lengths), target_tokens=target, max_row_tokens=max(lengths))
    meter = memory.PeakMeter(check.device)
    return Shop(
        data=SimpleNamespace(train=rows, valid=rows, train_stats=stats),  # type: ignore[arg-type]
        model_path=folder,
        checkpoint_path=folder,
        device=check.device,
        targets="all-linear",
        base_name="random",
        seed=0,
        pad=0,
        beat=lambda *args: None,
        stopping=lambda: False,
        peak_bytes=meter.job,
        start_peak=meter.start,
        half=check.half,
    )


@dataclass(frozen=True)
class Way:
    """How a step is made."""

    quantization: str = "bf16"
    rows: int = 16
    width: int = 208
    rank: int = 16
    dropout: float = 0.0
    recompute: bool = False
    members: int = 1


def foreseen(check: Check, way: Way) -> MemoryParts:
    """What a step of it takes, by the estimate."""
    training = Training(
        way.quantization,
        way.rank,
        micro_batch=way.rows,
        length=way.width,
        recompute=way.recompute,
        gang=way.members,
        dropout=bool(way.dropout),
        repeated=check.half == "fp16",
    )
    return estimate(shape_of(config_of(check).to_dict()), training)


def fitting(check: Check, way: Way, share: float = ROOM) -> Way | None:
    """The same with as many rows as are foreseen to take this share of the card; None: one is too many."""
    total = torch.cuda.get_device_properties(check.device).total_memory if check.on_card else float("inf")
    while way.rows and foreseen(check, way).total > share * total:
        way = replace(way, rows=way.rows // 2)
    return way if way.rows else None


@contextmanager
def stepping(check: Check, way: Way) -> Iterator[Callable[[], float]]:
    """Inside, a function that makes a step of all members and returns its loss."""
    with side_by_side(check, way) as (training, gang):
        members = training.members

        def step() -> float:
            count = members[0].steps
            while members[0].steps == count:
                training.step_on(gang, members)
                if members[0].status is not None:
                    raise ArithmeticError(members[0].detail)
            return members[0].recent[-1]

        yield step


@contextmanager
def side_by_side(check: Check, way: Way) -> Iterator[tuple[GangTraining, Gang]]:
    """Inside, members that wear their adapters."""
    with tempfile.TemporaryDirectory() as name:
        shop = shop_of(check, [way.width] * way.rows, Path(name))
        base = check.base(way.quantization)
        segment = Segment(
            trial_id=0,
            params={
                "quantization": way.quantization,
                "rank": way.rank,
                "learning_rate": 1e-4,
                "dropout": way.dropout,
            },
            seed=0,
            rung=0,
            start_tokens=0,
            stop_tokens=10**12,
            schedule=Schedule(0, 10**12),
            batch_size=way.rows,
            micro_batch=way.rows,
            recompute=way.recompute,
        )
        segments = [replace(segment, trial_id=n, seed=n) for n in range(way.members)]
        members = [Member._new(s, shop, _adapter(base, s)) for s in segments]
        training = GangTraining(base, shop, members, len(members), way.recompute)
        gang = Gang(base, [m.adapter for m in members])
        with training_mode(base, recompute=way.recompute, torch_compile=False), gang.worn():
            yield training, gang


def _adapter(base: Any, segment: Segment) -> Adapter:
    return Adapter.fresh(base, segment.params, targets="all-linear", seed=segment.seed, base_name="random")


def wait(check: Check) -> None:
    """Until the card has done everything."""
    if check.on_card:
        torch.cuda.synchronize(check.device)
