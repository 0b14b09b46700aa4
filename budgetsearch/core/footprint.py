"""Bytes of a training job as a rule in what varies: rank, members, tokens in flight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from budgetsearch.core.records import Probe


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of one quantization: fixed + members * (rank * per_rank + tokens * per_token)."""

    fixed: float
    """Base, work spaces, context."""
    per_rank: float
    """Adapter, gradient and optimizer state of one member, for each unit of its rank."""
    per_token: float
    """Activations of one token in flight."""
    per_token_recompute: float
    """The same with gradient checkpointing."""
    plain: float = 0.0
    """Fixed as well, but only without gradient checkpointing: copies of the base."""

    def bytes(self, *, rank: int, tokens: float, members: int = 1, recompute: bool = False) -> float:
        """Peak bytes; ``tokens`` are those of one member's longest micro-batch."""
        each = self.per_token_recompute if recompute else self.per_token
        fixed = self.fixed + (0.0 if recompute else self.plain)
        return fixed + members * (rank * self.per_rank + tokens * each)

    def micro_batch(self, limit: float, *, rank: int, length: int, most: int, recompute: bool) -> int:
        """The largest micro-batch of rows of ``length`` tokens within ``limit`` bytes: ``most``, or that
        halved until it fits; 0 if nothing does."""
        micro = most
        while micro and self.bytes(rank=rank, tokens=micro * length, recompute=recompute) > limit:
            micro //= 2
        return micro

    def positions(self, limit: float, *, rank: int) -> int:
        """How many fit in a pass of one member without gradient checkpointing; 0 if none."""
        return max(0, int((limit - self.bytes(rank=rank, tokens=0)) / self.per_token))

    def corrected(self, probes: Sequence[Probe], rank: int) -> Footprint:
        """The same rule, moved so that it says what the probes measured.

        With probes of different sizes the part that grows with them is scaled (least squares), then the
        fixed part carries the rest, so that no probe had more than the rule says.
        """
        known = [probe for probe in probes if probe.peak_bytes > 0]
        if not known:
            return self
        growing = [self._of(probe, rank) - self.fixed for probe in known]
        scale = _slope(growing, [float(probe.peak_bytes) for probe in known])
        scaled = replace(
            self,
            per_rank=self.per_rank * scale,
            per_token=self.per_token * scale,
            per_token_recompute=self.per_token_recompute * scale,
            plain=self.plain * scale,
        )
        fixed = max(p.peak_bytes - scale * part for p, part in zip(known, growing, strict=True))
        return replace(scaled, fixed=max(0.0, fixed))

    def _of(self, probe: Probe, rank: int) -> float:
        tokens = probe.micro_batch * probe.length
        return self.bytes(rank=rank, tokens=tokens, members=probe.members, recompute=probe.recompute)


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """How steeply ``ys`` rise over ``xs``, kept within sense; 1 where the sample cannot tell."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    if spread <= 0.01 * mean_x**2:
        return 1.0
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    return min(3.0, max(0.3, slope))
