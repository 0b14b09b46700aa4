"""Base models: one frozen, quantized copy of each kind stays resident while memory allows."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch

from budgetsearch.core.errors import ModelError
from budgetsearch.training.attention import agrees
from budgetsearch.training.losses import has_plain_head
from budgetsearch.training.memory import empty_cache, free
from budgetsearch.training.modes import HALVES

RESIDENT_SHARE = 0.5
"""Another copy is loaded beside the resident ones only into so much of the free memory."""


class BasePool:
    """Loads quantizations of one base model and keeps them."""

    def __init__(
        self, path: str, device: str, *, trust_remote_code: bool = False, half: str = "bf16"
    ) -> None:
        self.path, self.device, self.trust_remote_code, self.half = path, device, trust_remote_code, half
        self._models: dict[str, Any] = {}
        self._bytes: dict[str, int] = {}

    def get(self, quantization: str) -> tuple[Any, float]:
        """(the model in eval mode without gradients, seconds that loading took; 0 if resident)."""
        if quantization in self._models:
            return self._models[quantization], 0.0
        start = time.monotonic()
        self._make_room(quantization)
        model = load_base(
            self.path,
            quantization,
            self.device,
            trust_remote_code=self.trust_remote_code,
            half=self.half,
        )
        self._models[quantization] = model
        self._bytes[quantization] = model.get_memory_footprint()
        return model, time.monotonic() - start

    def drop(self, quantization: str) -> None:
        """Forget a copy whose state is unknown, after an error."""
        self._models.pop(quantization, None)
        self._bytes.pop(quantization, None)
        free(self.device)

    def bytes_of_others(self, quantization: str) -> int:
        """What the copies beside this one hold."""
        return sum(size for name, size in self._bytes.items() if name != quantization)

    def drop_others(self, quantization: str) -> bool:
        """Forget all copies but this one; whether there were any."""
        others = [name for name in self._models if name != quantization]
        for name in others:
            self.drop(name)
        return bool(others)

    def _make_room(self, quantization: str) -> None:
        """A 24 GB card holds one 7B variant while training: the others go first."""
        if not self._models:
            return
        largest = max(self._bytes.values())
        if largest > RESIDENT_SHARE * self._free_bytes():
            for name in list(self._models):
                self.drop(name)

    def _free_bytes(self) -> int:
        if self.device == "cpu":
            return int(psutil.virtual_memory().available)
        empty_cache(self.device)  # or what the last job's tensors took would look taken
        return int(torch.cuda.mem_get_info(self.device)[0])


def load_base(
    path: str, quantization: str, device: str, *, trust_remote_code: bool = False, half: str = "bf16"
) -> Any:
    """The base model under one quantization (fp32, bf16, int8, nf4), frozen, on ``device``.

    nf4 uses double quantization (4.13 bits per weight, QLoRA) and computes in ``half``, on the CPU in
    fp32, where 16 bits are slower than their worth. A card without bf16 units (T4, V100) holds what is
    called bf16 as fp16.

    Raises:
        ModelError: the folder does not hold a causal language model.
    """
    from transformers import AutoModelForCausalLM

    compute = torch.float32 if device == "cpu" else HALVES[half]
    options: dict[str, Any] = {"dtype": compute}
    if quantization in ("fp32", "bf16"):
        options["dtype"] = torch.float32 if quantization == "fp32" else HALVES[half]
    else:
        options["quantization_config"] = _bitsandbytes(quantization, compute)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, device_map={"": device}, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The base model in {path} cannot be loaded as {quantization}: {error}") from error
    _keep_bits(model)
    if device != "cpu":
        _use_liger(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    model.eval()
    has_plain_head(model)  # found out while it is bare, and so is the next
    agrees(model)
    return model


def _keep_bits(model: Any) -> None:
    """Stop bitsandbytes from repacking nf4 weights at the first evaluation on a CPU with AVX512-BF16.

    The packed form rounds the scales to bf16 for good, so a trial would see another base after the
    first evaluation than before it, and a reported loss could not be measured again.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def _use_liger(model: Any) -> None:
    """Liger's fused norms, rotations and activations, where they are installed and know the model.

    The loss is left as it is: it is fused here already, and over completion tokens only.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        return
    _apply_liger_kernel_to_instance(
        model=model, rope=True, cross_entropy=False, fused_linear_cross_entropy=False
    )


def _bitsandbytes(quantization: str, compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    raise ModelError(f"Quantization {quantization!r} is unknown: use fp32, bf16, int8 or nf4.")
