"""Which layers of a base model wear adapters: names of layers by commas, and named sets of them."""

from __future__ import annotations

import re

ALL_LINEAR, ATTENTION, MLP, EXPERTS = "all-linear", "attention", "mlp", "experts"
SETS = (ALL_LINEAR, ATTENTION, MLP, EXPERTS)
"""Sets that a setting or a search space may name: all linear layers of the blocks; those of them that look at
other positions (attention, recurrences, convolutions), and those that look at each alone; and the routed
experts of a mixture, which are in none of the others."""

_FORWARD = re.compile(
    r"(^|[._])(mlp|ffn|ff|feed_?forward|moe|shared_?experts?|experts?)([._]|$)|"
    r"(^|\.)(gate_proj|up_proj|gate_up_proj|down_proj|c_fc|fc\d|w\d|lin\d|wi|wo|"
    r"dense_h_to_4h|dense_4h_to_h|input_linear|output_linear|per_layer_\w+)$"
)


def words_of(targets: str) -> tuple[str, ...]:
    """The names that targets consist of."""
    return tuple(dict.fromkeys(word.strip() for word in targets.split(",")))


def part_of(name: str) -> str:
    """The set that a linear layer of a block is in, by its full name: attention or mlp."""
    inside = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
    return MLP if _FORWARD.search(inside) else ATTENTION


def chosen_by(word: str, name: str) -> bool:
    """Whether a word of the targets means the linear layer of this full name, which is no routed expert's."""
    if word == ALL_LINEAR:
        return True
    if word in (ATTENTION, MLP):
        return part_of(name) == word
    return name == word or name.endswith(f".{word}")
