"""Memory that training an adapter and answering with it take, foreseen from a model's shape: no weights, no
torch.

The parts are counted, not fitted: what the trainer's layers keep for the backward pass was listed for the
families of ``shapes`` and is checked against what autograd really keeps (tests/machine/test_estimate.py). The
published peaks that it was compared with stand in docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from budgetsearch.core.footprint import Footprint
from budgetsearch.core.space.space import Space
from budgetsearch.core.targets import ALL_LINEAR, EXPERTS, words_of
from budgetsearch.machine.shapes import NORMED, Linear, ModelShape

GIB = 2**30
WEIGHT_BYTES: Mapping[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "int8": 1.0,
    # 4 bits; 8 bits a block of 64 weights; and 32 bits a block of 256 such constants.
    "nf4": 0.5 + 1 / 64 + 4 / (64 * 256),
    # Without double quantization: 32 bits a block of 64.
    "nf4-single": 0.5 + 4 / 64,
}
"""Bytes of one weight of a block's linear layer."""
ADAPTER_BYTES: Mapping[str, int] = {"adamw": 4 + 4 + 8 + 4, "adamw8bit": 4 + 4 + 2 + 4}
"""Of one adapter weight: itself, its gradient, the optimizer's two states, and the average for the rungs."""
CONTEXT_BYTES = GIB // 2
"""CUDA context, kernels and library work spaces, which the allocator does not see: an estimate, replaced
by what NVML sees in the calibration."""
PROCESS_BYTES = int(0.75 * GIB)
"""On the CPU: Python with torch, transformers and PEFT, before the first model. Measured: 0.6 to 0.7 GiB
on two machines' worth of runs; the calibration replaces it."""
LOGITS, LOGIT_ROWS = 2**23, 256
"""Logits that the fused loss holds at a time, in 16 and in 32 bits, and their gradient in 16; on a card so
many rows of them at least."""


LOOKED_LOGITS = 2**27
"""Logits of prompts that a server looks at together: 512 MiB in float32."""


@dataclass(frozen=True)
class Training:
    """What decides about memory, beside the model."""

    quantization: str
    """fp32, bf16, int8, nf4, or nf4-single (without double quantization, for comparisons)."""
    rank: int = 16
    targets: str = "all-linear"
    micro_batch: int = 1
    length: int = 1024
    """Tokens of the longest row."""
    recompute: bool = False
    """Gradient checkpointing."""
    optimizer: str = "adamw"
    gang: int = 1
    dropout: bool = False
    repeated: bool = False
    """Whether keys and values are repeated for grouped heads, as on a card before Ampere."""
    device: str = "cuda"
    """``cpu`` computes in fp32 and has no context on a card."""

    @property
    def compute_bytes(self) -> int:
        """Of one activation: a card computes in 16 bits whatever its base is."""
        return 4 if self.device == "cpu" else 2

    @property
    def copies(self) -> bool:
        """Whether autocast copies the base in 16 bits: each product anew, kept for the backward pass."""
        return self.device != "cpu" and self.quantization == "fp32"

    @property
    def state_bytes(self) -> int:
        """Of one value between the blocks, which is as the base is."""
        return 4 if self.copies else self.compute_bytes


@dataclass(frozen=True)
class MemoryParts:
    """Bytes, by what holds them."""

    base: float
    """Frozen weights."""
    adapters: float
    """Adapters, gradients, optimizer, average."""
    activations: float
    """Kept for the backward pass, and what it works on."""
    logits: float
    quantization: float
    """The largest layer as it is unpacked for a product, or the 16-bit copies of a base in 32 bits."""
    context: float
    """What the allocator does not see."""

    @property
    def allocated(self) -> float:
        """What ``torch.cuda.max_memory_allocated`` would say."""
        return self.base + self.adapters + self.activations + self.logits + self.quantization

    @property
    def total(self) -> float:
        """What NVML would say."""
        return self.allocated + self.context


