"""Let torch's C++ believe in a card that is not there, so that autograd runs on fake CUDA tensors.

A build for the CPU has no guard for CUDA devices and no hooks, and the backward pass asks both. Here their
tables of virtual functions are copied and the few that matter point to functions of torch itself that return
0 or 1: no compiler is needed, on any processor. The order of the functions is read from the headers that lie
in torch's own package.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import torch

CUDA, META = 1, 14
"""Places in the registry of guards: numbers of c10's DeviceType."""
GUARD = (("c10/core/impl/DeviceGuardImplInterface.h", "DeviceGuardImplInterface"),)
HOOKS = (
    ("ATen/detail/AcceleratorHooksInterface.h", "AcceleratorHooksInterface"),
    ("ATen/detail/CUDAHooksInterface.h", "CUDAHooksInterface"),
)
"""Headers and structures, the base first."""
GUARD_ONE = "type getDevice exchangeDevice getStream getDefaultStream getNewStream exchangeStream queryEvent"
"""These return 1: true, the device type of CUDA, and as a device or a stream's the first card."""
GUARD_ZERO = "record block destroyEvent isStreamCapturing synchronizeEvent recordDataPtrOnStream"
HOOKS_ONE = "hasCUDA isAvailable isBuilt hasPrimaryContext getNumGPUs deviceCount"
HOOKS_ZERO = "init current_device getCurrentDevice"

_Pointer = ctypes.c_void_p
_kept: list[Any] = []
"""What C++ points to must stay."""


def install() -> None:
    """Once in a process, before its first backward pass: the engine counts devices then and never again."""
    if _kept or torch.cuda.is_available():
        return
    root = Path(torch.__file__).parent
    c10, cpu = (ctypes.CDLL(str(root / "lib" / f"lib{name}.so")) for name in ("c10", "torch_cpu"))
    registry = (_Pointer * (META + 1)).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    cpu._ZN2at6detail12getCUDAHooksEv.restype = _Pointer
    guard, hooks = _functions(GUARD), _functions(HOOKS)
    hooks_at = cpu._ZN2at6detail12getCUDAHooksEv()
    one = _table(registry[META], guard)[guard.index("deviceCount")]
    zero = _table(hooks_at, hooks)[hooks.index("hasCUDART")]
    object_ = (_Pointer * 4)(_patched(registry[META], guard, {one: GUARD_ONE, zero: GUARD_ZERO}))
    _kept.append(object_)
    _Pointer.from_address(hooks_at).value = _patched(hooks_at, hooks, {one: HOOKS_ONE, zero: HOOKS_ZERO})
    registry[CUDA] = ctypes.addressof(object_)


def _functions(structures: tuple[tuple[str, str], ...]) -> list[str]:
    """The virtual functions of a structure in their order; a destructor takes two places."""
    found: list[str] = []
    for header, name in structures:
        path = Path(torch.__file__).parent / "include" / header
        text = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        start = re.search(rf"struct (?:C10_API|TORCH_API) {name}\b[^;{{]*{{", text)
        assert start is not None, f"{path} does not declare {name}"
        body = text[start.end() : text.index("\n};", start.end())]
        for function in re.findall(r"virtual\s+[^;{(]*?(~?\w+)\s*\(", body):
            found += [function] * (2 if function.startswith("~") else 1)
    return found


def _table(at: int | None, functions: list[str]) -> Any:
    return (_Pointer * len(functions)).from_address(_Pointer.from_address(at or 0).value or 0)


def _patched(at: int | None, functions: list[str], changes: dict[int, str]) -> int:
    """The address of a copy of an object's table in which functions are others."""
    old = _table(at, functions)
    before = (_Pointer * 2).from_address(ctypes.addressof(old) - 2 * ctypes.sizeof(_Pointer))
    new = (_Pointer * (len(functions) + 2))(*before, *old)
    for to, names in changes.items():
        for name in names.split():
            new[2 + functions.index(name)] = to
    _kept.append(new)
    return ctypes.addressof(new) + 2 * ctypes.sizeof(_Pointer)
