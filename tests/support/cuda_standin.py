"""torch.cuda as it is on a machine with a card, over a card of our own that computes on the CPU.

What stands in is what Python gets from C++ (``torch._C._cuda_...``); torch's own Python runs on top, so
calls, their signatures and when they start CUDA are the real ones. Before ``_cuda_init`` the allocator
refuses every question in the real one's words. Tensors that should lie on the card lie on the CPU.

``python -m tests.support.cuda_standin`` is the worker on such a machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

REFUSAL = "Invalid device argument 0: did you call init?"
"""CUDACachingAllocator.cpp, assertValidDevice."""
GIB = 2**30


@dataclass
class Card:
    """The card, and what was done to it."""

    total: int = 24 * GIB
    cached: int = 0
    """What the allocator keeps for later."""
    started: bool = False
    fraction: float | None = None
    """Of the memory that the allocator may take."""
    calls: list[str] = field(default_factory=list)

    def properties(self, index: int) -> Any:
        """What ``cudaGetDeviceProperties`` says."""
        return SimpleNamespace(name="Stand-in", major=9, minor=0, total_memory=self.total)

    def stats(self, index: int) -> dict[str, Any]:
        """The allocator's, as far as anybody looks."""
        bytes_ = {kind: {"all": {"peak": GIB, "current": self.cached}} for kind in ("allocated", "reserved")}
        return {f"{kind}_bytes": value for kind, value in bytes_.items()} | {"num_alloc_retries": 0}

    def asked(self, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        """A function that the allocator refuses before CUDA has been started."""

        def call(*args: Any) -> Any:
            self.calls.append(name)
            if not self.started:
                raise RuntimeError(REFUSAL)
            return answer(*args)

        return call

    def start(self) -> None:
        """What ``_cuda_init`` does, its gifts to ``torch.cuda`` included."""
        self.started = True
        torch.cuda._get_device_properties = self.properties
        torch.cuda.default_generators = (torch.Generator(),)

    def empty(self) -> None:
        """Give the cache back."""
        self.cached = 0

    def cap(self, fraction: float, index: int) -> None:
        """Set how much may be taken."""
        self.fraction = fraction


class OnCpu(TorchFunctionMode):  # type: ignore[misc]
    """Whatever names the card gets the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "pin_memory":
            return args[0]
        if func is torch.device:  # names a place, and puts nothing there
            return func(*args, **(kwargs or {}))
        given = {name: _moved(value) for name, value in (kwargs or {}).items()}
        if "pin_memory" in given:
            given["pin_memory"] = False
        return func(*map(_moved, args), **given)


def _moved(value: Any) -> Any:
    if isinstance(value, (str, torch.device)) and str(value).startswith("cuda"):
        return torch.device("cpu")
    return value


def install(put: Callable[[Any, str, Any], None] = setattr) -> Card:
    """Put the card into this process with ``put(module, name, value)``; ``OnCpu`` moves its tensors."""
    card, real = Card(), torch.Generator

    class Generator:  # a class, since signatures name it
        def __new__(cls, device: object = "cpu") -> Any:
            return real()

    refused = {
        "_cuda_memoryStats": card.stats,
        "_cuda_resetPeakMemoryStats": lambda index: None,
        "_cuda_emptyCache": card.empty,
        "_cuda_setMemoryFraction": card.cap,
        "_cuda_setDevice": lambda index: None,
        "_cuda_getDevice": lambda: 0,
        "_cuda_synchronize": lambda: None,
    }
    for name, answer in refused.items():
        put(torch._C, name, card.asked(name, answer))
    put(torch._C, "_cuda_getDeviceCount", lambda: 1)
    put(torch._C, "_cuda_init", card.start)
    put(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
    memory = card.asked("cudaMemGetInfo", lambda index: (card.total - card.cached, card.total))
    put(torch.cuda, "_cudart", SimpleNamespace(cudaMemGetInfo=memory))
    for name in ("_exchange_device", "_maybe_exchange_device"):
        put(torch.cuda, name, lambda index: 0)
    for name in ("_initialized", "_get_device_properties", "default_generators"):  # what starting CUDA sets
        put(torch.cuda, name, getattr(torch.cuda, name, None) or False)
    put(torch, "Generator", Generator)
    return card


def main() -> None:
    """Run the worker."""
    import bitsandbytes  # noqa: F401  # its library for the CPU, whatever torch says of cards later
    import peft  # noqa: F401

    from budgetsearch.engines import worker

    install()
    with OnCpu():
        worker.main()


if __name__ == "__main__":
    main()
