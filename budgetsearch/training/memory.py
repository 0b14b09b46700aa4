"""Memory of this process: the peak, what running out of it looks like, and how to free it."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import torch

LIBRARIES = ("_status_alloc_failed", "cublas_status_not_initialized", "cudnn_status_not_initialized")
"""What cuBLAS and cuDNN say where the card has no room for their own workspaces."""


def wake(device: str) -> None:
    """Start CUDA in this process: until then torch's allocator refuses every question about a card.

    Attention leaves cuDNN out: it plans anew for each shape of a batch, for up to a second on a card of 9.0.
    """
    if device == "cpu":
        return
    torch.cuda.init()
    torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)


def start_peak(device: str) -> None:
    """Start the peak anew: the card's, or the resident set's where the kernel can (man 5 proc)."""
    if device != "cpu":
        if torch.cuda.is_initialized():  # before, nothing was allocated
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
    empty_cache(device)


def empty_cache(device: str) -> None:
    """Give back what the allocator keeps for later."""
    if device != "cpu":
        torch.cuda.empty_cache()


def is_memory_error(error: BaseException) -> bool:
    """Whether an exception of torch, bitsandbytes or Python means that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", *LIBRARIES)
    return isinstance(error, RuntimeError) and any(word in text for word in words)
