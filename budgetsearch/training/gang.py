"""K adapters on one frozen base: one forward and one backward for all of them.

The base runs once over the rows of all members. Behind every target layer each adapter acts on its own
rows: the members' A and B lie stacked in one tensor each, smaller ranks padded with zeros, which add
nothing and receive no gradient. A member's own tensors are views of its slice, so its optimizer, its
clipping and its average are plain torch on plain tensors, and know nothing of the neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from budgetsearch.core.errors import ModelError

Tensors = dict[str, torch.Tensor]
"""By the name of the target layer: A is (rank, inputs), B is (rank, outputs), PEFT's transposed."""


class Wearer(Protocol):
    """Whoever has an adapter to put on: a member of a gang."""

    a: Tensors
    b: Tensors
    scale: float
    dropout: float


@dataclass
class Pass:
    """Which rows of the batch are whose, and what the dropout masks depend on."""

    rows: Sequence[int] = ()
    """Rows of each member, in the order of the batch."""
    lengths: Sequence[int] = ()
    """The longest row of each member, in tokens; positions beyond are padding."""
    seeds: Sequence[str] = ()
    """From these and the number of the layer alone come the members' dropout masks."""
    training: bool = False


@dataclass
class Stack:
    """The adapters of one target layer, one slice a member."""

    a: torch.nn.Parameter
    """(members, rank, inputs), zero beyond a member's own rank."""
    b: torch.nn.Parameter
    """(members, rank, outputs)."""
    scale: torch.Tensor
    """(members, 1, 1): alpha / rank."""
    kept_scale: torch.Tensor
    """The same over the share of the inputs that dropout keeps: what it is in training."""


class GangLinear(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A target layer of the base, and behind it the members' adapters on their rows."""

    def __init__(self, layer: torch.nn.Module, stack: Stack, dropout: Sequence[float], number: int) -> None:
        super().__init__()
        self.layer = layer
        self.a, self.b, self.scale, self.kept_scale = stack.a, stack.b, stack.scale, stack.kept_scale
        self.dropout, self.number = tuple(dropout), number
        self.now = Pass()

    @property
    def weight(self) -> Any:
        """The base's weight: some models look at its type."""
        return self.layer.weight

    @property
    def bias(self) -> Any:
        """The base's bias."""
        return self.layer.bias

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # whose rows they are changes at every pass
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, length, inputs) to (rows, length, outputs); rows may be flattened into positions."""
        out: torch.Tensor = self.layer(x)
        if len(self.dropout) > 1 and x.numel() // x.shape[-1] % sum(self.now.rows):
            raise ModelError(
                "A target layer of this model sees something else than the rows of the batch, so members of "
                "a gang cannot be told apart there. Leave it out with --targets, or use --max-gang 1."
            )
        scale = self.scale
        if self.now.training and any(self.dropout):
            x, scale = self._drop(x), self.kept_scale
        autocast = torch.is_autocast_enabled(x.device.type)
        if not autocast:
            x = x.to(self.a.dtype)
        if len(set(self.now.rows)) > 1:
            return self._unequal(x, out, scale)
        slices = x.reshape(len(self.dropout), -1, x.shape[-1])
        inner = torch.bmm(slices, self.a.transpose(1, 2)) * scale
        if autocast:  # which casts what goes into a product, but not the scale
            inner = inner.to(out.dtype)
        if out.dtype == inner.dtype and (autocast or inner.dtype == self.b.dtype):
            flat = out.reshape(len(self.dropout), -1, out.shape[-1])
            return torch.baddbmm(flat, inner, self.b).view_as(out)
        return (out + torch.bmm(inner, self.b).view_as(out)).to(out.dtype)

    def _unequal(self, x: torch.Tensor, out: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Members with different numbers of rows, one after the other."""
        share = x.numel() // x.shape[-1] // sum(self.now.rows)
        slices = x.reshape(-1, x.shape[-1]).split([rows * share for rows in self.now.rows])
        parts = [s @ self.a[k].t() * scale[k] @ self.b[k] for k, s in enumerate(slices)]
        return (out + torch.cat(parts).view_as(out)).to(out.dtype)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        """Each member's own mask over its own rows, whatever the neighbours' lengths are.

        What is kept is made larger by the scale behind it: here it would be one more pass over the inputs.
        """
        count = sum(self.now.rows)
        if x.numel() // x.shape[-1] % count:  # one member alone, on a layer that sees no rows
            return x * self._fill(torch.empty(x.shape, dtype=torch.bool, device=x.device), 0)
        rows = x.reshape(count, -1, x.shape[-1])
        keep = torch.empty(rows.shape, dtype=torch.bool, device=x.device)
        for k, part in enumerate(keep.split(list(self.now.rows))):
            length = self.now.lengths[k]
            if length == part.shape[1]:
                self._fill(part, k)
            else:
                part[:, :length] = self._fill(torch.empty_like(part[:, :length]).contiguous(), k)
                part[:, length:] = False
        return (rows * keep).view_as(x)

    def _fill(self, mask: torch.Tensor, k: int) -> torch.Tensor:
        """The mask of member ``k``, written into a contiguous tensor: its shape and the seed decide."""
        if not self.dropout[k]:
            return mask.fill_(True)
        generator = torch.Generator(mask.device)
        generator.manual_seed(number_of(f"{self.now.seeds[k]}/{self.number}"))
        return mask.bernoulli_(1.0 - self.dropout[k], generator=generator)


