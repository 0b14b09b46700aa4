"""The shape of a base model, from its config.json alone: no weights, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from budgetsearch.core.errors import ModelError, SettingsError, nearest
from budgetsearch.core.targets import ALL_LINEAR, ATTENTION, EXPERTS, MLP, SETS, words_of
from budgetsearch.machine.anatomy import Table, Tensors, checkpoint_of, experts_of, refused_by, text_part

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
DENSE = frozenset(
    {
        *(
            "llama",
            "mistral",
            "ministral",
            "ministral3",
            "qwen",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
        ),
        *(
            "phi",
            "phi3",
            "olmo",
            "olmo2",
            "olmo3",
            "granite",
            "smollm3",
            "gpt2",
            "gpt_neox",
            "starcoder2",
            "bloom",
        ),
        *("cohere2", "exaone4", "seed_oss", "stablelm", "hunyuan_v1_dense", "ernie4_5", "glm", "glm4"),
    }
)
"""Families whose layers follow from the sizes in their configuration; of others they are counted."""
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
IN: Mapping[str, str] = {"block": ATTENTION, "attention": ATTENTION, "feed": MLP, "product": MLP}
"""The set of targets that a layer is in, by what it reads."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of one block."""

    name: str
    """The last part of its name, by which adapters target it."""
    inputs: int
    outputs: int
    reads: str
    """Which tensor it reads: layers that read the same one keep it once."""
    share: float = 1.0
    """How many of them a block has on average."""
    adapted: bool = True
    """Whether it wears an adapter if nothing is said."""
    part: str = MLP
    """The set of targets that it is in."""

    def chosen_by(self, word: str) -> bool:
        """Whether this word of the targets means it."""
        if word in SETS:
            return word == self.part or (word == ALL_LINEAR and self.adapted)
        return word == self.name

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
    experts: int = 0
    """Weights of routed experts and their routers."""
    active: float = 0.0
    """Share of them that a token runs through."""
    rest: int | None = None
    """Counted embeddings, output layer, norms and biases; None: they follow from the sizes."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Quantizations that cannot be had of this checkpoint, and why."""
    counted: bool = False
    """Whether the layers were counted in a real model instead of following from the family."""
    fused: tuple[Linear, ...] = ()
    """The matrices of routed experts, which no setting but ``experts`` puts adapters on."""

    def packed_experts(self, quantization: str, targets: str) -> int:
        """Weights of routed experts that 4 bits shrink: they do where those wear no adapters."""
        if not quantization.startswith("nf4") or EXPERTS in words_of(targets):
            return 0
        return round(self.layers * sum(linear.share * linear.weights for linear in self.fused))

    @property
    def block_weights(self) -> int:
        """Weights in the linear layers of all blocks: what quantization shrinks."""
        return round(self.layers * sum(linear.share * linear.weights for linear in self.linears))

    @property
    def work_weights(self) -> float:
        """Weights of the blocks that a token runs through."""
        return self.block_weights + self.active * self.experts

    @property
    def other_weights(self) -> int:
        """Embeddings, output layer and norms, which stay in 16 or 32 bits, and routed experts."""
        if self.rest is not None:
            return self.rest + self.experts
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
        """The layers of one block that get an adapter: sets of them, or names by commas."""
        words = words_of(targets)
        every = (*self.linears, *self.fused)
        return tuple(linear for linear in every if any(linear.chosen_by(word) for word in words))

    def weights_per_rank(self, targets: str) -> int:
        """Weights of an adapter on these layers of all blocks, for each unit of its rank."""
        sizes = (linear.share * (linear.inputs + linear.outputs) for linear in self.targeted(targets))
        return round(self.layers * sum(sizes))

    def check_targets(self, targets: str) -> None:
        """Insist that every name means a layer.

        Raises:
            SettingsError: no layer has one of these names.
        """
        names = tuple(dict.fromkeys(linear.name for linear in self.linears))
        for word in words_of(targets):
            if word == EXPERTS and not self.fused:
                raise SettingsError("--targets experts: this model has no routed experts. Use all-linear.")
            if "." not in word and word != ALL_LINEAR and not self.targeted(word):
                raise SettingsError(
                    f"--targets {word!r} names no layer of this model{nearest(word, (*SETS, *names))}; use "
                    f"{ALL_LINEAR} or some of {', '.join(names)}."
                )


def shape_of(config: Mapping[str, Any], name: str = "the model", table: Table | None = None) -> ModelShape:
    """The shape that a config.json describes; ``table``: the tensors of the model, which are then counted.

    Raises:
        ModelError: without a table, a size is missing, or nobody has checked how such a model is made.
    """
    refused = refused_by(checkpoint_of(config))
    if table is None:
        return replace(_foretold(config, name), refused=refused)
    counted = replace(_counted(Tensors(table, config), name), refused=refused)
    try:
        told = _foretold(config, name)
    except ModelError:
        return counted
    if told.block_weights != counted.block_weights:
        return counted
    return replace(told, rest=counted.rest, tied=counted.tied, refused=refused)


def _counted(tensors: Tensors, name: str) -> ModelShape:
    """What the tensors come to."""
    text, layers = tensors.text, max(1, len(tensors.blocks))
    hidden = _size(text, "hidden", name)
    heads = _optional(text, "heads") or max(1, hidden // 64)
    linears = tuple(
        Linear(leaf, inputs, outputs, f"{leaf} {inputs}", count / layers, not tensors.refuses(leaf), part)
        for (part, leaf, inputs, outputs), count in tensors.linears.items()
    )
    packed = sum(count * inputs * outputs for (_, _, inputs, outputs), count in tensors.linears.items())
    fused = tuple(
        Linear(EXPERTS, inputs, outputs, EXPERTS, count / layers, adapted=False, part=EXPERTS)
        for (inputs, outputs), count in tensors.expert_sizes.items()
    )
    chosen, experts = text.get("num_experts_per_tok") or text.get("moe_k") or 1, experts_of(text)
    return ModelShape(
        family=str(text.get("model_type", "")),
        hidden=hidden,
        wide=max((max(linear.inputs, linear.outputs) for linear in linears), default=hidden),
        layers=layers,
        heads=heads,
        kv_heads=_optional(text, "kv_heads") or heads,
        head_width=_optional(text, "head_width") or hidden // heads,
        vocab=_size(text, "vocab", name),
        tied=tensors.tied,
        linears=linears,
        experts=tensors.experts,
        active=min(1.0, int(chosen) / experts) if experts and isinstance(chosen, int) else 0.0,
        rest=tensors.weights - packed - tensors.experts,
        counted=True,
        fused=fused,
    )


def _foretold(whole: Mapping[str, Any], name: str) -> ModelShape:
    """What follows from the sizes of a dense decoder."""
    config = text_part(whole)
    family = str(config.get("model_type", "llama"))
    if family not in DENSE or experts_of(config):
        what = "mixture of experts" if experts_of(config) else f"{family} model"
        raise ModelError(
            f"The config.json of {name} describes a {what}, whose layers follow from no rule here. "
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
        tied=bool(whole.get("tie_word_embeddings", config.get("tie_word_embeddings", family in TIED))),
        linears=linears,
        act=str(config.get("hidden_act") or config.get("activation_function") or "silu"),
    )


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
        outputs = sum(parts.pop(piece)[1] for piece in pieces)
        found.append(Linear(fused, inputs, outputs, reads, part=IN[reads]))
    names = NAMES.get(family, {})
    every = parts.items()
    return (*found, *(Linear(names.get(k, f"{k}_proj"), *size, part=IN[size[2]]) for k, size in every))