def estimate(shape: ModelShape, training: Training) -> MemoryParts:
    """Peak bytes of a training step, by part."""
    tokens = training.micro_batch * training.length * training.gang
    return MemoryParts(
        base=base_bytes(shape, training.quantization, training.device, training.targets),
        adapters=training.gang * training.rank * _adapter_bytes_per_rank(shape, training),
        activations=tokens * _activation_bytes_per_token(shape, training),
        logits=_logit_bytes(shape, training),
        quantization=_workspace(shape, training),
        context=PROCESS_BYTES if training.device == "cpu" else CONTEXT_BYTES,
    )


def answering(shape: ModelShape, training: Training) -> MemoryParts:
    """Peak bytes while ``micro_batch`` answers are written at once, of ``length`` tokens with their prompts.

    Keys and values are counted as if every block kept those of every token: of recurrent or sliding blocks it
    is too much.
    """
    tokens, size = training.micro_batch * training.length, training.compute_bytes
    cache = 2 * size * shape.layers * shape.kv_heads * shape.head_width
    live = training.state_bytes * 4 * shape.hidden + size * 3 * shape.wide  # one block's: nothing is kept
    one = training.length * shape.vocab  # a prompt whose tokens are told of is looked at as a whole
    together = min(training.micro_batch * one, max(one, LOOKED_LOGITS))
    return MemoryParts(
        base=base_bytes(shape, training.quantization, training.device, training.targets),
        adapters=4.0 * training.rank * shape.weights_per_rank(training.targets),
        activations=float(tokens * (cache + live)),
        logits=float(size * together + (4 + 4) * one),
        quantization=_workspace(shape, replace(training, recompute=True)),
        context=PROCESS_BYTES if training.device == "cpu" else CONTEXT_BYTES,
    )


def footprint(shape: ModelShape, training: Training) -> Footprint:
    """The same as a rule for every rank, gang and micro-batch; see ``core.footprint``."""
    one, again = (estimate(shape, replace(training, recompute=recompute)) for recompute in (False, True))
    tokens = training.micro_batch * training.length * training.gang
    return Footprint(
        fixed=one.base + one.logits + again.quantization + one.context,
        per_rank=_adapter_bytes_per_rank(shape, training),
        per_token=one.activations / tokens,
        per_token_recompute=again.activations / tokens,
        plain=one.quantization - again.quantization,
    )


def footprints(
    shape: ModelShape, space: Space, *, targets: str, optimizer: str, device: str, half: str = "bf16"
) -> dict[str, Footprint]:
    """The rule of every quantization that the space can ask for. A card that computes in fp16 as its ``half``
    is one before Ampere."""
    dropout = any(space.values_of("dropout"))
    kind = "cpu" if device == "cpu" else "cuda"
    return {
        name: footprint(
            shape,
            Training(
                name,
                targets=targets,
                optimizer=optimizer,
                dropout=dropout,
                repeated=half == "fp16",
                device=kind,
            ),
        )
        for name in space.quantizations
    }


def base_bytes(
    shape: ModelShape, quantization: str, device: str = "cuda", targets: str = ALL_LINEAR
) -> float:
    """Bytes of the frozen base: its blocks under the quantization, the rest as it computes."""
    packed = shape.packed_experts(quantization, targets)
    rest = 4 if quantization == "fp32" or (device == "cpu" and quantization != "bf16") else 2
    shrunk = shape.block_weights + packed
    return shrunk * WEIGHT_BYTES[quantization] + (shape.other_weights - packed) * rest


