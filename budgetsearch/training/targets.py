"""Which layers of a base model wear adapters, and how PEFT is told, so that it loads them again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from budgetsearch.core.errors import SettingsError, nearest
from budgetsearch.core.targets import ALL_LINEAR, EXPERTS, SETS, chosen_by, words_of
from budgetsearch.training.classes import Other
from budgetsearch.training.experts import keys_of, module_of
from budgetsearch.training.parts import Parts, joined, tail_of

KNOWN = "_budgetsearch_known"
"""Attribute of a loaded base: what was found out of it, see ``Known``."""


@dataclass(frozen=True)
class Known:
    """What was found out of a base while it was loaded."""

    idle: frozenset[str] = frozenset()
    """The linear layers of its blocks that no gradient reaches."""
    given_up: tuple[str, ...] = ()
    """The modules that are not kept, by their names."""
    other: Other | None = None
    together: tuple[tuple[str, ...], ...] = ()
    """The linear layers of its blocks by the input that they read."""


@dataclass(frozen=True)
class Targets:
    """The layers that wear adapters, and how PEFT is told."""

    names: tuple[str, ...]
    """Full names in the model, in its order; of fused experts what PEFT calls their adapters."""
    modules: list[str] | str
    """PEFT's ``target_modules``: names, or a pattern where names would match too much."""
    parameters: tuple[str, ...] = ()
    """PEFT's ``target_parameters``: fused experts, and layers that it takes for such by their names."""
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Layers without adapters, by why."""
    on_experts: bool = False
    """Whether routed experts wear adapters, all of them."""


def targets_of(model: Any, wanted: str) -> Targets:
    """Which layers of a model get adapters: all linear layers of its blocks that PEFT can put one on and load
    again, or those with the ``wanted`` names or in the sets of these names.

    Raises:
        SettingsError: a name matches nothing that can wear an adapter.
    """
    parts, words = Parts(model), words_of(wanted)
    on_experts = EXPERTS in words
    linears = {**parts.linears, **(parts.expert_linears if on_experts else {})}
    forbidden, moved = _peft_rules(model, linears)
    known: Known = getattr(model, KNOWN, Known())
    left_out: dict[str, list[str]] = {}
    chosen, lost = [], _lost(model, linears)
    for name in _named(parts, words, forbidden):
        leaf = name.rpartition(".")[2]
        packed = type(linears[name]).__module__.startswith("bitsandbytes")
        if leaf in forbidden:
            left_out.setdefault("PEFT refuses adapters on Mamba's", []).append(name)
        elif name in lost:
            left_out.setdefault("PEFT would not load again what is learnt on", []).append(name)
        elif name in known.idle:
            left_out.setdefault("nothing is learnt on", []).append(name)
        elif leaf in moved and packed:
            left_out.setdefault(
                "PEFT takes for fused experts, and those it cannot have quantized:", []
            ).append(name)
        else:
            chosen.append(name)
    fused = parts.fused if on_experts else {}
    if not chosen and not fused:
        raise SettingsError(
            f"--targets {wanted!r} leaves no layer of this model that can wear an adapter; some of: "
            f"{leaves(parts.linears)}."
        )
    parameters = [name for name in chosen if name.rpartition(".")[2] in moved]
    plain = [name for name in chosen if name not in set(parameters)]
    modules = _pattern(model, plain, parts.language, known) if plain else []
    if moved and isinstance(modules, str):  # PEFT would take a pattern apart into last names
        modules = sorted(plain)
    told = {f"{tail_of(name)}.weight" for name in parameters}
    told.update(parts.fused_endings if on_experts else ())
    return Targets(
        (*chosen, *(key for place, names in fused.items() for key in keys_of(place, len(names)))),
        modules,
        tuple(sorted(told)),
        {why: tuple(names) for why, names in left_out.items()},
        on_experts,
    )


def leaves(names: Iterable[str]) -> str:
    """The last parts of these names, for a sentence."""
    return ", ".join(dict.fromkeys(module_of(name).rpartition(".")[2] for name in names))


def _named(parts: Parts, words: Iterable[str], forbidden: frozenset[str]) -> list[str]:
    """The linear layers that the user's words name, every one of which has to mean something."""
    found: set[str] = set()
    for word in words:
        some = {name for name in parts.linears if chosen_by(word, name)}
        if word == EXPERTS:
            some = set(parts.expert_linears)
        if word in forbidden:
            raise SettingsError(f"--targets {word}: PEFT refuses adapters on this layer of a Mamba model.")
        if not some and not (word == EXPERTS and parts.fused):
            raise SettingsError(_no_such(parts, word))
        found |= some
    return [name for name in (*parts.linears, *parts.expert_linears) if name in found]


