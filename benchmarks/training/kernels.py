"""Which kernels a step launches on a card, what they read and write, where it waits and what is alive."""

from __future__ import annotations

import gc
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROUND = 512
"""torch's allocator gives no less, nor anything between its multiples."""
COPIES = ("_to_copy", "copy_")
"""Between the memories of computer and card the host waits for these, unless they are told not to."""
WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "item")
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_")
PACKED, UNPACKED_ABOVE = "gemm_4bit", 1536
"""bitsandbytes' product with packed weights; with more positions it writes and reads them in 16 bits."""
ATTENTION, MATH = "flash", "math attention"
NO_KERNEL = {
    *("view", "_unsafe_view", "reshape", "detach", "alias", "as_strided", "lift_fresh", "is_same_size"),
    *("empty", "empty_like", "empty_strided", "new_empty", "numel", "size", "stride", "device"),
}


@dataclass(frozen=True)
class Kernel:
    """One launch."""

    name: str
    operations: float
    bytes: float
    dtype: str
    """Of its first input."""
    shape: tuple[int, ...]
    """Of its first result."""


class Trace(TorchDispatchMode):  # type: ignore[misc]  # torch is untyped here
    """Records what would run on the card."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.waits: Counter[str] = Counter()
        """By the place in the code that waits."""
        self.meetings: Counter[str] = Counter()
        """Kernels that got CPU and CUDA tensors at once."""
        self.widths: set[int] = set()
        self.live = self.peak = 0
        self._storages: set[int] = set()
        self._waited = ("", 0)

    def clear(self) -> None:
        """Begin anew; what is alive stays alive."""
        self.kernels, self.waits, self.meetings, self.widths = [], Counter(), Counter(), set()
        self._waited = ("", 0)
        gc.collect()
        self.peak = self.live

    def start_peak(self) -> None:
        """The peak counts from here."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if name in WAITS:
            return self._wait(name, args[0])
        out = func(*args, **(kwargs or {}))
        given, made = list(tensors_in((args, kwargs))), list(tensors_in(out))
        if name in COPIES and _waits(args, kwargs or {}, given, made):
            self._note_wait()
        for tensor in made:
            self._hold(tensor)
        if any(t.device.type == "cuda" for t in (*given, *made)) and name not in NO_KERNEL:
            self._count(name, func, given, made)
        return out

    def _wait(self, name: str, tensor: torch.Tensor) -> bool | float | int:
        if tensor.device.type == "cuda":
            self._note_wait()
        if name == "equal" or tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _note_wait(self) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
        where = next(f for f in reversed(frames) if Path(f.filename).parent != Path(__file__).parent)
        place = f"{Path(where.filename).name}:{where.name}"
        if self._waited != (place, len(self.kernels)):  # a list of numbers is fetched at once
            self.waits[place] += 1
        self._waited = place, len(self.kernels)

    def _hold(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // ROUND) * ROUND
        if key in self._storages:
            return
        self._storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._storages.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)

    def _count(self, name: str, func: Any, given: Sequence[Any], made: Sequence[Any]) -> None:
        if len({t.device.type for t in given if t.dim()}) > 1 and name not in ("_to_copy", "copy_"):
            self.meetings[name] += 1
        if func.is_view:
            return
        on_card = [t for t in (*given, *made) if t.device.type == "cuda"]
        size = float(sum(t.numel() * t.element_size() for t in on_card))
        if name == "embedding":  # reads the rows that it needs
            size = 2.0 * made[0].numel() * made[0].element_size()
            self.widths.add(given[1].shape[-1])
        if name == PACKED and made[0].numel() // made[0].shape[-1] > UNPACKED_ABOVE:
            size += 4.0 * given[0].shape[-1] * made[0].shape[-1]
        first = str((given or made)[0].dtype).removeprefix("torch.")
        shape = tuple(made[0].shape) if made else ()
        self.kernels.append(Kernel(name, operations_of(name, given, made), size, first, shape))


def _waits(args: Any, kwargs: Any, given: Sequence[Any], made: Sequence[Any]) -> bool:
    """Whether a copy goes from one memory to the other while everybody waits."""
    between = len({t.device.type for t in (*given, *made)}) > 1
    return between and not (kwargs.get("non_blocking") or True in args[2:])


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in what a kernel is given or makes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def operations_of(name: str, given: Sequence[Any], made: Sequence[Any]) -> float:
    """Floating-point operations of a kernel."""
    if name in PRODUCTS:
        return 2.0 * float(given[-2].numel() * given[-1].shape[-1])
    if name == PACKED:
        return 2.0 * float(given[0].numel() * made[0].shape[-1])
    if ATTENTION in name or name == MATH:
        backward = "backward" in name
        query, key = given[1:3] if backward else given[:2]
        rows, heads, length, width = query.shape
        return float(4 * rows * heads * length * key.shape[2] * width * (1.25 if backward else 0.5))
    return 0.0
