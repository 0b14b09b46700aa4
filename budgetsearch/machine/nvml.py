"""NVML behind three calls: nothing else knows ``pynvml``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

from budgetsearch.core.errors import DeviceError
from budgetsearch.machine.host import host_memory

Answer = TypeVar("Answer")

LOST = ("NVMLError_GpuIsLost", "NVMLError_ResetRequired")
"""Errors of a card that only a reset or a reboot brings back."""
GONE = (*LOST, "NVMLError_NotFound", "NVMLError_GpuNotFound", "NVMLError_InvalidArgument")
"""What NVML says of a UUID or a handle that names no card any more: off the bus, or a removed slice."""
HARMFUL_REASONS = {
    "nvmlClocksEventReasonSwPowerCap": "power limit",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "heat (driver)",
    "nvmlClocksEventReasonHwThermalSlowdown": "heat (hardware)",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake of the server",
}
"""Why a card may run slower than it can; idling and set clocks are no harm."""
UNDIVIDED = (
    "card {index} is in MIG mode, but has no instance: make one (nvidia-smi mig -cgi PROFILE -C), or turn "
    "the mode off (nvidia-smi -i {index} -mig 0)"
)


class CardLost(DeviceError):
    """A card that does not answer any more; only a reset or a reboot brings it back."""


@dataclass(frozen=True)
class NvmlCard:
    """One card as the driver sees it now, or one slice of a card in MIG mode."""

    index: int
    """As nvidia-smi counts, in the order of the PCI bus; slices have their card's."""
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    """What no process and no part of the driver holds now."""
    parent_uuid: str | None = None
    """The card that this is a slice of."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability; from (8, 0) on there are bf16 units. None where the driver does not say."""


@dataclass(frozen=True)
class Reading:
    """One look at a card, or at one process where no card answers; None: nobody can say."""

    used_bytes: int
    """What all processes together hold."""
    total_bytes: int
    free_bytes: int
    own_bytes: int | None = None
    """What the asking process holds."""
    utilization: float | None = None
    """Share of the last fraction of a second in which the card computed, 0 to 1."""
    watts: float | None = None
    joules: float | None = None
    """Energy of the card since its driver was loaded."""
    celsius: float | None = None
    throttled: tuple[str, ...] | None = None
    """Why the card runs slower than it can, harmful reasons only."""

    @property
    def others_bytes(self) -> int | None:
        """What other processes hold."""
        return None if self.own_bytes is None else max(0, self.used_bytes - self.own_bytes)


class Driver:
    """NVML, opened at the first question: no driver, no cards, and no exception."""

    def __init__(self) -> None:
        self._library: ModuleType | None = None
        self.silence = ""
        """Why nothing answers; empty while something does."""

    def cards(self) -> tuple[NvmlCard, ...]:
        """Every usable card of the machine, slices instead of cards in MIG mode; none without a driver.

        A card that does not answer is left out.
        """
        nvml = self._open()
        if nvml is None:
            return ()
        found: list[NvmlCard] = []
        troubles: list[str] = []
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as problem:
            count, troubles = 0, [str(problem)]
        for index in range(count):
            try:
                here = _cards_at(nvml, index)
            except nvml.NVMLError as problem:
                troubles.append(f"card {index}: {problem}")
                continue
            found += here
            if not here:
                troubles.append(UNDIVIDED.format(index=index))
        self.silence = "" if found else "; ".join(troubles)
        return tuple(found)

    def sample(self, uuid: str, pid: int) -> Reading | None:
        """A look at one card or slice, from the process ``pid``; None where no driver answers.

        A slice has no utilization, power and energy of its own; heat and slowdowns are its card's.

        Raises:
            CardLost: the card does not answer any more.
        """
        nvml = self._open()
        if nvml is None:
            return None
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            total, free, used = _memory(nvml, handle)
        except nvml.NVMLError as problem:
            if type(problem).__name__ in GONE:
                raise _lost(uuid, problem) from problem
            self.close()  # so that the next question opens it anew
            self.silence = str(problem)
            return None
        self.silence = ""

        def ask(question: Callable[[], Answer]) -> Answer | None:
            return _ask(nvml, uuid, question)

        whole = not uuid.startswith("MIG-")
        parent = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle
        card = handle if whole else ask(lambda: parent(handle))
        hot = nvml.NVML_TEMPERATURE_GPU
        return Reading(
            used_bytes=used,
            total_bytes=total,
            free_bytes=free,
            own_bytes=ask(lambda: _own(nvml, handle, pid)),
            utilization=ask(lambda: nvml.nvmlDeviceGetUtilizationRates(card).gpu / 100) if whole else None,
            watts=ask(lambda: nvml.nvmlDeviceGetPowerUsage(card) / 1000) if whole else None,
            joules=ask(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000) if whole else None,
            celsius=None if card is None else ask(lambda: float(nvml.nvmlDeviceGetTemperature(card, hot))),
            throttled=None if card is None else ask(lambda: _reasons(nvml, card)),
        )

    def close(self) -> None:
        """Let go of the driver; safe to call twice."""
        nvml, self._library = self._library, None
        if nvml is not None:
            try:
                nvml.nvmlShutdown()
            except nvml.NVMLError:
                pass

    def _open(self) -> ModuleType | None:
        if self._library is None:
            try:
                import pynvml
            except ImportError:
                self.silence = "the package nvidia-ml-py is not installed"
                return None
            try:
                pynvml.nvmlInit()
            except pynvml.NVMLError as problem:
                self.silence = str(problem)
                return None
            self._library = pynvml
        return self._library


