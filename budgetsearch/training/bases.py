"""Base models: one frozen, quantized copy of each kind stays resident while memory allows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from budgetsearch.core.bases import Base, one_of
from budgetsearch.core.errors import ModelError
from budgetsearch.core.targets import ALL_LINEAR, EXPERTS, words_of
from budgetsearch.machine.anatomy import PACKED, checkpoint_of, experts_of, refused_by, text_part
from budgetsearch.training.attention import agrees
from budgetsearch.training.classes import class_name_of, class_of, config_of, other_of, short
from budgetsearch.training.experts import pack_experts
from budgetsearch.training.fused import fuse
from budgetsearch.training.gang import set_submodule
from budgetsearch.training.losses import has_plain_head
from budgetsearch.training.memory import empty_cache, free, is_memory_error, wake
from budgetsearch.training.modes import HALVES
from budgetsearch.training.parts import Parts
from budgetsearch.training.targets import KNOWN, Known, leaves

RESIDENT_SHARE = 0.5
"""Another copy is loaded beside the resident ones only into so much of the free memory."""


class BasePool:
    """Loads base models under their quantizations and keeps them."""

    def __init__(
        self,
        path: str,
        device: str,
        *,
        trust_remote_code: bool = False,
        half: str = "bf16",
        plainly: Callable[[str], None] = lambda why: None,
        targets: str = ALL_LINEAR,
        paths: Mapping[str, str] | None = None,
    ) -> None:
        """``plainly`` hears why a base on a card wears no fused kernels. ``paths``: of several models, by
        label; bases are then called by model and quantization."""
        self.device, self.trust_remote_code, self.half = device, trust_remote_code, half
        self._plainly = plainly
        self.targets = targets
        self.paths = paths or {"": path}
        self._models: dict[str, Any] = {}
        self._bytes: dict[str, int] = {}

    def get(self, name: str) -> tuple[Any, float]:
        """(the model in eval mode without gradients, seconds that loading took; 0 if resident).

        Raises:
            ModelError: there is no such model, or not under this quantization.
        """
        if name in self._models:
            return self._models[name], 0.0
        start, base = time.monotonic(), Base.parse(name)
        path = one_of(self.paths, base.model)
        self._make_room(path if base.model else "")
        model = load_base(
            path,
            base.quantization,
            self.device,
            trust_remote_code=self.trust_remote_code,
            half=self.half,
            plainly=self._plainly,
            targets=self.targets,
        )
        self._models[name] = model
        self._bytes[name] = model.get_memory_footprint()
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

    def _make_room(self, other: str) -> None:
        """A 24 GB card holds one 7B variant while training: the others go first. An ``other`` model may be
        larger than those here: the files in this folder tell its size."""
        if not self._models:
            return
        files = Path(other).glob("*.safetensors") if other else ()
        largest = max(*self._bytes.values(), sum(file.stat().st_size for file in files))
        if largest > RESIDENT_SHARE * self._free_bytes():
            for name in list(self._models):
                self.drop(name)

    def _free_bytes(self) -> int:
        if self.device == "cpu":
            return int(psutil.virtual_memory().available)
        empty_cache(self.device)  # or what the last job's tensors took would look taken
        return int(torch.cuda.mem_get_info(self.device)[0])


def load_base(
    path: str,
    quantization: str,
    device: str,
    *,
    trust_remote_code: bool = False,
    half: str = "bf16",
    plainly: Callable[[str], None] = lambda why: None,
    targets: str = ALL_LINEAR,
) -> Any:
    """The base model under one quantization (fp32, bf16, int8, nf4), frozen, on ``device``.

    nf4 uses double quantization (4.13 bits per weight, QLoRA) and computes in ``half``, on the CPU in
    fp32, where 16 bits are slower than their worth. A card without bf16 units (T4, V100) holds what is
    called bf16 as fp16.

    Of a model that also sees or hears only what text runs through is kept. Fused experts take 4 bits under
    nf4, unless they are ``targets`` of adapters. On a card it wears Liger's kernels where they work;
    ``plainly`` hears why not. The card is woken as a worker's is, for whoever has no workshop.

    Raises:
        ModelError: the folder does not hold a causal language model, or not under this quantization.
    """
    wake(device)
    model = whole_base(
        path, quantization, device, trust_remote_code=trust_remote_code, half=half, targets=targets
    )
    keep_bits(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    model.eval()
    if device != "cpu" and (unfused := fuse(model, device)):
        plainly(unfused)
    _keep_what_runs(model, config_of(path, trust_remote_code=trust_remote_code), quantization)
    free(device)
    _check_quantized(model, quantization)
    has_plain_head(model)  # found out while it is bare, and so is the next
    agrees(model)
    return model


def whole_base(
    path: str,
    quantization: str,
    device: str,
    *,
    trust_remote_code: bool = False,
    half: str = "bf16",
    targets: str = EXPERTS,
) -> Any:
    """The model of a folder with all its parts, as transformers loads it under this quantization; fused
    experts in 4 bits as well, under nf4, unless they are among ``targets``.

    Raises:
        ModelError: the folder does not hold a causal language model, or not under this quantization.
    """
    compute = torch.float32 if device == "cpu" else HALVES[half]
    config = config_of(path, trust_remote_code=trust_remote_code)
    found = class_of(config, path, trust_remote_code=trust_remote_code)
    checkpoint = checkpoint_of(config.to_dict())
    if quantization in (why := refused_by(checkpoint)):
        raise ModelError(f"The base model in {path} cannot be loaded as {quantization}: {why[quantization]}")
    options: dict[str, Any] = {"dtype": compute}
    if quantization in ("fp32", "bf16"):
        options["dtype"] = torch.float32 if quantization == "fp32" else HALVES[half]
        if checkpoint in PACKED:
            options["quantization_config"] = _unpacked(checkpoint)
    elif not checkpoint:
        options["quantization_config"] = _bitsandbytes(quantization, compute)
    packs = quantization == "nf4" and not checkpoint and EXPERTS not in words_of(targets)
    staged = packs and experts_of(text_part(config.to_dict())) > 0  # in 16 bits they may be too much
    try:
        model, about = found.from_pretrained(
            path,
            device_map={"": "cpu" if staged else device},
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        said = short(error)
        raise ModelError(f"The base model in {path} cannot be loaded as {quantization}: {said}") from error
    if missing := sorted(about["missing_keys"]):
        raise ModelError(
            f"{path} lacks weights that {class_name_of(config, found)} needs ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); they would be random. Use a whole language model."
        )
    if packs and (fused := Parts(model).fused):
        pack_experts(model, fused, device)
    if staged:
        model.to(device)
    return model


def _keep_what_runs(model: Any, config: Any, quantization: str) -> None:
    """Give up the towers that text does not run through, and remember the layers of the blocks that it does
    not, or that change nothing of what comes out: an adapter there would never learn anything.

    Raises:
        ModelError: four tokens do not run through the model.
    """
    parts = Parts(model)
    watched = [part for name in parts.towers for part in model.get_submodule(name).modules()]
    try:
        reached, learning = probed(model, watched, parts.linears)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        if is_memory_error(error):
            raise
        raise ModelError(
            f"Four tokens do not run through {type(model).__name__} as {quantization} in this release of "
            f"transformers ({type(error).__name__}: {short(error)}). Another quantization or base may do."
        ) from error
    useless = [place for name in parts.towers for place in _unreached(model, name, reached)]
    known = Known(
        # Where no gradient reaches any of them, as in a head of zeros, that says nothing of the layers.
        idle=frozenset(parts.linears.keys() - learning if learning else ()),
        given_up=tuple(name for name, _ in model.named_modules() if _is_in(name, useless)),
        other=other_of(config, model),
        together=read_together(model, parts.linears),
    )
    setattr(model, KNOWN, known)
    for name in useless:
        set_submodule(model, name, torch.nn.Module())


def _unreached(model: Any, name: str, reached: set[int]) -> list[str]:
    """The topmost modules from this one on that nothing runs through, by their names."""
    module = model.get_submodule(name)
    if id(module) not in reached:
        return [name] if not reached.intersection(map(id, module.modules())) else []
    children = (child for child, _ in module.named_children())
    return [place for child in children for place in _unreached(model, f"{name}.{child}", reached)]


def _is_in(name: str, places: Sequence[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def probed(model: Any, watched: Sequence[Any], linears: Mapping[str, Any]) -> tuple[set[int], set[str]]:
    """(ids of the watched modules that four tokens run through, linear layers that a gradient reaches)."""
    reached: set[int] = set()
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.retain_grad()
                outputs[name] = output

        return hook

    hooks = [part.register_forward_pre_hook(lambda part, *_: reached.add(id(part))) for part in watched]
    hooks += [layer.register_forward_hook(keep(name)) for name, layer in linears.items()]
    embedding = model.get_input_embeddings()
    hooks.append(embedding.register_forward_hook(lambda *given: given[2].detach().requires_grad_(True)))
    try:
        with torch.enable_grad():
            ids = torch.arange(1, 5, device=embedding.weight.device).unsqueeze(0)
            # Their sum: of a mean over a large vocabulary little is left of gradients in fp16.
            model(input_ids=ids, use_cache=False).logits.float().square().sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    learning = {name for name, output in outputs.items() if output.grad is not None and output.grad.any()}
    return reached, learning


def read_together(model: Any, linears: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The layers in groups that read one and the same tensor, in the order in which they do."""
    groups: list[tuple[Any, list[str]]] = []

    def look(name: str, x: Any) -> None:
        known = next((names for seen, names in groups if seen is x), None)
        if known is None:
            groups.append((x, [name]))
        else:
            known.append(name)

    hooks = [
        layer.register_forward_pre_hook(lambda part, given, name=name: look(name, given[0]))
        for name, layer in linears.items()
    ]
    try:
        with torch.no_grad():
            ids = torch.arange(1, 5, device=model.get_input_embeddings().weight.device).unsqueeze(0)
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(tuple(dict.fromkeys(names)) for _, names in groups)


