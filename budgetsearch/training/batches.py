"""Which rows a step sees, as a pure function of (seed, step), and how they become tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from budgetsearch.training.tokens import TokenSet

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right. All tensors are (rows, length) of int64."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    """The next token at each completion position, ``IGNORED`` elsewhere: already shifted."""
    first: int
    """The first position with a label: logits before it are never computed."""
    tokens: int
    """Real tokens, padding excluded."""
    targets: int
    """Labels that count."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        if str(device) == "cpu":
            return self
        moved = {n: getattr(self, n).to(device, non_blocking=True) for n in ("ids", "mask", "labels")}
        return Batch(**moved, first=self.first, tokens=self.tokens, targets=self.targets)


class DataOrder:
    """Endless epochs over ``rows`` rows, each shuffled by (seed, epoch); step ``s`` takes a slice."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._epoch = -1
        self._order: list[int] = []

    def step_rows(self, step: int) -> list[int]:
        """The rows of optimizer step ``step`` (from 0)."""
        start = step * self.batch_size
        return [self._row(position) for position in range(start, start + self.batch_size)]

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.rows, generator=generator).tolist()
            self._epoch = epoch
        return self._order[offset]


def collate(data: TokenSet, rows: Sequence[int], pad: int) -> Batch:
    """Rows of the token set as one padded micro-batch."""
    encoded = [data.row(row) for row in rows]
    longest = max(len(ids) for ids, _ in encoded)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    for i, (tokens, prompt) in enumerate(encoded):
        length = len(tokens)
        ids[i, :length] = torch.as_tensor(tokens, dtype=torch.long)
        mask[i, :length] = 1
        labels[i, prompt - 1 : length - 1] = ids[i, prompt:length]
    return Batch(
        ids=ids,
        mask=mask,
        labels=labels,
        first=min(prompt for _, prompt in encoded) - 1,
        tokens=int(mask.sum()),
        targets=int((labels != IGNORED).sum()),
    )


def micro_batches(data: TokenSet, rows: Sequence[int], micro_batch: int, pad: int) -> Iterator[Batch]:
    """The rows in micro-batches of similar length, so that little is padding."""
    by_length = sorted(rows, key=lambda row: (-data.lengths[row], row))
    for start in range(0, len(by_length), micro_batch):
        yield collate(data, by_length[start : start + micro_batch], pad)
