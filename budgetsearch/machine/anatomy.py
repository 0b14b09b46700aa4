"""The parts of a base model from the names and sizes of its tensors, as its files' headers tell: no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import ModelError
from budgetsearch.core.targets import part_of

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What the families call the number of routed experts."""
TEXT = ("text_config", "llm_config", "language_config")
"""Where a model that also sees keeps the sizes of its language part."""
BACK = r"down|w2|out|fc2"
"""In the name of an expert's matrix that leads back to the hidden state."""
GATE_WIDTH = 8
"""A layer with fewer inputs or outputs is a gate or a set of coefficients: no low rank is below it."""
MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
"""Families in which PEFT refuses adapters on a layer ``out_proj``."""
MOST_HEADER = 2**27
"""Bytes: a header that claims more is no header."""

BUFFER = r"(inv_freq|masked_bias|position_ids|slope_rate|(query|key|diagonal)_decay|rotary_emb\.\w+)$"
"""Names of tensors that a file may hold and nobody learns."""
PACKED = frozenset({"mxfp4", "fp8"})
"""Quantizations of checkpoints that transformers unpacks to 16 or 32 bits while it loads them."""
QUANTIZATIONS = ("fp32", "bf16", "int8", "nf4")
ORIGINAL = "Use the model that it was made from."
COPY = "For others `budgetsearch unpack MODEL FOLDER` writes an unpacked copy."