def _cards_at(nvml: ModuleType, index: int) -> list[NvmlCard]:
    """The card at an index, or its slices; in MIG mode it may forbid every question about itself."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    uuid = nvml.nvmlDeviceGetUUID(handle)
    if not _divided(nvml, handle):
        return [_card(nvml, handle, index, uuid, None)]
    parts = _slices(nvml, handle)
    return [_card(nvml, part, index, nvml.nvmlDeviceGetUUID(part), uuid) for part in parts]


def _card(nvml: ModuleType, handle: Any, index: int, uuid: str, parent: str | None) -> NvmlCard:
    total, free, _ = _memory(nvml, handle)
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        capability = int(major), int(minor)
    except nvml.NVMLError:
        capability = None
    return NvmlCard(index, nvml.nvmlDeviceGetName(handle), uuid, total, free, parent, capability)


def _divided(nvml: ModuleType, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # most cards do not know the mode
        return False
    return bool(current)


def _slices(nvml: ModuleType, handle: Any) -> Iterator[Any]:
    """Handles of the slices; the places of a card need not all be taken."""
    for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
        except nvml.NVMLError as problem:
            if type(problem).__name__ in LOST:
                raise


def _memory(nvml: ModuleType, handle: Any) -> tuple[int, int, int]:
    """Total, free and used bytes; a card without memory of its own uses the machine's.

    In the second version of the question what the driver keeps for itself is neither free nor used.
    """
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except nvml.NVMLError as problem:
        if type(problem).__name__ != "NVMLError_NotSupported":
            raise
        host = host_memory()
        return host.total_bytes, host.available_bytes, host.total_bytes - host.available_bytes
    return int(memory.total), int(memory.free), int(memory.used)


def _own(nvml: ModuleType, handle: Any, pid: int) -> int | None:
    """What a process holds; in a container the driver may know it by another number."""
    found = [
        process.usedGpuMemory
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        if process.pid == pid
    ]
    return None if not found or None in found else int(sum(found))


def _reasons(nvml: ModuleType, handle: Any) -> tuple[str, ...]:
    bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    return tuple(word for name, word in HARMFUL_REASONS.items() if bits & getattr(nvml, name))


def _ask(nvml: ModuleType, uuid: str, question: Callable[[], Answer]) -> Answer | None:
    """The answer, or None where the card, the driver or the user's rights do not allow it."""
    try:
        return question()
    except nvml.NVMLError as problem:
        if type(problem).__name__ in LOST:
            raise _lost(uuid, problem) from problem
        return None
    except nvml.NVMLLibraryMismatchError:  # the package is newer than the driver
        return None


def _lost(uuid: str, problem: Exception) -> CardLost:
    return CardLost(
        f"The card {uuid} does not answer any more ({problem}). Look at nvidia-smi, reset the card "
        "(nvidia-smi --gpu-reset) or reboot, and go on with `budgetsearch resume RUN`."
    )