def _check_quantized(model: Any, quantization: str) -> None:
    """Insist that the layers that adapters go to are what the quantization says.

    Raises:
        ModelError: some are not.
    """
    layers = Parts(model).linears
    if "bitsandbytes" not in sys.modules and quantization not in ("int8", "nf4"):
        return  # without it, whose import takes seconds, nothing is made of its layers
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kind = {"nf4": Linear4bit, "int8": Linear8bitLt}.get(quantization)
    if kind is None:
        odd = {name: m for name, m in layers.items() if isinstance(m, (Linear4bit, Linear8bitLt))}
    else:
        odd = {name: m for name, m in layers.items() if not isinstance(m, kind)}
    if odd:
        kinds = sorted({type(module).__name__ for module in odd.values()})
        raise ModelError(
            f"Under {quantization} {len(odd)} of {len(layers)} linear layers of this model are "
            f"{', '.join(kinds)} ({leaves(odd)}): that is not {quantization}. bf16 and fp32 work."
        )


def _unpacked(checkpoint: str) -> Any:
    """What makes transformers unpack such a checkpoint while it loads."""
    from transformers import FineGrainedFP8Config, Mxfp4Config

    return {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}[checkpoint](dequantize=True)


def keep_bits(model: Any) -> None:
    """Stop bitsandbytes from repacking nf4 weights at the first evaluation on a CPU with AVX512-BF16.

    The packed form rounds the scales to bf16 for good, so a trial would see another base after the
    first evaluation than before it, and a reported loss could not be measured again.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


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
