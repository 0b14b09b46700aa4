"""Which rows a step sees, as a pure function of (seed, step), and how they become tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from budgetsearch.training.data.tokens import TokenSet

WINDOW = 16
"""So many batches are drawn at random and then grouped by length, so that little is padding."""


@dataclass(frozen=True)
class Batch:
    """The micro-batches of a gang's members side by side, padded on the right."""

    ids: torch.Tensor
    """(rows, length), int64."""
    places: torch.Tensor
    """(targets,): the positions before the completion tokens, counted through all rows."""
    labels: torch.Tensor
    """(targets,): the completion tokens themselves."""
    targets: tuple[int, ...]
    """Completion tokens of each member."""
    rows: tuple[int, ...]
    """Rows of each member."""
    lengths: tuple[int, ...]
    """The longest row of each member."""
    tokens: tuple[int, ...]
    """Real tokens of each member, padding excluded."""

    def to(self, device: str) -> Batch:
        """The same batch on a device, copied from pinned memory without waiting."""
        if device == "cpu":
            return self
        names = ("ids", "places", "labels")
        moved = {n: getattr(self, n).pin_memory().to(device, non_blocking=True) for n in names}
        return replace(self, **moved)


class DataOrder:
    """Endless epochs over ``rows`` rows, each shuffled by (seed, epoch); step ``s`` takes a slice.

    Within a window of some batches rows of similar length come together, and the batches are shuffled
    again, so that a step's rows need little padding.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """``lengths`` of all rows, in tokens."""
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self._epoch = -1
        self._order: list[int] = []

    def step_rows(self, step: int) -> list[int]:
        """The rows of optimizer step ``step`` (from 0), longest first."""
        start = step * self.batch_size
        rows = [self._row(position) for position in range(start, start + self.batch_size)]
        return sorted(rows, key=lambda row: (-self.lengths[row], row))

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.lengths))
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffled(epoch), epoch
        return self._order[offset]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        order: list[int] = []
        for start in range(0, len(rows), WINDOW * self.batch_size):
            window = sorted(rows[start : start + WINDOW * self.batch_size], key=self.lengths.__getitem__)
            batches = [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
            for index in torch.randperm(len(batches), generator=generator).tolist():
                order += batches[index]
        return order


def collate(data: TokenSet, groups: Sequence[Sequence[int]], pad: int) -> Batch:
    """The rows of each member as one batch, as wide as the longest of them all."""
    encoded = [data.row(row) for rows in groups for row in rows]
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.full((len(encoded), width), pad, dtype=torch.long)
    places: list[int] = []
    labels: list[int] = []
    for i, (tokens, prompt) in enumerate(encoded):
        ids[i, : len(tokens)] = torch.as_tensor(tokens, dtype=torch.long)
        places += range(i * width + prompt - 1, i * width + len(tokens) - 1)
        labels += tokens[prompt:]
    return Batch(
        ids=ids,
        places=torch.tensor(places, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        targets=tuple(sum(data.targets(row) for row in rows) for rows in groups),
        rows=tuple(len(rows) for rows in groups),
        lengths=tuple(max(data.lengths[row] for row in rows) for rows in groups),
        tokens=tuple(sum(data.lengths[row] for row in rows) for rows in groups),
    )
