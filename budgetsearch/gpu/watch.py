"""How much memory is in use now, and how much was at most."""

from __future__ import annotations

from types import TracebackType

import psutil

from budgetsearch.gpu.nvml import Driver, Nvml


class MemoryProbe:
    """Samples memory in bytes: of one card by NVML (all its processes), else of one process.

    The peak is the largest sample, so call ``used`` often; a spike between two calls goes unseen.
    """

    def __init__(self, index: int | None = None, pid: int | None = None, nvml: Nvml | None = None) -> None:
        """Watch the card ``index``, as nvidia-smi counts; if None the process ``pid`` (None: this one)."""
        self._index = index
        self._process = psutil.Process(pid) if index is None else None
        self._nvml: Nvml | None = None if index is None else nvml or Driver()
        self._peak = 0

    def used(self) -> int:
        """Bytes in use now; 0 once the process is gone."""
        now = self._sample()
        self._peak = max(self._peak, now)
        return now

    @property
    def peak(self) -> int:
        """The most bytes that any sample found since the start or the last ``reset``."""
        self.used()
        return self._peak

    def reset(self) -> None:
        """Begin a new peak."""
        self._peak = 0

    def close(self) -> None:
        """Let go of the driver; safe to call twice."""
        if self._nvml is not None:
            self._nvml.close()

    def __enter__(self) -> MemoryProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sample(self) -> int:
        if self._nvml is not None and self._index is not None:
            return self._nvml.used_bytes(self._index)
        try:
            return int(self._process.memory_info().rss) if self._process else 0
        except psutil.NoSuchProcess:
            return 0
