"""A GGUF file of a merged model, with the names of package ``gguf`` and what transformers reads back.

What a family does to its weights on the way is found out from transformers' reader, which undoes it: only
such as move rows or add a constant can be done here. Everything else is llama.cpp's own converter's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from budgetsearch.core.errors import ModelError, UsageError
from budgetsearch.tools.export.ggml_tokenizer import add_tokenizer
from budgetsearch.tools.export.wanted import TOLERANCES

SAME_AS = {"mistral": "llama"}
"""Families under another's name in llama.cpp, which computes the same."""
ROPES = ("default", None)
"""Kinds of rotary embeddings that need no factors of their own in the file."""
COARSE = ("q4_0", "q4_1", "q5_0", "q5_1")
FINER = "q8_0"
"""What embeddings and output layer are held in where the blocks are coarser: they lose most."""
CONVERTER = (
    "With llama.cpp: `budgetsearch export RUN --merged`, then `python convert_hf_to_gguf.py "
    "RUN/exports/merged --outfile model.gguf --outtype bf16`"
)
QUANTIZER = "`llama-quantize model.gguf model-{kind}.gguf {kind}` of llama.cpp"


def check_kind(kind: str) -> None:
    """Refuse a type that cannot be made here; found out by trying it on one block.

    Raises:
        UsageError: it names what can, and llama.cpp's command for the others.
    """
    known = [name for name in TOLERANCES if name != "merged"]
    if kind in known and _quantizes(kind):
        return
    can = ", ".join(name for name in known if _quantizes(name))
    raise UsageError(
        f"--gguf {kind}: package gguf cannot quantize to it. Give one of {can}; or make --gguf f16 and "
        f"then run {QUANTIZER.format(kind=kind.upper())}."
    )


def _quantizes(kind: str) -> bool:
    import gguf

    found = getattr(gguf.GGMLQuantizationType, kind.upper(), None)
    try:
        gguf.quants.quantize(numpy.zeros((1, 256), dtype=numpy.float32), found)
    except (NotImplementedError, AttributeError, ValueError, KeyError, TypeError):
        return False
    return True


class Family:
    """How llama.cpp holds models of this kind."""

    def __init__(self, config: Any) -> None:
        """Look it up.

        Raises:
            ModelError: package gguf has no names for it, or transformers could not read them back.
        """
        import gguf
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self.config, kind = config, str(config.model_type)
        kind = SAME_AS.get(kind, kind)
        spellings = (kind, kind.replace("_", "-"), kind.replace("_", ""))
        names = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self.name = next((name for name in spellings if name in names), "")
        self.keys: Mapping[str, str | None] = next(
            (GGUF_CONFIG_MAPPING[name] for name in (kind, *spellings) if name in GGUF_CONFIG_MAPPING), {}
        )
        if not self.name or not self.keys:
            raise ModelError(
                f"Models of kind {config.model_type!r} have no names in package gguf that transformers reads "
                f"back, so a GGUF of this one could not be checked. {CONVERTER}."
            )
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        if rope not in ROPES:
            raise ModelError(
                f"Its rotary embeddings ({rope}) need factors that are not written here. {CONVERTER}."
            )
        self.names = gguf.get_tensor_name_map(names[self.name], int(config.num_hidden_layers))
        found = TENSOR_PROCESSORS.get(self.name, TensorProcessor)
        self._processor = found(config=config.to_dict())

    def tensor_name(self, name: str) -> str:
        """What llama.cpp calls a tensor.

        Raises:
            ModelError: nothing.
        """
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"Package gguf has no name for {name} in {self.name} models. {CONVERTER}.")
        return str(found)

    def written(self, name: str, weight: Any) -> Any:
        """A weight as it lies in the file: what transformers' reader does to it, undone.

        Raises:
            ModelError: that is more than to move rows and to add a constant.
        """
        rows = numpy.arange(weight.shape[0], dtype=numpy.float64)
        probe = rows.reshape(-1, *[1] * (weight.ndim - 1))
        try:
            offset = self._read(name, numpy.zeros_like(probe))
            moved = self._read(name, probe) - offset
        except (ValueError, IndexError, TypeError) as error:
            raise ModelError(
                f"What llama.cpp does to {name} cannot be done here ({error}). {CONVERTER}."
            ) from error
        order = moved.reshape(-1).astype(int)
        if moved.shape != probe.shape or not numpy.array_equal(numpy.sort(order), rows.astype(int)):
            raise ModelError(f"What llama.cpp does to {name} cannot be done here. {CONVERTER}.")
        return weight[numpy.argsort(order)] - numpy.float32(offset.reshape(-1)[0])

    def _read(self, name: str, weights: Any) -> Any:
        return numpy.asarray(self._processor.process(weights.copy(), name=name).weights)

    def facts(self) -> Iterator[tuple[str, Any]]:
        """Keys of the file with what config.json says of them."""
        config = self.config
        for key, named in self.keys.items():
            value = _value(config, named) if named else None
            if value is not None:
                yield key, value
        size = getattr(config, "head_dim", None)
        if size and size * config.num_attention_heads != config.hidden_size:
            yield "attention.key_length", size
            yield "attention.value_length", size


def _value(config: Any, name: str) -> Any:
    if name == "rope_theta":
        return (getattr(config, "rope_parameters", None) or {}).get(name, getattr(config, name, None))
    return getattr(config, name, None)


def write(model: Any, tokenizer: Any, stops: list[int], path: Path, kind: str) -> None:
    """Write a merged model and its tokenizer into one file.

    Raises:
        ModelError: its family or its tokenizer cannot be written here.
    """
    import gguf

    family = Family(model.config.get_text_config())
    writer = gguf.GGUFWriter(path, family.name)
    try:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(kind))
        for key, value in family.facts():
            _add(writer, f"{family.name}.{key}", value)
        add_tokenizer(writer, tokenizer, int(model.config.get_text_config().vocab_size), stops)
        for name, weight in _weights(model):
            written = family.tensor_name(name)
            data = family.written(written, weight)
            _add_tensor(writer, written, numpy.ascontiguousarray(data, dtype=numpy.float32), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _file_type(kind: str) -> int:
    import gguf

    name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    return int(gguf.LlamaFileType[name])


def _add(writer: Any, key: str, value: Any) -> None:
    add: Callable[[str, Any], None] = writer.add_string
    if isinstance(value, bool):
        add = writer.add_bool
    elif isinstance(value, int):
        add = writer.add_uint32
    elif isinstance(value, float):
        add = writer.add_float32
    elif isinstance(value, (list, tuple)):
        add = writer.add_array
    add(key, value)


def _weights(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, float32 array) of each weight, once where two layers share it."""
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            yield name, parameter.detach().to(torch.float32).cpu().numpy()


def _add_tensor(writer: Any, name: str, data: Any, kind: str) -> None:
    """Norms and biases stay float32; a row that no block fits into is held in 16 bits."""
    import gguf

    if data.ndim < 2:
        writer.add_tensor(name, data)
        return
    wanted = FINER if kind in COARSE and re.match(r"(token_embd|output)\.", name) else kind
    found = gguf.GGMLQuantizationType[wanted.upper()]
    if data.shape[-1] % gguf.GGML_QUANT_SIZES[found][0]:
        found = gguf.GGMLQuantizationType.F16
    writer.add_tensor(name, gguf.quants.quantize(data, found), raw_dtype=found)