Table = Mapping[str, tuple[int, ...]]
"""The shape of each tensor of a model, by its name."""


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model."""
    parts = (config.get(name) for name in TEXT)
    return next((part for part in parts if isinstance(part, Mapping) and part.get("model_type")), config)


def experts_of(config: Mapping[str, Any]) -> int:
    """Routed experts of a block; 0: none."""
    found = (config.get(key) for key in EXPERTS)
    return next((n for n in found if isinstance(n, int) and n > 1), 0)


def checkpoint_of(config: Mapping[str, Any]) -> str:
    """How a checkpoint is quantized: nf4, int8, or transformers' name of another way; empty: not at all."""
    found = config.get("quantization_config") or text_part(config).get("quantization_config")
    if not found:
        return ""
    found = found if isinstance(found, Mapping) else found.to_dict()
    if found.get("load_in_4bit"):
        return str(found.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if found.get("load_in_8bit") else str(found.get("quant_method", "unknown"))


def refused_by(checkpoint: str) -> dict[str, str]:
    """Quantizations that cannot be had of a checkpoint that is quantized so, and why."""
    if checkpoint in ("nf4", "int8"):
        why = f"the checkpoint is quantized already: it is {checkpoint} and nothing else. {COPY}"
        return {name: why for name in QUANTIZATIONS if name != checkpoint}
    if checkpoint in PACKED:
        why = f"the checkpoint is quantized already ({checkpoint}) and is unpacked for bf16 and fp32. {COPY}"
        return dict.fromkeys(("int8", "nf4"), why)
    if checkpoint:
        why = f"the checkpoint is quantized already ({checkpoint}), which is not trained on here. {ORIGINAL}"
        return dict.fromkeys(QUANTIZATIONS, why)
    return {}


def table_of(folder: Path) -> Table:
    """The tensors in the safetensors files of a folder, from their headers.

    Raises:
        ModelError: there are none, they cannot be read, or they are packed so that sizes do not show.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                header = read_json(handle.read(min(length, MOST_HEADER)))
            for name, about in header.items():
                if name != "__metadata__":
                    found |= _sized(name, str(about["dtype"]), tuple(int(n) for n in about["shape"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} has no header that can be read ({error}); fetch it again") from error
    if not found:
        raise ModelError(f"{folder} holds no safetensors files")
    return found


def _is_head(name: str) -> bool:
    return re.search(r"(^|\.)(lm_head|embed_out|output)\.\w+$|^head\.\w+$", name) is not None


def _sized(name: str, kind: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """A tensor as it is once it is unpacked; scales, masks and tables of positions are no weights."""
    if name.endswith(("_blocks", "_packed")) and kind == "U8":  # two 4-bit numbers a byte
        return {name.rpartition("_")[0]: (*shape[:-2], 2 * prod(shape[-2:]))}
    if re.search(
        r"(_scales?|_scale_inv|\.absmax|\.quant_map|\.quant_state\.\w+|\.SCB|\.weight_format)$", name
    ):
        return {}
    if re.search(BUFFER, name) or (len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3] > 1):
        return {}
    if kind in ("U8", "I8", "I32"):
        raise ModelError(f"{name} is packed, so its size does not show")
    return {name: shape}


@dataclass(frozen=True)
class Tensors:
    """What the tensors of a model are."""

    table: Table
    config: Mapping[str, Any]
    """config.json, whole."""

    @cached_property
    def text(self) -> Mapping[str, Any]:
        """The language part of the configuration."""
        return text_part(self.config)

    @cached_property
    def place(self) -> str:
        """What comes before the names of the language part, with its dot; from where the embeddings lie.

        Raises:
            ModelError: no tensor looks like embeddings.
        """
        vocab = int(self.text.get("vocab_size") or 0)
        rows = [n for n, shape in self.table.items() if len(shape) == 2 and shape[0] >= vocab > 0]
        named = [n for n in rows if re.search(r"emb|wte|tok", n) and not re.search(r"embed_out|per_layer", n)]
        if not named:
            raise ModelError("no tensor of the model looks like its embeddings")
        place = min(named, key=len)
        while place:
            place = place.rstrip(".").rpartition(".")[0]
            place = f"{place}." if place else ""
            if any(re.match(rf"{re.escape(place)}\w+\.\d+\.", name) for name in self.table):
                break
        return place

    @cached_property
    def blocks(self) -> dict[str, list[str]]:
        """Names of the tensors of the blocks, by the block's name."""
        depth = int(self.text.get("num_hidden_layers") or 10**6)
        found: dict[str, list[str]] = {}
        for name in self.table:
            match = re.match(rf"({re.escape(self.place)}\w+\.(\d+))\.", name)
            if match and int(match[2]) < depth:  # beyond are layers that predict several tokens at once
                found.setdefault(match[1], []).append(name)
        return found

    @cached_property
    def kept(self) -> dict[str, int]:
        """Weights of every tensor of the language part with its head."""
        inside = {name for names in self.blocks.values() for name in names}
        return {
            name: prod(shape)
            for name, shape in self.table.items()
            if name in inside
            or not (self._is_tower(name) or self._is_block(name) or (self.tied and _is_head(name)))
        }

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one matrix."""
        said = self.config.get("tie_word_embeddings", self.text.get("tie_word_embeddings"))
        return bool(said) if said is not None else not any(map(_is_head, self.table))

    def _is_block(self, name: str) -> bool:
        return re.match(rf"{re.escape(self.place)}\w+\.\d+\.", name) is not None

    def _is_tower(self, name: str) -> bool:
        """What sees or hears lies beside the language part, or in it with blocks of its own."""
        if not name.startswith(self.place):
            return not _is_head(name)
        return (not self._is_block(name) and re.search(r"\.\d+\.", name) is not None) or "_extend." in name

    @cached_property
    def experts(self) -> int:
        """Weights of routed experts and their routers."""
        return sum(self.kept[name] for names in self.blocks.values() for name in names if self._routed(name))

    def _routed(self, name: str) -> bool:
        shape, count = self.table[name], experts_of(self.text)
        fused = len(shape) == 3 and count > 0 and shape[0] == count and min(shape[1:]) > 1
        router = count > 0 and len(shape) == 2 and shape[0] == count
        return "experts" in name.split(".")[:-1] or fused or router

    @cached_property
    def linears(self) -> Counter[tuple[str, str, int, int]]:
        """How many linear layers of the blocks have this (set of targets, last part of the name, inputs,
        outputs)."""
        return Counter(
            (
                part_of(name.removesuffix(".weight")),
                name.split(".")[-2],
                self.table[name][1],
                self.table[name][0],
            )
            for names in self.blocks.values()
            for name in names
            if self._is_linear(name)
        )

    @cached_property
    def expert_sizes(self) -> Counter[tuple[int, int]]:
        """How many matrices of routed experts have these (inputs, outputs), as they lie in the model: what
        the files hold one by one is fused there, and so are two that read the same."""
        found: Counter[tuple[int, int]] = Counter()
        apart: dict[str, dict[str, tuple[int, ...]]] = {}
        for name in (name for names in self.blocks.values() for name in names if self._routed(name)):
            shape = self.table[name]
            if len(shape) == 3:
                found[shape[2], shape[1]] += shape[0]
            elif len(shape) == 2 and re.search(r"\bexperts\.\d+\..*weight$", name):
                expert, leaf = name.removesuffix(".weight").rsplit(".", 1)
                apart.setdefault(expert, {})[leaf] = shape
        for matrices in apart.values():
            first = [shape for leaf, shape in matrices.items() if not re.search(BACK, leaf)]
            back = [shape for leaf, shape in matrices.items() if re.search(BACK, leaf)]
            if len({*first}) == 1:
                first = [(len(first) * first[0][0], first[0][1])]
            found.update((inputs, outputs) for outputs, inputs in (*first, *back))
        return found

    def _is_linear(self, name: str) -> bool:
        shape = self.table[name]
        plain = name.endswith(".weight") and len(shape) == 2 and min(shape) >= GATE_WIDTH
        return plain and not self._routed(name) and "router" not in name

    @property
    def weights(self) -> int:
        """All that stays in memory."""
        return sum(self.kept.values())

    def refuses(self, name: str) -> bool:
        """PEFT puts no adapter on such a layer of this family."""
        return name == "out_proj" and str(self.text.get("model_type")) in MAMBA
