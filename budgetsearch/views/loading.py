"""Lines that load a base model as it was in training, with an adapter, or serve the two: for the card and the
report."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

UNPACKING = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""What unpacks a checkpoint that is quantized so."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for ``--max-lora-rank``; without it 16."""


def load_options(quantization: str, device: str, checkpoint: str = "") -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that give the base as it was in training; ``checkpoint``: how that is
    quantized already."""
    if quantization in ("fp32", "bf16"):
        options: dict[str, Any] = {"dtype": "float32" if quantization == "fp32" else "bfloat16"}
        return (
            {**options, "quantization_config": {"dequantize": True}} if checkpoint in UNPACKING else options
        )
    compute = "float32" if device == "cpu" else "bfloat16"
    if checkpoint == quantization:
        return {"dtype": compute}
    if quantization == "int8":
        return {"dtype": compute, "quantization_config": {"load_in_8bit": True}}
    return {
        "dtype": compute,
        "quantization_config": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute,
        },
    }


def load_snippet(
    model: Mapping[str, Any], quantization: str, adapter: str, device: str, *, stops: bool = False
) -> list[str]:
    """Python lines that load base, adapter and tokenizer; ``stops``: the base may end answers elsewhere."""
    parts = _anatomy(model)
    named = str(parts.get("class") or "")
    # What AutoModelForCausalLM takes for this model is what was trained, unless it knows no such model.
    loader = "AutoModelForCausalLM" if parts.get("auto", True) or not named else named
    given, helper = _given(model, quantization, device)
    imports = [loader, "AutoTokenizer", *helper, *(["GenerationConfig"] if stops else [])]
    ends = [f"model.generation_config = GenerationConfig.from_pretrained({adapter!r})"] if stops else []
    return [
        "from peft import PeftModel",
        f"from transformers import {', '.join(imports)}",
        f"base = {loader}.from_pretrained({', '.join([repr(_base(model)), *given])})",
        f"model = PeftModel.from_pretrained(base, {adapter!r})",
        *_packing(parts, quantization),
        *ends,
        f"tokenizer = AutoTokenizer.from_pretrained({adapter!r})",
    ]


def other_snippet(model: Mapping[str, Any], quantization: str, adapter: str, device: str) -> list[str]:
    """Python lines that load the same on the other class of a model that also sees: of the whole, or of its
    text part alone; none where there is no other."""
    parts, base = _anatomy(model), _base(model)
    named, place = str(parts.get("other_class") or ""), str(parts.get("other_language") or "")
    if not named:
        return []
    given, helper = _given(model, quantization, device)
    moved = {f"^{re.escape(str(parts['language']))}\\.": f"{place}."}
    lines, imports = [], [named, *helper]
    if not parts.get("other_is_whole"):
        imports.insert(0, "AutoConfig")
        names = {
            r"^(model\.language_model|language_model\.model)\.": f"{place}.",
            r"^language_model\.lm_head": "lm_head",
        }
        lines = [
            f"config = AutoConfig.from_pretrained({base!r})",
            "text = config.get_text_config()",
            "text.tie_word_embeddings = config.tie_word_embeddings",
        ]
        given = ["config=text", f"key_mapping={names!r}", *given]
    return [
        "from peft import PeftModel",
        f"from transformers import {', '.join(imports)}",
        *lines,
        f"base = {named}.from_pretrained({', '.join([repr(base), *given])})",
        f"model = PeftModel.from_pretrained(base, {adapter!r}, key_mapping={moved!r})",
        *_packing(parts, quantization),
    ]


def _packing(parts: Mapping[str, Any], quantization: str) -> list[str]:
    """Lines that put the routed experts of the base into 4 bits, where training had them so; after PEFT,
    which would take what unpacks them for layers."""
    names = parts.get("packed_experts")
    if quantization != "nf4" or not names or parts.get("checkpoint"):
        return []
    return [
        "from bitsandbytes.nn.parametrize import replace_parameter_4bit",
        "for name, _ in list(base.named_parameters()):",
        f"    if name.endswith({tuple(names)!r}):",
        "        place, _, leaf = name.rpartition('.')",
        "        experts = base.get_submodule(place)",
        "        replace_parameter_4bit(experts, leaf, compress_statistics=True, quant_type='nf4')",
    ]


def transformers_snippet(model: Mapping[str, Any], quantization: str, adapter: str, device: str) -> list[str]:
    """Python lines with which transformers alone loads the adapter and the base that it names."""
    given, helper = _given(model, quantization, device)
    return [
        f"from transformers import {', '.join(['AutoModelForCausalLM', *helper])}",
        f"model = AutoModelForCausalLM.from_pretrained({', '.join([repr(adapter), *given])})",
    ]


def vllm_command(model: Mapping[str, Any], quantization: str, adapter: str, rank: int) -> str:
    """The command that serves base and adapter with vLLM; none where its rank is above what that takes."""
    room = next((most for most in VLLM_RANKS if most >= rank), None)
    if room is None:
        return ""
    packed = " --quantization bitsandbytes" if quantization in ("nf4", "int8") else ""
    return (
        f"vllm serve {shlex.quote(_base(model))} --tokenizer {adapter} --enable-lora --max-lora-rank {room} "
        f"--lora-modules adapter={adapter}{packed}"
    )


def _anatomy(model: Mapping[str, Any]) -> Mapping[str, Any]:
    found = model.get("anatomy")
    return found if isinstance(found, Mapping) else {}


def _base(model: Mapping[str, Any]) -> str:
    return str(model.get("loadable") or model.get("source") or "BASE")


def _given(model: Mapping[str, Any], quantization: str, device: str) -> tuple[list[str], Sequence[str]]:
    """(arguments of ``from_pretrained``, classes that they need)."""
    checkpoint = str(_anatomy(model).get("checkpoint") or "")
    options = load_options(quantization, device, checkpoint)
    given, config = [f"dtype={options['dtype']!r}"], options.get("quantization_config")
    if not config:
        return given, ()
    kind = UNPACKING[checkpoint] if "dequantize" in config else "BitsAndBytesConfig"
    inner = ", ".join(f"{key}={value!r}" for key, value in config.items())
    return [*given, f"quantization_config={kind}({inner})"], (kind,)
