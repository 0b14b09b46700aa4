"""Which rows a step sees, as a pure function of (seed, step), and how they become tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy
import torch

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from budgetsearch.training.data.store import TokenSet

CARD_WIDTHS = 16
"""Contexts are multiples of it too, so no row grows beyond the positions that a model knows."""
WINDOW = 16
"""So many batches are drawn at random and then grouped by length, so that little is padding."""


@dataclass(frozen=True)
class Batch:
    """The micro-batches of a gang's members side by side, padded on the right."""

    ids: torch.Tensor
    """(rows, length), int64."""
    places: torch.Tensor
    """(targets,): the positions before the trained tokens, counted through all rows."""
    labels: torch.Tensor
    """(targets,): the trained tokens themselves."""
    targets: tuple[int, ...]
    """Trained tokens of each member."""
    rows: tuple[int, ...]
    """Rows of each member."""
    lengths: tuple[int, ...]
    """The longest row of each member, rounded up as the width is."""
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

    def __init__(self, lengths: ArrayLike, batch_size: int, seed: int) -> None:
        """``lengths`` of all rows, in tokens."""
        self.lengths, self.batch_size, self.seed = numpy.asarray(lengths), batch_size, seed
        self.longest = int(self.lengths.max())
        self._epoch = -1
        self._order = numpy.empty(0, dtype=numpy.int64)

    def step_rows(self, step: int) -> list[int]:
        """The rows of optimizer step ``step`` (from 0), longest first."""
        start = step * self.batch_size
        rows = [self._row(position) for position in range(start, start + self.batch_size)]
        return sorted(rows, key=lambda row: (-self.lengths[row], row))

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.lengths))
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffled(epoch), epoch
        return int(self._order[offset])

    def _shuffled(self, epoch: int) -> NDArray[numpy.int64]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows = torch.randperm(len(self.lengths), generator=generator).numpy()
        order: list[NDArray[numpy.int64]] = []
        for start in range(0, len(rows), WINDOW * self.batch_size):
            window = rows[start : start + WINDOW * self.batch_size]
            window = window[numpy.argsort(self.lengths[window], kind="stable")]
            batches = [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
            order += [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
        return numpy.concatenate(order)


def passes(
    order: DataOrder, rows: Sequence[int], micro_batch: int, step: int, plain: int = 0
) -> list[list[int]]:
    """The rows of a step, the longest first, in passes that have room for ``micro_batch`` of the longest.

    What counts is positions, rows x width. A pass holds one row at least; with 0 it is one after the other.
    ``plain`` positions need no gradient checkpointing: where that is too little for the longest row, those
    that it is enough for come in passes of so many.
    """
    found: list[list[int]] = []
    most = _up(order.longest, step)
    for row in rows:
        width = _up(int(order.lengths[found[-1][0]]), step) if found else 0
        room = plain if width <= plain < most else micro_batch * most
        if found and (len(found[-1]) + 1) * width <= room:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def width_step(device: str) -> int:
    """Widths are multiples of this: products on a card like them, and libraries plan anew for each width."""
    return 1 if device == "cpu" else CARD_WIDTHS


def collate(sets: Sequence[TokenSet], groups: Sequence[Sequence[int]], pad: int, step: int = 1) -> Batch:
    """The rows of each member as one batch, as wide as the longest of them all, rounded up to ``step``.

    ``sets``: what the rows of each member are of.
    """
    both = [*zip(sets, groups, strict=True)]
    encoded = [data.row(row) for data, rows in both for row in rows]
    width = _up(max(len(ids) for ids, _ in encoded), step)
    ids = numpy.full((len(encoded), width), pad, dtype=numpy.int64)
    trained = numpy.zeros((len(encoded), width), dtype=bool)
    for i, (row, mask) in enumerate(encoded):
        ids[i, : len(row)] = row
        trained[i, 1 : len(row)] = mask[1:]  # nothing foretells the first token
    places = numpy.flatnonzero(trained)
    return Batch(
        ids=torch.from_numpy(ids),
        places=torch.from_numpy(places - 1),
        labels=torch.from_numpy(ids.reshape(-1)[places]),
        targets=tuple(sum(data.targets(row) for row in rows) for data, rows in both),
        rows=tuple(len(rows) for rows in groups),
        lengths=tuple(_up(int(max((data.lengths[r] for r in rows), default=0)), step) for data, rows in both),
        tokens=tuple(int(sum(data.lengths[row] for row in rows)) for data, rows in both),
    )


def _up(width: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-width // step) * step
