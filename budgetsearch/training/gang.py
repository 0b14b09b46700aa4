"""K adapters on one frozen base: one forward and one backward for all of them.

The base runs once over the rows of all members. Behind every target layer each adapter acts on its own
rows (``lora.py``): the members' A and B lie stacked in one tensor each, smaller ranks padded with zeros,
which add nothing and receive no gradient. A member's own tensors are views of its slice, so its optimizer,
its clipping and its average are plain torch on plain tensors, and know nothing of the neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from budgetsearch.core.errors import ModelError
from budgetsearch.training.experts import Stack, WornExperts, depth_of, fused_parameters, module_of
from budgetsearch.training.lora import Alone, Layer, Now, Product, Reading, Rows, Weights
from budgetsearch.training.targets import KNOWN, Known

Tensors = dict[str, torch.Tensor]
"""By the name of the target layer: A is (rank, inputs), B is (rank, outputs), PEFT's transposed."""


class Wearer(Protocol):
    """Whoever has an adapter to put on: a member of a gang."""

    a: Tensors
    b: Tensors
    scale: float
    dropout: float
    changes: int
    """How often its weights have changed: then their 16-bit shadows are made anew."""


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


class Worn:
    """What all target layers of a gang share: the pass under way, and the stacks in 16 bits."""

    def __init__(self, members: Sequence[Wearer]) -> None:
        self.members, self.now = members, Pass()
        self.readings: list[Reading] = []
        self.dropout = [m.dropout for m in members]
        like = next(iter(members[0].a.values()))
        self._scales = {way: like.new_tensor(self._factors(way)).view(-1, 1, 1) for way in (False, True)}
        self._made: tuple[Any, ...] = ()
        self._rows: dict[int, Rows] = {}
        """By positions."""
        self._halves: list[torch.Tensor] = []

    def begin(self, now: Pass) -> None:
        """A pass begins, or is over."""
        self.now, self._rows = now, {}
        for reading in self.readings:
            reading.forget()

    def scale(self) -> torch.Tensor:
        """(members, 1, 1): alpha / rank; in training over the share of the inputs that dropout keeps."""
        return self._scales[self.now.training]

    def rows(self, positions: int) -> Rows:
        """Whose of so many positions are whose in the pass under way."""
        if positions not in self._rows:
            self._rows[positions] = Rows(self.now.rows, positions) if len(self.members) > 1 else Alone()
        return self._rows[positions]

    def _factors(self, training: bool) -> list[float]:
        return [m.scale / (1.0 - m.dropout) if training else m.scale for m in self.members]

    def weights(self, reading: Reading, half: torch.dtype | None) -> Weights:
        """The stacks of a reading as they are, or in 16 bits, with the scale in them."""
        if half is None:
            return reading.whole
        made = half, self.now.training, *(m.changes for m in self.members)
        if made != self._made:
            self._make(half)
            self._made = made
        assert reading.halves is not None
        return reading.halves

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _make(self, half: torch.dtype) -> None:
        """Cast all stacks at once, into the same tensors each time: once a step, whatever its passes are."""
        inputs = [reading.a for reading in self.readings]
        outputs = [layer.b for reading in self.readings for layer in reading.layers]
        if not self._halves or self._halves[0].dtype != half:
            self._halves = [torch.empty_like(stack, dtype=half) for stack in (*inputs, *outputs)]
        torch._foreach_copy_(self._halves, [*inputs, *outputs])
        b = self._halves[len(inputs) :]
        for k, factor in enumerate(self._factors(self.now.training)):
            if factor != 1.0:
                torch._foreach_mul_([stack[k] for stack in b], factor)
        rest = iter(b)
        for reading, a in zip(self.readings, self._halves, strict=False):
            reading.halves = Weights.of(a, [next(rest) for _ in reading.layers], scaled=True)

    def masks(self, numbers: Sequence[int], x: torch.Tensor) -> list[torch.Tensor]:
        """What dropout keeps of the positions ``x``, for the layers with these numbers; none without it.

        Each member's own mask over its own rows, whatever the neighbours' lengths are. What is kept is made
        larger by the scale: here it would be one more pass over the inputs.
        """
        if not (self.now.training and any(self.dropout)):
            return []
        return [self._mask(number, x) for number in numbers]

    def _mask(self, number: int, x: torch.Tensor) -> torch.Tensor:
        keep, count = torch.empty(x.shape, dtype=torch.bool, device=x.device), sum(self.now.rows)
        if len(x) % count:  # one member alone, on a layer that sees no rows
            return self._fill(keep, 0, number)
        for k, part in enumerate(keep.view(count, -1, x.shape[-1]).split(list(self.now.rows))):
            length = self.now.lengths[k]
            if length == part.shape[1]:
                self._fill(part, k, number)
            else:
                part[:, :length] = self._fill(torch.empty_like(part[:, :length]).contiguous(), k, number)
                part[:, length:] = False
        return keep

    def _fill(self, mask: torch.Tensor, k: int, number: int) -> torch.Tensor:
        """The mask of member ``k``, written into a contiguous tensor: its shape and the seed decide."""
        if not self.dropout[k]:
            return mask.fill_(True)
        generator = torch.Generator(mask.device)
        generator.manual_seed(number_of(f"{self.now.seeds[k]}/{number}"))
        return mask.bernoulli_(1.0 - self.dropout[k], generator=generator)


