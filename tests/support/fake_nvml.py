"""A module that stands in for ``pynvml``: its calls, constants and exceptions, over cards of our own.

The real ``Driver`` runs on it: put it in place of ``sys.modules["pynvml"]``. ``test_nvml`` holds it
against the real module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

from budgetsearch.machine.host import GIB
from budgetsearch.machine.nvml import NvmlCard, Reading

ERRORS = {
    1: ("Uninitialized", "Uninitialized"),
    2: ("InvalidArgument", "Invalid Argument"),
    3: ("NotSupported", "Not Supported"),
    4: ("NoPermission", "Insufficient Permissions"),
    6: ("NotFound", "Not Found"),
    9: ("DriverNotLoaded", "Driver Not Loaded"),
    12: ("LibraryNotFound", "NVML Shared Library Not Found"),
    13: ("FunctionNotFound", "Function Not Found"),
    15: ("GpuIsLost", "GPU is lost"),
    16: ("ResetRequired", "GPU requires restart"),
    999: ("Unknown", "Unknown Error"),
}
"""By NVML's number: the name of the exception, and what it says."""
REASONS = {
    "GpuIdle": 0x01,
    "ApplicationsClocksSetting": 0x02,
    "SwPowerCap": 0x04,
    "HwSlowdown": 0x08,
    "SyncBoost": 0x10,
    "SwThermalSlowdown": 0x20,
    "HwThermalSlowdown": 0x40,
    "HwPowerBrakeSlowdown": 0x80,
}


class NVMLError(Exception):
    """Like the real one: the class follows the number."""

    def __new__(cls, value: int = 999) -> NVMLError:
        error = Exception.__new__(SUBCLASSES.get(value, cls) if cls is NVMLError else cls)
        error.value = value
        return error

    def __str__(self) -> str:
        return ERRORS[self.value][1]


def _subclass(number: int, name: str) -> type[NVMLError]:
    made = type(f"NVMLError_{name}", (NVMLError,), {})
    made.__new__ = lambda cls, *args: NVMLError.__new__(cls, number)  # type: ignore[method-assign]
    return made


SUBCLASSES = {number: _subclass(number, name) for number, (name, _) in ERRORS.items()}


class NVMLLibraryMismatchError(Exception):
    """The package is newer than the driver; in the real module it is no ``NVMLError`` either."""


@dataclass
class FakeCard:
    """A card, or with ``slices`` one in MIG mode, or a slice itself. Attributes may change at any time."""

    name: str = "NVIDIA A100-SXM4-40GB"
    uuid: str = "GPU-aaaa0000"
    total: int = 40 * GIB
    used: int = 0
    """Without what the driver keeps."""
    reserved: int = 0
    """What the driver keeps for itself."""
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    """Pairs of pid and bytes."""
    percent: int = 0
    milliwatts: int = 50_000
    millijoules: int = 1_000_000
    celsius: int = 40
    reasons: int = 0
    slices: list[FakeCard | None] | None = None
    """None: not in MIG mode; a None in the list: a place that is not taken."""
    errors: dict[str, int] = field(default_factory=dict)
    """By call: the number of the error that it gives."""
    lost: bool = False
    capability: tuple[int, int] = (8, 0)
    parent: FakeCard | None = None


