"""The arithmetic of adapters behind a frozen base, forward and backward by hand: no kernel but products.

Layers that read the same input (queries, keys and values; gate and up) are one node of autograd's. They share
one product with their A's, and on the way back one gradient of that input: products add into it, base and
adapters alike, so that nothing of the hidden width is ever only added up. Kept for the backward pass are the
input, what comes out of A, and the masks of dropout. Gradients are added to the stacks at once, in their
precision.

Positions are what is multiplied: an input of any shape is (positions, inputs) here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import linear

_unsafe_view = torch.ops.aten._unsafe_view.default
"""A view that autograd does not know to be one: models write into what comes out of a layer."""


class Rows:
    """Whose positions are whose: products of each member's positions with its own slice of a stack."""

    def __init__(self, counts: Sequence[int], positions: int) -> None:
        """``counts``: rows of each member; each has as many positions."""
        share = positions // max(1, sum(counts))
        sizes = [count * share for count in counts]
        self._equal = len(sizes) if len(set(sizes)) == 1 and positions else 0
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        self._slices = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def times(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x (positions, n) and weights (members, n, m) to (positions, m)."""
        if self._equal:
            return torch.bmm(self._stack(x), weights).view(x.shape[0], weights.shape[2])
        return torch.cat([x[s] @ weights[k] for k, s in enumerate(self._slices)])

    def back(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x (positions, m) and weights (members, n, m) to (positions, n)."""
        return self.times(x, weights.transpose(1, 2))

    def plus(self, into: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> None:
        """``times``, added to ``into`` (positions, m)."""
        if self._equal:
            self._stack(into).baddbmm_(self._stack(x), weights)
            return
        for k, s in enumerate(self._slices):
            into[s].addmm_(x[s], weights[k])

    def gather(
        self, into: torch.Tensor, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor | None = None
    ) -> None:
        """Add x (positions, n) times y (positions, m) to ``into`` (members, n, m), in its precision: sums
        over each member's positions, times its own factor of ``scale``, (members, 1, 1)."""
        if self._equal and scale is None and into.dtype == x.dtype:
            into.baddbmm_(self._stack(x).transpose(1, 2), self._stack(y))
            return
        if self._equal:
            found = torch.bmm(self._stack(x).transpose(1, 2), self._stack(y))
        else:
            found = torch.stack([x[s].t() @ y[s] for s in self._slices])
        into.add_(found) if scale is None else into.addcmul_(found, scale)

    def scale(self, x: torch.Tensor, scale: torch.Tensor) -> None:
        """Multiply each member's positions by its own factor, (members, 1, 1)."""
        if self._equal:
            self._stack(x).mul_(scale)
            return
        for k, s in enumerate(self._slices):
            x[s].mul_(scale[k])

    def _stack(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(self._equal, x.shape[0] // self._equal, x.shape[1])


class Alone(Rows):
    """One member has all positions; its weights come without the dimension of the members. Fewer views, and
    no stack of one: on a small model the host's time is what a pass takes."""

    def __init__(self) -> None:
        """Nothing is to be shared out."""
        super().__init__((), 0)

    def times(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x (positions, n) and weights (n, m) to (positions, m)."""
        return torch.mm(x, weights)

    def back(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x (positions, m) and weights (n, m) to (positions, n)."""
        found: torch.Tensor = linear(x, weights)
        return found

    def plus(self, into: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> None:
        """``times``, added to ``into`` (positions, m)."""
        into.addmm_(x, weights)

    def gather(
        self, into: torch.Tensor, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor | None = None
    ) -> None:
        """Add x (positions, n) times y (positions, m) to ``into`` (1, n, m), in its precision."""
        if scale is None and into.dtype == x.dtype:
            into[0].addmm_(x.t(), y)
        elif scale is None:
            into.add_(torch.mm(x.t(), y))
        else:
            into.addcmul_(torch.mm(x.t(), y), scale)

    def scale(self, x: torch.Tensor, scale: torch.Tensor) -> None:
        """Multiply all positions by the factor, (1, 1, 1)."""
        x.mul_(scale[0])


@dataclass
class Weights:
    """The stacks as the products of a pass take them: of one member without the dimension of the members."""

    a: torch.Tensor
    """(members, rank of all layers of the reading, inputs)."""
    b: Sequence[torch.Tensor]
    """For each layer (members, rank, outputs)."""
    scaled: bool
    """Whether ``b`` has the scale in it already."""

    @classmethod
    def of(cls, a: torch.Tensor, b: Sequence[torch.Tensor], *, scaled: bool) -> Weights:
        """The same, from stacks."""
        a, b = a.detach(), [stack.detach() for stack in b]
        return cls(a[0], [stack[0] for stack in b], scaled) if len(a) == 1 else cls(a, b, scaled)


class Product:
    """What the base's own layer does, forward and, where that is known, backward."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer = layer
        self._weight: Any = getattr(layer, "weight", None)
        weight = self._weight
        self._packed = getattr(weight, "quant_state", None) is not None
        plain = self._packed or type(layer) is torch.nn.Linear
        self._frozen = plain and not (weight is None or weight.requires_grad)

    def knows(self, dtype: torch.dtype) -> bool:
        """Whether its products are in this type and their backward pass is made here."""
        hooked = self.layer._forward_hooks or self.layer._forward_pre_hooks
        if not self._frozen or hooked or "forward" in vars(self.layer):
            return False
        if self._packed:
            return bool(getattr(self.layer, "compute_dtype", None) == dtype)
        weight: torch.Tensor = self._weight
        return bool(weight.dtype == dtype or torch.is_autocast_enabled(weight.device.type))

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """(outputs, inputs), unpacked or cast where it is stored otherwise."""
        weight: Any = self._weight
        if self._packed:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)
        return _typed(weight.detach(), dtype)

    @property
    def copied(self) -> bool:
        """Whether a cast weight is kept for the backward pass, where casting anew would take as long."""
        return not self._packed

    def casts(self, dtype: torch.dtype) -> bool:
        """Whether the weight is stored in another type than that of the products."""
        return bool(self._weight.dtype != dtype)

    def plus(self, x: torch.Tensor, weight: torch.Tensor | None, rows: Rows, *adapters: torch.Tensor) -> Any:
        """(positions, outputs): the product with (positions, inputs), and what the ``adapters`` (what comes
        out of A, and B) add on their rows. ``weight``: cast; None: the layer unpacks its own."""
        bias = self.layer.bias
        if weight is not None and bias is None:
            # First the little product, so that the large one reads it once.
            return rows.times(*adapters).addmm_(x, weight.t())
        out = self.layer(x) if weight is None else linear(x, weight, bias.to(x.dtype))
        rows.plus(out, *adapters)
        return out


class Behind(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """An input to what comes out of all layers that read it, adapters included: one node for all of them."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, reading: Reading, begin: Begin, *outs: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """``outs``: for each layer the base's product, where that is not made here. ``a`` is there for
        autograd alone."""
        half, make = begin
        flat = _typed(x.reshape(-1, x.shape[-1]), half or a.dtype)
        now = make(flat)
        rows, weights, masks = now.rows, now.weights, now.masks
        if masks:
            parts = zip(masks, _parts(weights.a, len(masks)), strict=True)
            inner = torch.cat([rows.back(flat * mask, part) for mask, part in parts], dim=1)
        else:
            inner = rows.back(flat, weights.a)
        if not weights.scaled:
            rows.scale(inner, now.scale)
        found, kept = [], list[torch.Tensor | None]()
        columns = _columns(inner, weights.b)
        for layer, b, part, out in zip(reading.layers, weights.b, columns, outs, strict=True):
            weight = None
            if out is not None:
                found.append((out + rows.times(part, b).view_as(out)).to(out.dtype))
            else:
                weight = layer.product.weight(flat.dtype) if layer.product.copied else None
                made = layer.product.plus(flat, weight, rows, part, b)
                found.append(_unsafe_view(made, (*x.shape[:-1], made.shape[1])))
            kept.append(weight if weight is not None and layer.product.casts(flat.dtype) else None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(flat, inner, *masks, *kept)
        ctx.reading, ctx.now, ctx.shape, ctx.dtype = reading, now.without_masks(), x.shape, x.dtype
        ctx.made = [out is None for out in outs]
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        """The stacks' gradients are added to where they lie; returned are those of the input and ``outs``."""
        outs = [None if made else grad for made, grad in zip(ctx.made, grads, strict=True)]
        if all(grad is None for grad in grads):
            return None, None, None, None, *outs
        flat, inner, *rest = ctx.saved_tensors
        masks, kept = rest[: -len(grads)], rest[-len(grads) :]
        now: Now = ctx.now
        rows, weights, layers = now.rows, now.weights, ctx.reading.layers
        flats = [
            None if grad is None else _typed(grad.reshape(-1, grad.shape[-1]), flat.dtype) for grad in grads
        ]
        downs = list[torch.Tensor]()
        for layer, b, part, grad in zip(layers, weights.b, _columns(inner, weights.b), flats, strict=True):
            if grad is None:  # nothing came of this layer
                downs.append(torch.zeros_like(part))
                continue
            downs.append(rows.back(grad, b))
            rows.gather(layer.b.grad, part, grad, now.scale if weights.scaled else None)
            if not weights.scaled:
                rows.scale(downs[-1], now.scale)
        wanted = ctx.needs_input_grad[0]
        found = _down(ctx.reading.a.grad, flat, masks, downs, now, wanted=wanted)
        if found is not None:
            for layer, grad, weight, made in zip(layers, flats, kept, ctx.made, strict=True):
                if made and grad is not None:
                    found.addmm_(grad, layer.product.weight(grad.dtype) if weight is None else weight)
            found = _typed(found.view(ctx.shape), ctx.dtype)
        return found, None, None, None, *outs


def _down(
    into: torch.Tensor,
    flat: torch.Tensor,
    masks: Sequence[torch.Tensor],
    downs: Sequence[torch.Tensor],
    now: Now,
    *,
    wanted: bool,
) -> torch.Tensor | None:
    """Add to the gradient of the A's; return what the input's gradient has from them, if ``wanted``."""
    rows, a = now.rows, now.weights.a
    if not masks:
        inner = downs[0] if len(downs) == 1 else torch.cat(list(downs), dim=1)
        rows.gather(into, inner, flat)
        return rows.times(inner, a) if wanted else None
    found: torch.Tensor | None = None
    count = len(downs)
    for mask, inner, part, grad in zip(masks, downs, _parts(a, count), _parts(into, count), strict=True):
        rows.gather(grad, inner, flat * mask)
        if wanted:
            more = rows.times(inner, part)
            found = more.mul_(mask) if found is None else found.addcmul_(more, mask)
    return found


@dataclass(eq=False)
class Layer:
    """One target layer among those that read the same input."""

    product: Product
    b: torch.nn.Parameter
    """(members, rank, outputs)."""


@dataclass
class Now:
    """What a pass gives to the layers of a reading."""

    weights: Weights
    rows: Rows
    scale: torch.Tensor
    masks: Sequence[torch.Tensor]
    """What dropout keeps of the positions, for each layer; empty without it."""

    def without_masks(self) -> Now:
        """The same, holding nothing that the backward pass finds among what autograd keeps."""
        return replace(self, masks=()) if self.masks else self


Begin = tuple[torch.dtype | None, Callable[[torch.Tensor], Now]]
"""The 16-bit type of the products, if any; from the positions in it, what the pass gives."""


@dataclass
class Call:
    """An input while the layers that read it ask for it, one after the other."""

    source: weakref.ref[torch.Tensor]
    found: list[torch.Tensor | None]
    """What comes out of each layer; it is handed out once."""


class Reading:
    """Layers that read the same input: one stack of all their A's."""

    def __init__(self, a: torch.nn.Parameter, layers: Sequence[Layer]) -> None:
        """``a``: (members, rank of all, inputs)."""
        self.a, self.layers = a, layers
        self.whole = Weights.of(a, [layer.b for layer in layers], scaled=False)
        self.halves: Weights | None = None
        """The stacks in 16 bits; None: to be made."""
        self._call: Call | None = None

    def forget(self) -> None:
        """No input is under way any more."""
        self._call = None

    def out(self, x: torch.Tensor, place: int, begin: Begin) -> torch.Tensor:
        """What comes out of the layer at ``place``, made with its neighbours' by the first to read ``x``."""
        call = self._call
        if call is None or call.source() is not x or call.found[place] is None:
            dtype = begin[0] or self.a.dtype
            outs = (None if one.product.knows(dtype) else one.product.layer(x) for one in self.layers)
            call = self._call = Call(weakref.ref(x), list(Behind.apply(x, self.a, self, begin, *outs)))
        found, call.found[place] = call.found[place], None
        if not any(one is not None for one in call.found):
            self._call = None
        assert found is not None
        return found


def _columns(inner: torch.Tensor, b: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Of what comes out of the A's, (positions, rank of all), each layer's own."""
    return (inner,) if len(b) == 1 else inner.chunk(len(b), dim=1)


def _parts(stack: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
    """The slices of a stack's rank that belong to each of the layers."""
    return (stack,) if count == 1 else stack.chunk(count, dim=-2)


def _typed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if x.dtype == dtype else x.to(dtype)