def _no_such(parts: Parts, word: str) -> str:
    if word == EXPERTS:
        return "--targets experts: this model has no routed experts. Use all-linear."
    known = dict.fromkeys(name.rpartition(".")[2] for name in parts.linears)
    note = " Routed experts are --targets experts; routers wear none." if parts.routed else ""
    return (
        f"--targets {word!r} names no layer of the language part that can wear an adapter"
        f"{nearest(word, (*SETS, *known))}; use {ALL_LINEAR} or some of {', '.join(known)}.{note}"
    )


def _peft_rules(model: Any, linears: Mapping[str, Any]) -> tuple[frozenset[str], frozenset[str]]:
    """(last names that PEFT refuses, last names that it takes for those of fused experts) in this model."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    names = {name.rpartition(".")[2] for name in linears}
    check = getattr(LoraModel, "_check_target_module_compatiblity", None)
    forbidden = set()
    for name in names if check else ():
        try:
            check(None, LoraConfig(target_modules=[name]), model, name)  # type: ignore[misc]
        except ValueError:
            forbidden.add(name)
    return frozenset(forbidden), frozenset(_converted(model, names))


def _lost(model: Any, names: Iterable[str]) -> set[str]:
    """The layers whose adapters PEFT calls something else when it loads them, because transformers renamed
    such layers once."""
    import torch
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:
        return set()
    keys = {name: f"base_model.model.{name}.lora_A.weight" for name in names}
    saved = {key: torch.empty(1, 1) for key in keys.values()}
    try:
        found = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), saved)
    except (ValueError, KeyError, RuntimeError):  # it wants all tensors of what it fuses
        return set()
    return {name for name, key in keys.items() if key not in found}


def _converted(model: Any, names: set[str]) -> set[str]:
    """PEFT rewrites names that were those of experts before transformers fused them."""
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return set()
    config = LoraConfig(target_modules=sorted(names))
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # only some of the names that belong together are in it
        return {name for name in names if not _survives(model, name, names)}
    return names - set(config.target_modules)


def _survives(model: Any, name: str, names: set[str]) -> bool:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return False
    return name in config.target_modules


def _pattern(model: Any, chosen: list[str], language: str, known: Known) -> list[str] | str:
    """The shortest thing that makes PEFT choose just these layers, of the other class too: their last names,
    or a pattern."""
    last, other = sorted({name.rpartition(".")[2] for name in chosen}), known.other
    every = [*known.given_up, *(name for name, _ in model.named_modules())]
    wanted = [(set(chosen), every)]
    if other is not None and other.modules:
        moved = {joined(other.language, name.removeprefix(language).lstrip(".")) for name in chosen}
        wanted.append((moved, list(other.modules)))
    if all({name for name in names if name.rpartition(".")[2] in last} == some for some, names in wanted):
        return last
    both = dict.fromkeys(filter(None, (language, other.language if other is not None else "")))
    places = "|".join(re.escape(place) for place in both)
    tails = sorted({name.removeprefix(language).lstrip(".") for name in chosen})
    for some in (sorted({_any_number(tail) for tail in tails}), [re.escape(tail) for tail in tails]):
        found = f"(?:{places})\\.(?:{'|'.join(some)})" if places else "|".join(some)
        if {name for name in every if re.fullmatch(found, name)} == set(chosen):
            return found
    return sorted(chosen)


def _any_number(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
