"""What training takes of a configuration: the knobs of every run, and the settings that a space may add."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from budgetsearch.core.records import Params, ParamValue
from budgetsearch.core.schedule import FALLS
from budgetsearch.core.space.dimensions import is_number

QUANTIZATIONS = ("fp32", "bf16", "int8", "nf4")
Rule = tuple[Callable[[ParamValue], bool], str]
"""Whether a value will do, and what does, in words."""


def _between(low: float, high: float) -> Callable[[ParamValue], bool]:
    return lambda value: is_number(value) and low < float(value) < high


def _from(low: float, high: float = math.inf) -> Callable[[ParamValue], bool]:
    return lambda value: is_number(value) and low <= float(value) <= high


def _whole(low: int) -> Callable[[ParamValue], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


KNOBS: Mapping[str, Rule] = {
    "quantization": (lambda value: value in QUANTIZATIONS, f"one of {', '.join(QUANTIZATIONS)}"),
    "rank": (_whole(1), "a whole number of at least 1"),
    "learning_rate": (_between(0.0, 1.0), "a number above 0 and below 1"),
    "alpha": (_between(0.0, math.inf), "a number above 0"),
    "dropout": (lambda value: value == 0 or _between(0.0, 1.0)(value), "a number from 0 to below 1"),
}
"""What every LoRA run needs, and which values each knob can take. A run always has all of them."""

SETTINGS: Mapping[str, Rule] = {
    "batch_size": (_whole(1), "a whole number of at least 1, in sequences"),
    "weight_decay": (_from(0.0, 1.0), "a number from 0 to 1"),
    "warmup_steps": (_whole(0), "a whole number of at least 0"),
    "clip_norm": (_between(0.0, math.inf), "a number above 0"),
    "lora_plus_ratio": (_from(1.0), "a number of at least 1"),
    "rslora": (lambda value: isinstance(value, bool), "true or false"),
    "neftune_alpha": (_from(0.0), "a number of at least 0"),
    "epochs": (_between(0.0, math.inf), "a number above 0"),
    "max_length": (_whole(8), "a whole number of at least 8, in tokens"),
    "schedule": (lambda value: value in FALLS, f"one of {', '.join(FALLS)}"),
    "cooldown": (lambda value: value == 1 or _between(0.0, 1.0)(value), "a number above 0, at most 1"),
    "targets": (lambda value: isinstance(value, str) and bool(value.strip()), "what --targets takes"),
}
"""What a space may add; without it the run's setting holds, or what docs/training.md says."""

COSTLY = ("batch_size", "targets", "max_length")
"""Those that change what a token costs, beside the rank."""


def cost_kind(params: Params) -> ParamValue | None:
    """What tells apart configurations of one quantization by their cost: the rank, and what else counts."""
    rank, more = params.get("rank"), [f"{name} {params[name]}" for name in COSTLY if name in params]
    return ", ".join([str(rank), *more]) if more else rank
