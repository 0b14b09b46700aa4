"""Memory of this process: the peak, what running out of it looks like, and how to free it."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import torch


def start_peak(device: str) -> None:
    """Start the peak anew: the card's, or the resident set's where the kernel can (man 5 proc)."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass  # then the peak is that of the whole process


def peak_bytes(device: str) -> int:
    """Largest use since the peak was last started: the card's memory, or the resident set."""
    if device != "cpu":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return int(psutil.Process().memory_info().rss)


class PeakMeter:
    """The peak of a job, and that of the time since the last look."""

    def __init__(self, device: str) -> None:
        self._device, self._highest = device, 0
        self.start()

    def start(self) -> None:
        """A job begins."""
        self._highest = 0
        start_peak(self._device)

    def job(self) -> int:
        """Bytes of the job's peak so far."""
        self._highest = max(self._highest, peak_bytes(self._device))
        return self._highest

    def step(self) -> int:
        """Bytes of the card's peak since the last call of this; 0 on the CPU, where looking is too dear."""
        if self._device == "cpu":
            return 0
        found = peak_bytes(self._device)
        self._highest = max(self._highest, found)
        start_peak(self._device)
        return found


def free(device: str) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def is_memory_error(error: BaseException) -> bool:
    """Whether an exception of torch, bitsandbytes or Python means that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
