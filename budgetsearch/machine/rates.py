"""The learning rate that suits a base model, by its width: where a search begins."""

from __future__ import annotations

import math
from dataclasses import dataclass

WIDE = 4096
"""Width (hidden_size) at which the fit stands."""
FIT, PER_DECADE = -3.503, -0.106
"""log10 of the rate there, at rank 32 and alpha 32, and what a model ten times as wide adds to it; from
``benchmarks.spaces.rates``, whose results lie beside it. Offsets of families made it foresee worse."""
SOURCE = "fit to the 18 models of tinker-cookbook's sweep (docs/spaces.md)"
NARROWEST = 2048
"""The narrowest model of the fit."""
SMALL, SMALL_RATE = 576, 2e-3
"""Width of SmolLM2-135M, and what suits it in short runs (measured on family_relationships); between it and
the narrowest model of the fit the rate is a power of the width."""


@dataclass(frozen=True)
class Center:
    """Where a search over the rate begins."""

    rate: float
    source: str


def center_of(hidden: int) -> Center:
    """The rate for a model of this width."""
    rate = 10 ** (FIT + PER_DECADE * math.log10(max(hidden, NARROWEST) / WIDE))
    source = f"of a model of width {hidden}: {SOURCE}"
    if hidden < NARROWEST:
        share = math.log(NARROWEST / hidden) / math.log(NARROWEST / SMALL)
        rate *= (SMALL_RATE / rate) ** min(share, 1.0)
        source = f"of a model of width {hidden}: between SmolLM2-135M as measured and the {SOURCE}"
    return Center(float(f"{rate:.2g}"), source)