def number_of(text: str) -> int:
    """A 63-bit seed from a text, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class Gang:
    """Members that wear their adapters on one base; the base's own weights are never changed."""

    base: Any
    members: Sequence[Wearer]
    gradients: bool = True
    """Without them the members can only be evaluated."""
    layers: dict[str, GangLinear] = field(default_factory=dict)

    def put_on(self) -> None:
        """Stack the members' tensors and put them behind the base's target layers.

        From here on until ``take_off`` the members' tensors, gradients included, are views of the stacks.
        """
        if len({frozenset(m.a) for m in self.members}) != 1:
            raise ModelError("members of a gang must have the same target layers")
        scales = [m.scale for m in self.members], [m.scale / (1.0 - m.dropout) for m in self.members]
        scale, kept_scale = map(self._for_products, scales)
        for number, name in enumerate(self.members[0].a):
            layer = self.base.get_submodule(name)
            stack = Stack(
                a=stacked([m.a[name] for m in self.members], self.gradients),
                b=stacked([m.b[name] for m in self.members], self.gradients),
                scale=scale,
                kept_scale=kept_scale,
            )
            self.layers[name] = GangLinear(layer, stack, [m.dropout for m in self.members], number)
            set_submodule(self.base, name, self.layers[name])

    def _for_products(self, scales: Sequence[float]) -> torch.Tensor:
        like = next(iter(self.members[0].a.values()))
        return torch.tensor(scales, dtype=like.dtype, device=like.device).view(-1, 1, 1)

    def take_off(self) -> Any:
        """The bare base again; the members keep their tensors as their own."""
        for name, wrapped in self.layers.items():
            set_submodule(self.base, name, wrapped.layer)
        for member in self.members:
            for tensor in (*member.a.values(), *member.b.values()):
                grad = None if tensor.grad is None else tensor.grad.clone()
                tensor.grad = None
                tensor.data = tensor.data.clone()
                tensor.grad = grad
        self.layers.clear()
        return self.base

    @contextmanager
    def passing(self, now: Pass) -> Iterator[None]:
        """Inside, forward and backward know whose rows are whose."""
        for layer in self.layers.values():
            layer.now = now
        yield

    @contextmanager
    def worn(self) -> Iterator[Gang]:
        """Inside, the members wear their adapters; afterwards the base is bare, whatever happened."""
        try:
            self.put_on()
            yield self
        finally:
            self.take_off()


def stacked(tensors: Sequence[torch.Tensor], gradients: bool = True) -> torch.nn.Parameter:
    """(members, rank, width) with zeros beyond each rank; every tensor becomes a view of its slice.

    So do its gradients, unless they are dropped: what was there is kept, and backward adds to it.
    """
    rank, width = max(len(t) for t in tensors), tensors[0].shape[1]
    first = tensors[0]
    zeros = torch.zeros(len(tensors), rank, width, dtype=first.dtype, device=first.device)
    stack = torch.nn.Parameter(zeros, requires_grad=gradients)
    stack.grad = torch.zeros_like(stack) if gradients else None
    for k, tensor in enumerate(tensors):
        view = stack.data[k, : len(tensor)]
        view.copy_(tensor.data)
        grad = None if stack.grad is None else stack.grad[k, : len(tensor)]
        if grad is not None and tensor.grad is not None:
            grad.copy_(tensor.grad)
        tensor.grad = None
        tensor.data = view
        tensor.grad = grad
    return stack


def set_submodule(model: Any, name: str, module: torch.nn.Module) -> None:
    """Put ``module`` where the model has its submodule ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)
