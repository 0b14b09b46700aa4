"""NVML behind three calls, so that nothing else knows ``pynvml`` and tests need no card."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Protocol


@dataclass(frozen=True)
class NvmlCard:
    """One card as the driver sees it now."""

    index: int
    """As nvidia-smi counts, in the order of the PCI bus."""
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    """What no process and no part of the driver holds now."""


class Nvml(Protocol):
    """What this package asks of the driver."""

    def cards(self) -> tuple[NvmlCard, ...]:
        """Every card of the machine; none where no driver answers."""
        ...

    def used_bytes(self, index: int) -> int:
        """Bytes that all processes together hold on one card."""
        ...

    def close(self) -> None:
        """Let go of the driver; safe to call twice."""
        ...


class Driver:
    """The real NVML. It is opened at the first question and never raises: no driver, no cards."""

    def __init__(self) -> None:
        self._library: ModuleType | None = None
        self.silence = ""
        """Why nothing answers; empty while something does."""

    def cards(self) -> tuple[NvmlCard, ...]:
        """Every card of the machine; none where no driver answers."""
        nvml = self._open()
        if nvml is None:
            return ()
        try:
            return tuple(self._card(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
        except nvml.NVMLError as problem:
            self.silence = str(problem)
            return ()

    def used_bytes(self, index: int) -> int:
        """Bytes that all processes together hold on one card; 0 where it does not answer."""
        nvml = self._open()
        if nvml is None:
            return 0
        try:
            return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).used)
        except nvml.NVMLError:
            return 0

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

    @staticmethod
    def _card(nvml: ModuleType, index: int) -> NvmlCard:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return NvmlCard(index, str(name), str(uuid), int(memory.total), int(memory.free))