class FakePynvml(ModuleType):
    """The module. What is public in it, the real one has too."""

    def __init__(self, *cards: FakeCard, init_error: int | None = None) -> None:
        super().__init__("pynvml")
        self._cards, self._init_error = list(cards), init_error
        self._users = 0
        self._calls: list[str] = []
        self._old_driver: set[str] = set()
        self.NVMLError = NVMLError
        self.NVMLLibraryMismatchError = NVMLLibraryMismatchError
        for number, subclass in SUBCLASSES.items():
            setattr(self, subclass.__name__, subclass)
            setattr(self, f"NVML_ERROR_{_shout(ERRORS[number][0])}", number)
        for name, bit in REASONS.items():
            setattr(self, f"nvmlClocksEventReason{name}", bit)
        self.NVML_TEMPERATURE_GPU = 0
        self.nvmlMemory_v2 = 0x02000028
        for card in self._cards:
            for part in card.slices or ():
                if part is not None:
                    part.parent = card

    def _ask(self, call: str, card: FakeCard | None = None) -> None:
        """What every call checks first."""
        self._calls.append(call)
        if not self._users:
            raise NVMLError(1)
        if card is not None:
            if card.lost or (card.parent is not None and card.parent.lost):
                raise NVMLError(15)
            if call in card.errors:
                raise NVMLError(card.errors[call])
        if call in self._old_driver:
            raise NVMLError(13)

    def _of_a_whole_card(self, call: str, card: FakeCard) -> None:
        self._ask(call, card)
        if card.parent is not None:
            raise NVMLError(3)

    def nvmlInit(self) -> None:  # noqa: N802
        self._calls.append("nvmlInit")
        if self._init_error is not None:
            raise NVMLError(self._init_error)
        self._users += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._ask("nvmlShutdown")
        self._users -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._ask("nvmlDeviceGetCount")
        return len(self._cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:  # noqa: N802
        self._ask("nvmlDeviceGetHandleByIndex", self._cards[index])
        return self._cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeCard:  # noqa: N802
        everything = [*self._cards, *(part for card in self._cards for part in card.slices or () if part)]
        found = [card for card in everything if card.uuid == uuid]
        self._ask("nvmlDeviceGetHandleByUUID", found[0] if found else None)
        if not found:
            raise NVMLError(6)
        return found[0]

    def nvmlDeviceGetName(self, handle: FakeCard) -> str:  # noqa: N802
        self._ask("nvmlDeviceGetName", handle)
        return handle.name

    def nvmlDeviceGetCudaComputeCapability(self, handle: FakeCard) -> tuple[int, int]:  # noqa: N802
        self._ask("nvmlDeviceGetCudaComputeCapability", handle)
        return handle.capability

    def nvmlDeviceGetUUID(self, handle: FakeCard) -> str:  # noqa: N802
        self._ask("nvmlDeviceGetUUID", handle)
        return handle.uuid

    def nvmlDeviceGetMemoryInfo(self, handle: FakeCard, version: int | None = None) -> Any:  # noqa: N802
        self._ask("nvmlDeviceGetMemoryInfo", handle)
        free = handle.total - handle.reserved - handle.used
        assert version == self.nvmlMemory_v2
        return SimpleNamespace(total=handle.total, free=free, used=handle.used, reserved=handle.reserved)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: FakeCard) -> list[Any]:  # noqa: N802
        if "nvmlDeviceGetComputeRunningProcesses" in self._old_driver:
            raise NVMLLibraryMismatchError("Unversioned function called")
        self._ask("nvmlDeviceGetComputeRunningProcesses", handle)
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in handle.processes]

    def nvmlDeviceGetUtilizationRates(self, handle: FakeCard) -> Any:  # noqa: N802
        self._of_a_whole_card("nvmlDeviceGetUtilizationRates", handle)
        return SimpleNamespace(gpu=handle.percent, memory=0)

    def nvmlDeviceGetPowerUsage(self, handle: FakeCard) -> int:  # noqa: N802
        self._of_a_whole_card("nvmlDeviceGetPowerUsage", handle)
        return handle.milliwatts

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: FakeCard) -> int:  # noqa: N802
        self._of_a_whole_card("nvmlDeviceGetTotalEnergyConsumption", handle)
        return handle.millijoules

    def nvmlDeviceGetTemperature(self, handle: FakeCard, sensor: int) -> int:  # noqa: N802
        self._of_a_whole_card("nvmlDeviceGetTemperature", handle)
        assert sensor == self.NVML_TEMPERATURE_GPU
        return handle.celsius

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: FakeCard) -> int:  # noqa: N802
        self._of_a_whole_card("nvmlDeviceGetCurrentClocksEventReasons", handle)
        return handle.reasons

    def nvmlDeviceGetMigMode(self, device: FakeCard) -> list[int]:  # noqa: N802
        self._ask("nvmlDeviceGetMigMode", device)
        if device.slices is None and "A100" not in device.name:
            raise NVMLError(3)
        return [int(device.slices is not None)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, device: FakeCard) -> int:  # noqa: N802
        self._ask("nvmlDeviceGetMaxMigDeviceCount", device)
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: FakeCard, index: int) -> FakeCard:  # noqa: N802
        self._ask("nvmlDeviceGetMigDeviceHandleByIndex", device)
        slices = device.slices or []
        if index >= len(slices) or slices[index] is None:
            raise NVMLError(6)
        return slices[index]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, migDevice: FakeCard) -> FakeCard:  # noqa: N802, N803
        self._ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", migDevice)
        assert migDevice.parent is not None
        return migDevice.parent


def public(module: FakePynvml) -> dict[str, Any]:
    """Everything that the fake offers in the real module's name."""
    known = {*vars(module), *dir(type(module))}
    names = [name for name in sorted(known) if name.startswith(("nvml", "NVML"))]
    return {name: getattr(module, name) for name in names}


def _shout(name: str) -> str:
    return "".join(f"_{letter}" if letter.isupper() else letter for letter in name).strip("_").upper()


class FakeNvml:
    """A driver with these cards; counts how often it was closed."""

    def __init__(self, *cards: NvmlCard, silence: str = "") -> None:
        self.all = cards
        self.silence = silence
        self.closed = 0

    def cards(self) -> tuple[NvmlCard, ...]:
        return self.all

    def sample(self, uuid: str, pid: int) -> Reading | None:
        raise AssertionError("detection takes no samples")

    def close(self) -> None:
        self.closed += 1


def card(name: str, gib: float, index: int = 0, free: float | None = None) -> NvmlCard:
    """A card of so many GiB, all of them free unless told."""
    return NvmlCard(
        index, name, f"GPU-{index}abc", int(gib * GIB), int((gib if free is None else free) * GIB)
    )