class GangLinear(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A target layer of the base, and behind it the members' adapters on their rows."""

    def __init__(self, reading: Reading, place: int, numbers: Sequence[int], worn: Worn) -> None:
        """``place`` among the layers that read the same input; ``numbers`` of all of these."""
        super().__init__()
        self.layer = reading.layers[place].product.layer
        self.reading, self.place, self.numbers, self.worn = reading, place, numbers, worn

    @property
    def weight(self) -> Any:
        """The base's weight: some models look at its type."""
        return self.layer.weight

    @property
    def bias(self) -> Any:
        """The base's bias."""
        return self.layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, length, inputs) to (rows, length, outputs); rows may be flattened into positions."""
        return self._uncompiled(x) if torch.compiler.is_compiling() else self._forward(x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _uncompiled(self, x: torch.Tensor) -> torch.Tensor:
        """Whose rows they are changes at every pass."""
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        members, rows = self.worn.members, self.worn.now.rows
        if len(members) > 1 and x.numel() // x.shape[-1] % sum(rows):
            raise ModelError(
                "A target layer of this model sees something else than the rows of the batch, so members of "
                "a gang cannot be told apart there. Leave it out with --targets, or use --max-gang 1."
            )
        kind = x.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return self.reading.out(x, self.place, (half, self._begin))

    def _begin(self, flat: torch.Tensor) -> Now:
        worn = self.worn
        masks = worn.masks(self.numbers, flat)
        half = None if flat.dtype == self.reading.a.dtype else flat.dtype
        return Now(worn.weights(self.reading, half), worn.rows(len(flat)), worn.scale(), masks)


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
    experts: dict[str, WornExperts] = field(default_factory=dict)
    """Modules of fused experts that wear an adapter, by their names."""
    worn_by: Worn = field(init=False)

    def put_on(self) -> None:
        """Stack the members' tensors and put them behind the base's target layers.

        From here on until ``take_off`` the members' tensors, gradients included, are views of the stacks.
        """
        if len({frozenset(m.a) for m in self.members}) != 1:
            raise ModelError("members of a gang must have the same target layers")
        self.worn_by = Worn(self.members)
        experts = self._put_on_experts()
        numbers = {name: n for n, name in enumerate(self.members[0].a) if name not in experts}
        for names in together(numbers, getattr(self.base, KNOWN, Known()).together):
            reading = self._reading(names)
            self.worn_by.readings.append(reading)
            for place, name in enumerate(names):
                self.layers[name] = GangLinear(reading, place, [numbers[n] for n in names], self.worn_by)
                set_submodule(self.base, name, self.layers[name])

    def _put_on_experts(self) -> set[str]:
        """Put the adapters on fused experts behind these; returns their names."""
        found: dict[str, dict[str, Stack]] = {}
        names = set()
        for name in self.members[0].a:
            parameters = list(fused_parameters(self.base.get_submodule(module_of(name))))
            if not parameters:
                continue
            if len(self.members) > 1:
                raise ModelError("routed experts wear the adapter of one member at a time; use --max-gang 1")
            a, b = (stacked([[tensors[name]]], self.gradients) for tensors in self._tensors())
            stack = Stack(a, b, self.worn_by.scale())
            found.setdefault(module_of(name), {})[parameters[-1 - depth_of(name)]] = stack
            names.add(name)
        for place, stacks in found.items():
            self.experts[place] = WornExperts(self.base.get_submodule(place), stacks)
            set_submodule(self.base, place, self.experts[place])
        return names

    def _tensors(self) -> tuple[Tensors, Tensors]:
        return self.members[0].a, self.members[0].b

    def _reading(self, names: Sequence[str]) -> Reading:
        """The stacks of layers that read the same input."""
        a = stacked([[m.a[name] for name in names] for m in self.members], self.gradients)
        layers = []
        for name in names:
            b = stacked([[m.b[name]] for m in self.members], self.gradients)
            layers.append(Layer(Product(self.base.get_submodule(name)), b))
        return Reading(a, layers)

    def take_off(self) -> Any:
        """The bare base again; the members keep their tensors as their own."""
        for name, wrapped in self.layers.items():
            set_submodule(self.base, name, wrapped.layer)
        for name, worn in self.experts.items():
            set_submodule(self.base, name, worn.experts)
        for member in self.members:
            for tensor in (*member.a.values(), *member.b.values()):
                grad = None if tensor.grad is None else tensor.grad.clone()
                tensor.grad = None
                tensor.data = tensor.data.clone()
                tensor.grad = grad
        self.layers.clear()
        self.experts.clear()
        return self.base

    @contextmanager
    def passing(self, now: Pass) -> Iterator[None]:
        """Inside, forward and backward know whose rows are whose."""
        self.worn_by.begin(now)
        try:
            yield
        finally:
            self.worn_by.begin(now)

    @contextmanager
    def worn(self) -> Iterator[Gang]:
        """Inside, the members wear their adapters; afterwards the base is bare, whatever happened."""
        try:
            self.put_on()
            yield self
        finally:
            self.take_off()


def together(names: Iterable[str], known: Iterable[Sequence[str]]) -> list[list[str]]:
    """The names in groups that read the same input, each in one group."""
    left = dict.fromkeys(names)
    groups = [[name for name in group if name in left] for group in known]
    grouped = {name for group in groups for name in group}
    return [group for group in groups if group] + [[name] for name in left if name not in grouped]


def stacked(tensors: Sequence[Sequence[torch.Tensor]], gradients: bool = True) -> torch.nn.Parameter:
    """(members, rank of all, width): one row of tensors for each member, each of them with zeros beyond its
    rank up to the largest; every tensor becomes a view of its slice.

    So do its gradients, unless they are dropped: what was there is kept, and backward adds to it.
    """
    rank, first = max(len(t) for row in tensors for t in row), tensors[0][0]
    shape = len(tensors), rank * len(tensors[0]), first.shape[1]
    stack = torch.nn.Parameter(torch.zeros(shape, dtype=first.dtype, device=first.device), gradients)
    stack.grad = torch.zeros_like(stack) if gradients else None
    for k, row in enumerate(tensors):
        for place, tensor in enumerate(row):
            part = slice(place * rank, place * rank + len(tensor))
            view = stack.data[k, part]
            view.copy_(tensor.data)
            grad = None if stack.grad is None else stack.grad[k, part]
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
