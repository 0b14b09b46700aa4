"""Which class loads a base model, as config.json and transformers tell; and the model without weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from budgetsearch.core.errors import ModelError
from budgetsearch.training.parts import Parts


def config_of(path: str, *, trust_remote_code: bool = False) -> Any:
    """What config.json says, as transformers understands it.

    Raises:
        ModelError: transformers does not know such a model.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{path}/config.json describes no model that works here: {short(error)}") from error


def class_of(config: Any, path: str, *, trust_remote_code: bool = False) -> Any:
    """The class that loads the base: what transformers takes for a causal language model of this kind, which
    may be the text part of a model that also sees; else the one that config.json names.

    Raises:
        ModelError: it is no language model, or none that this transformers knows.
    """
    import transformers
    from transformers import AutoModelForCausalLM, GenerationMixin

    named = str((getattr(config, "architectures", None) or [""])[0])
    own = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{path} is an encoder with a decoder ({named or config.model_type}), which is not trained here. "
            "Use a causal language model."
        )
    found = _class_named(named)
    if found is not None and "For" in named and not issubclass(found, GenerationMixin) and not own:
        raise ModelError(
            f"{path} holds a {named}, which writes no text. Use the language model that it was made from."
        )
    if own or type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if found is not None and issubclass(found, GenerationMixin):
        return found
    raise ModelError(
        f"{path}: transformers {transformers.__version__} has no language model for {config.model_type!r} "
        f"({named or 'config.json names no class'}). A newer transformers may have it, or another base does."
    )


def _class_named(name: str) -> Any:
    import transformers

    return getattr(transformers, name, None) if name.isidentifier() else None


def class_name_of(config: Any, found: Any) -> str:
    """The name of the class, also where ``AutoModelForCausalLM`` stands for it."""
    mapping = getattr(found, "_model_mapping", None)
    if mapping is not None and type(config) in mapping:
        return str(mapping[type(config)].__name__)
    return str(found.__name__)


def empty(config: Any, found: Any, *, trust_remote_code: bool = False) -> Any:
    """The model without weights, on the meta device; as if nothing in it were quantized."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    options = {"trust_remote_code": trust_remote_code} if found is AutoModelForCausalLM else {}
    make = found.from_config if found is AutoModelForCausalLM else found._from_config
    try:
        with torch.device("meta"):
            model = make(config, **options)
    except Exception as error:  # whatever a model's own code raises
        raise ModelError(f"This {config.model_type} model cannot be built here: {short(error)}") from error
    return model.eval()


def short(error: BaseException) -> str:
    """The first line of what an error says, and no list of a hundred names."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


@dataclass(frozen=True)
class Other:
    """Another class that loads the same checkpoint: with what sees or hears, or without."""

    name: str
    language: str
    """Where the language part lies in it."""
    whole: bool
    """Whether it is the one that also sees or hears."""
    modules: tuple[str, ...] = ()
    """The names of the modules of the whole."""


def other_of(config: Any, model: Any) -> Other | None:
    """The other class of a model that also sees or hears: of the whole where ``model`` is its text part, of
    the text part where it is the whole; None where there is none."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    if text is config:
        return None
    named = _class_named(str((getattr(config, "architectures", None) or [""])[0]))
    whole = named is not None and named is not type(model)
    found = named if whole else AutoModelForCausalLM._model_mapping.get(type(text), None)
    if found is None or found is type(model):
        return None
    try:
        other = empty(config if whole else text, found)
    except ModelError:
        return None
    names = tuple(name for name, _ in other.named_modules()) if whole else ()
    return Other(found.__name__, Parts(other).language, whole, names)