def kept_per_token(shape: ModelShape, training: Training) -> float:
    """Bytes that autograd keeps of one token in one block, without checkpointing."""
    size, hidden, wide = training.compute_bytes, shape.hidden, shape.wide
    if shape.counted:
        return _kept_by_counted(shape, training)
    q, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    kept = 4.0 * hidden * shape.norms  # norms work in 32 bits
    if shape.family in NORMED:
        kept += 4.0 * (q + kv)
    kept += size * (2 * q + 2 * (q if training.repeated else kv))  # queries and the result, keys and values
    kept += 4.0 * shape.heads  # a sum a head
    fused = {linear.name for linear in shape.linears if linear.reads == "block"}
    if len(fused) == 1:  # values are a view of the fused product, which stays as a whole
        kept += size * (q + kv)
    kept += size * wide * (shape.kept_by_activation + (2 if shape.gated else 0))  # and its result, and up
    targeted = shape.targeted(training.targets)
    kept += size * training.rank * len(targeted)
    return kept + _inputs_per_token(targeted, training)


def _kept_by_counted(shape: ModelShape, training: Training) -> float:
    """As far as it can be told of layers of any kind: norms, every layer's result, and a token's experts' as
    if they were layers of their size. States of recurrent layers are left out, so it may be too little."""
    size, targeted = training.compute_bytes, shape.targeted(training.targets)
    targeted = tuple(linear for linear in targeted if linear not in shape.fused)
    results = sum(linear.share * linear.outputs for linear in shape.linears)
    experts = shape.active * shape.experts / (shape.layers * shape.hidden)
    adapters = training.rank * sum(linear.share for linear in targeted)
    inputs = sum(linear.share * linear.inputs for linear in targeted)
    copies = (size / 2 + bool(training.dropout)) * inputs
    return 8.0 * shape.hidden + size * (results + experts + adapters) + copies


def _inputs_per_token(targeted: tuple[Linear, ...], training: Training) -> float:
    """What adapters keep of the inputs of their layers, one copy for all that read the same; the attention's
    result is kept anyway."""
    read = {linear.reads: linear.inputs for linear in targeted if linear.reads != "attention"}
    masks = sum(linear.inputs for linear in targeted) if training.dropout else 0  # a byte each
    return float(training.compute_bytes * sum(read.values()) + masks)


def _activation_bytes_per_token(shape: ModelShape, training: Training) -> float:
    size, state = training.compute_bytes, training.state_bytes
    block = kept_per_token(shape, training)
    # While the last block goes backward: gradients inside its feed-forward layer, and of the hidden state.
    live = size * 3 * shape.wide + state * 3 * shape.hidden
    if training.recompute:
        return shape.layers * state * shape.hidden + block + live
    return shape.layers * block + live


def _adapter_bytes_per_rank(shape: ModelShape, training: Training) -> float:
    cast = 2 if training.compute_bytes == 2 else 0  # autocast keeps a 16-bit copy during a step
    return float(shape.weights_per_rank(training.targets) * (ADAPTER_BYTES[training.optimizer] + cast))


def _logit_bytes(shape: ModelShape, training: Training) -> float:
    rows = 1 if training.device == "cpu" else LOGIT_ROWS
    head = 2 * shape.vocab * shape.hidden if training.copies else 0
    each = 2 + 4 + 2 if training.compute_bytes == 2 else 4 + 4
    return float(max(LOGITS, rows * shape.vocab) * each + head)


def _workspace(shape: ModelShape, training: Training) -> float:
    return _made_experts(shape, training) + _unpacked(shape, training)


def _made_experts(shape: ModelShape, training: Training) -> float:
    """One block's routed experts as they are made for a pass: unpacked, or with the product of an adapter
    added; that also has gradients."""
    weights = sum(linear.share * linear.weights for linear in shape.fused)
    size = 4 if training.quantization == "fp32" else training.compute_bytes
    if EXPERTS in words_of(training.targets):
        return float(2 * size * weights)
    return float(size * weights) if shape.packed_experts(training.quantization, training.targets) else 0.0


def _unpacked(shape: ModelShape, training: Training) -> float:
    if training.copies:
        return 2.0 * shape.block_weights / (shape.layers if training.recompute else 1)
    if training.quantization in ("fp32", "bf16"):
        return 0.0
    return float(training.compute_bytes * max((linear.weights for linear in shape.linears), default=0))
