"""What is left of a search space once every base was calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from budgetsearch.core.bases import DIMENSION, Base
from budgetsearch.core.space.space import Space


def usable_space(space: Mapping[str, Any], usable: list[str], tried: list[str]) -> Mapping[str, Any]:
    """The space without the quantizations, and the models, of which the calibration found nothing that is
    feasible; what is left may still hold pairs of them that are not."""
    if usable == tried:
        return space
    whole = Space.parse(space)
    if whole.free or DIMENSION not in whole.named:
        return whole.restrict("quantization", usable).to_dict()
    bases = [Base.parse(name) for name in usable]
    left = whole.restrict("quantization", [base.quantization for base in bases])
    return left.restrict(DIMENSION, [base.model for base in bases]).to_dict()
