"""Peaks that others have published, to hold the estimate against; docs/memory.md shows the table."""

from __future__ import annotations

from dataclasses import dataclass, replace

from budgetsearch.machine.configs import known_models
from budgetsearch.machine.memory import GIB, Training, estimate, kept_per_token
from budgetsearch.machine.shapes import shape_of

GB = 10**9
LITGPT = "litgpt's table of fine-tuning runs, A100 40 GB"
TORCHTUNE = "torchtune's recipe page, RTX 4090"
KEEPS = "its bitsandbytes kept the input of every 4-bit product, which the installed one does not"
SEVEN, THIRTEEN, EIGHT = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf", "meta-llama/Llama-3.1-8B"


@dataclass(frozen=True)
class Published:
    """A run of somebody else's trainer, whose peak by the allocator is known."""

    name: str
    model: str
    training: Training
    peak_bytes: float
    source: str
    kept: str = ""
    """Layers whose inputs that trainer kept although they had no adapter; as ``Training.targets``."""
    why: str = ""
    """Why it kept them."""


def _litgpt(name: str, model: str, quantization: str, gb: float, micro_batch: int = 1) -> Published:
    training = Training(quantization, 8, "q_proj,v_proj", micro_batch, 1304)
    if quantization == "bf16":
        return Published(name, model, training, gb * GB, LITGPT)
    return Published(name, model, training, gb * GB, LITGPT, "all-linear", KEEPS)


PUBLISHED = (
    _litgpt("7B bf16", SEVEN, "bf16", 21.30),
    _litgpt("7B bf16, micro-batch 2", SEVEN, "bf16", 29.07, 2),
    _litgpt("7B nf4", SEVEN, "nf4-single", 14.14),
    _litgpt("7B nf4, double quantized", SEVEN, "nf4", 13.84),
    _litgpt("13B bf16", THIRTEEN, "bf16", 38.12),
    _litgpt("13B nf4", THIRTEEN, "nf4-single", 23.14),
    _litgpt("13B nf4, double quantized", THIRTEEN, "nf4", 22.55),
    Published(
        "8B bf16, checkpointing",
        EIGHT,
        Training("bf16", 8, "all-linear", 2, 2048, recompute=True),
        16.2 * GIB,
        TORCHTUNE,
    ),
    Published(
        "8B nf4, checkpointing",
        EIGHT,
        Training("nf4", 8, "all-linear", 2, 2048, recompute=True),
        7.4 * GIB,
        TORCHTUNE,
    ),
)


def estimated(run: Published, *, as_kept: bool) -> float:
    """Bytes that the allocator would see; ``as_kept``: with the inputs that that trainer kept."""
    shape = shape_of(known_models()[run.model], run.model)
    found = estimate(shape, run.training).allocated
    if as_kept and run.kept:
        kept = replace(run.training, targets=run.kept)
        more = kept_per_token(shape, kept) - kept_per_token(shape, run.training)
        found += shape.layers * run.training.micro_batch * run.training.length * more
    return found


def difference(run: Published, *, as_kept: bool = False) -> float:
    """(estimate - published) / published."""
    return estimated(run, as_kept=as_kept) / run.peak_bytes - 1.0
