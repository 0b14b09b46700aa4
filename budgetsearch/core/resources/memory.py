"""What fits into memory: foreseen before anything runs, corrected by the calibration, taught by failures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from budgetsearch.core.bases import Base, cost_class
from budgetsearch.core.footprint import Footprint
from budgetsearch.core.plan import Plan
from budgetsearch.core.records import Calibration, Params

DOUBT = 1.15
"""Before anything was measured an estimate may be so many times the truth; nothing is refused within that."""
CAUTION = 0.93
"""A micro-batch that nobody measured is taken if the corrected estimate is below this share of the limit: the
soft limit of the watcher is at 97%."""
LEAST_POSITIONS = 512
"""Estimate: with fewer in a pass a card waits for weights and launches more than checkpointing costs."""
GIB = 2**30


@dataclass(frozen=True)
class Foresight:
    """What a calibration should try on one quantization."""

    ranks: tuple[int, ...]
    """Ranks that may fit, the largest first; none: not even the smallest does."""
    micro_batches: tuple[tuple[int, int], ...] = ()
    """The largest that may fit with each of them, plain and with gradient checkpointing; none: unknown."""
    refusal: str = ""
    """Why nothing fits."""


def foresee(
    footprint: Footprint | None, limit: int | None, ranks: Sequence[int], batch_size: int, length: int
) -> Foresight:
    """What may fit into ``limit`` bytes with rows of ``length`` tokens; everything where nothing is known."""
    wanted = tuple(sorted(set(ranks), reverse=True))
    if footprint is None or limit is None:
        return Foresight(wanted)
    room = DOUBT * limit
    needs = {rank: footprint.bytes(rank=rank, tokens=length, recompute=True) for rank in wanted}
    fitting = tuple(rank for rank in wanted if needs[rank] <= room)
    if not fitting:
        least = needs[wanted[-1]]
        return Foresight(
            (),
            (),
            f"foreseen: one row of {length} tokens at rank {wanted[-1]} needs {least / GIB:.1f} GiB, "
            f"and there are {limit / GIB:.1f} GiB",
        )
    sizes = {"length": length, "most": batch_size}
    plain = [footprint.micro_batch(room, rank=rank, recompute=False, **sizes) for rank in fitting]
    again = [footprint.micro_batch(room, rank=rank, recompute=True, **sizes) for rank in fitting]
    return Foresight(fitting, tuple(zip(plain, again, strict=True)))


def problem(plan: Plan, refused: Sequence[Params], params: Params) -> str | None:
    """Why a configuration cannot fit, or None. ``refused`` are those that ran out of memory all alone."""
    name, rank = plan.cost_class(params), params.get("rank")
    for other in refused:
        if needs_as_much(params, other, plan.free):
            return f"trial with rank {other.get('rank')} of {name} did not fit, and this one needs as much"
    if not plan.free and Base.parse(name).model and name not in plan.reference_rates:
        return f"{name} was found to be of no use in the calibration"
    if not isinstance(rank, int):
        return None
    largest = plan.largest_ranks.get(name, rank)
    if rank > largest:
        return f"rank {rank} of {name}: the calibration found that {largest} is the most that fits"
    return None


def micro_batch(plan: Plan, params: Params) -> int:
    """The micro-batch of a trial: the calibration measured that of the largest rank, and a smaller rank may
    leave room for more."""
    name, rank = plan.cost_class(params), params.get("rank")
    measured, footprint = plan.micro_batches[name], plan.footprints.get(name)
    batch = int(plan.knobs(params).get("batch_size", plan.batch_size))
    if footprint is None or plan.limit_bytes is None or not isinstance(rank, int):
        return min(measured, batch)
    foreseen = footprint.micro_batch(
        CAUTION * plan.limit_bytes,
        rank=rank,
        length=min(plan.longest, int(plan.knobs(params).get("max_length", plan.longest))),
        most=batch,
        recompute=plan.recompute.get(name, False),
    )
    return min(max(measured, foreseen), batch)


def plain_positions(plan: Plan, params: Params) -> int:
    """Of the passes that need no gradient checkpointing, where the others of its kind do."""
    name, rank = plan.cost_class(params), params.get("rank")
    footprint = plan.footprints.get(name)
    if footprint is None or plan.limit_bytes is None or not isinstance(rank, int):
        return 0
    found = footprint.positions(CAUTION * plan.limit_bytes, rank=rank)
    return found if found >= LEAST_POSITIONS else 0


def gang_micro_batches(calibration: Calibration) -> tuple[int, ...]:
    """What fits of each of 1, 2, ... members up to the chosen size; nothing where that is what fits alone."""
    known = {p.members: p.micro_batch for p in calibration.probes if 1 < p.members <= calibration.gang}
    if not any(size < calibration.micro_batch for size in known.values()):
        return ()
    above = [min(k for k in known if k >= members) for members in range(2, calibration.gang + 1)]
    return (calibration.micro_batch, *(known[members] for members in above))


def taught(shrunk: Sequence[tuple[Params, int]], params: Params, micro: int, free: bool) -> int:
    """What is left of a micro-batch: not more than what something that needs no more memory went down to."""
    return min([micro, *(size for other, size in shrunk if needs_as_much(params, other, free))])


def needs_as_much(params: Params, other: Params, free: bool = False) -> bool:
    """Whether the first needs at least as much memory as the second, in every respect that counts; without a
    rank nobody knows what counts, and only the same needs as much."""
    if "rank" not in other:
        return params == other
    return cost_class(params, free) == cost_class(other, free) and all(
        _number(params, name) >= _number(other, name) for name in ("rank", "dropout", "max_length")
    )


def _number(params: Mapping[str, object], name: str) -> float:
    value = params.get(name, math.inf if name == "max_length" else 0)
    if name == "dropout":  # any dropout keeps masks
        return float(bool(value))
    return float(value) if isinstance(value, (int, float)) else 0.0
