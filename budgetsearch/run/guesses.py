"""What nobody has measured yet: the size of the data, and seconds. Every guess says where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from budgetsearch.core.records import Calibration
from budgetsearch.machine.memory import base_bytes
from budgetsearch.machine.profiles import CardProfile
from budgetsearch.machine.shapes import ModelShape

EFFICIENCY = 0.5
"""Share of a card's peak that long passes reach: 0.85 of what the roofline over the traced kernels comes to
on an A100, where that is 0.6 (docs/training.md). Not measured on a GPU."""
SPEEDS: Mapping[str, float] = {"bf16": 1.0, "fp32": 0.5, "int8": 0.6, "nf4": 0.7}
"""Tokens per second on a card, over those of bf16."""
CPU_SPEEDS: Mapping[str, float] = {"fp32": 1.0, "bf16": 0.67, "int8": 0.62, "nf4": 0.66}
CPU_FLOPS = 60e9
"""Of one core, in fp32."""
CPU_BANDWIDTH = 20e9
"""Bytes a second of a machine's memory."""
CPU_LAYER_SECONDS, LAYER_SECONDS = 5e-3, 2e-3
"""What each layer costs a pass forward and backward, however few tokens are in it. Measured: on two cores
with SmolLM2-135M, and from how much an A100 gains with longer passes (7B and 1.8B)."""
UNKNOWN_TFLOPS, UNKNOWN_BANDWIDTH = 70.0, 600.0
"""Of a card that no profile knows: those of an A10G."""
ANSWER_TOKENS, ANSWERS_AT_ONCE = 128, 8
ANSWER_EFFICIENCY = 0.5
"""Share of the bandwidth that generating answers reaches: each token reads the whole base."""
EVALUATION_SPEED = 2.0
"""Tokens per second of an evaluation, over those of training."""
READ_BYTES, WRITE_BYTES = 1e9, 0.5e9
"""Of a disk, a second."""
TARGET_SHARE = 0.5
"""Share of a row that is completion."""


@dataclass(frozen=True)
class Guess:
    """Something that a plan rests on."""

    what: str
    value: str
    source: str


@dataclass(frozen=True)
class TrainedWith:
    """How the base would be loaded and trained on."""

    quantization: str
    rank: int
    micro_batch: int
    recompute: bool
    pass_tokens: float = 0.0
    """Tokens of a pass; 0: as many rows as the micro-batch has."""


def guess_calibration(
    shape: ModelShape,
    profile: CardProfile,
    way: TrainedWith,
    *,
    cores: int,
    tokens_per_row: float,
    adapter_bytes: float,
    slow: float,
) -> Calibration:
    """What the calibration may find, everything ``slow`` times slower."""
    saturated = tokens_per_second(shape, profile, way.quantization, cores, way.recompute)
    layer = CPU_LAYER_SECONDS if profile.name == "cpu" else LAYER_SECONDS
    tokens = way.pass_tokens or way.micro_batch * tokens_per_row
    rate = 1 / (slow * (1 / saturated + shape.layers * layer / tokens))
    return Calibration(
        quantization=way.quantization,
        status="ok",
        tokens_per_second=rate,
        eval_seconds_per_example=tokens_per_row / (EVALUATION_SPEED * rate),
        checkpoint_seconds=slow * (0.2 + adapter_bytes / WRITE_BYTES),
        load_seconds=slow * (2.0 + base_bytes(shape, "bf16") / READ_BYTES),
        answer_seconds=slow * _answer_seconds(shape, profile, way.quantization),
        micro_batch=way.micro_batch,
        rank=way.rank,
        recompute=way.recompute,
    )


def _answer_seconds(shape: ModelShape, profile: CardProfile, quantization: str) -> float:
    """Of one answer in a batch."""
    on_cpu = profile.name == "cpu"
    bandwidth = CPU_BANDWIDTH if on_cpu else 1e9 * (profile.bandwidth_gbs or UNKNOWN_BANDWIDTH)
    token = base_bytes(shape, quantization, "cpu" if on_cpu else "cuda") / (ANSWER_EFFICIENCY * bandwidth)
    return ANSWER_TOKENS * token / ANSWERS_AT_ONCE


def tokens_per_second(
    shape: ModelShape, profile: CardProfile, quantization: str, cores: int, recompute: bool
) -> float:
    """Of training where the card is saturated."""
    passes = 6.0 if recompute else 4.0
    work = passes * shape.work_weights + 4.0 * TARGET_SHARE * shape.vocab * shape.hidden
    if profile.name == "cpu":
        return cores * CPU_FLOPS * CPU_SPEEDS[quantization] / work
    return EFFICIENCY * (profile.tflops or UNKNOWN_TFLOPS) * 1e12 * SPEEDS[quantization] / work


def speed_guesses(profile: CardProfile, cores: int) -> list[Guess]:
    """What the seconds rest on."""
    reading = Guess("disk", "reads 1 GB/s, writes 0.5 GB/s", "a guess")
    evaluation = Guess("evaluation", "twice the speed of training", "measured on a CPU: 1.4 to 2.5 times")
    layer = CPU_LAYER_SECONDS if profile.name == "cpu" else LAYER_SECONDS
    each = f"{1e3 * layer:.0f} ms a layer beside that"
    passes = Guess("short passes", each, "measured on 2 cores and an A100")
    answers = Guess("answers", f"{ANSWER_TOKENS} tokens each, half of the memory's bandwidth", "a guess")
    if profile.name == "cpu":
        what = "SmolLM2-135M on 2 cores: 270 tokens/s in fp32, 180 bf16, 177 nf4, 168 int8"
        speed = Guess("speed", f"{cores} cores of {CPU_FLOPS / 1e9:.0f} GFLOP/s in fp32", what)
        return [speed, passes, evaluation, answers, reading]
    peak = f"{EFFICIENCY:.0%} of {profile.tflops or UNKNOWN_TFLOPS:g} TFLOP/s"
    source = "0.85 of the kernels' roofline on an A100; measured by others: torchtune 0.34 (3B)"
    if profile.tflops is None:
        source = "this card has no profile: as an A10G. --probe measures it"
    return [
        Guess("speed of bf16", peak, source),
        Guess("speed of nf4", "0.7 times bf16", "torchtune 0.78, litgpt 0.64"),
        passes,
        evaluation,
        answers,
        reading,
    ]
