"""How many threads compute fastest on this CPU now: the threads of a pass wait for each other, so one that
has to share its core with another process holds up all.

The number changes only between jobs, and stands in each result (``training.machine``): sums round by it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from budgetsearch.training.attention import unmasked
from budgetsearch.training.batches import collate
from budgetsearch.training.losses import target_losses
from budgetsearch.training.members import Shop

ROUNDS = 3
"""Each number has a turn so often, one after the other, so that a burst of other work meets all of them."""
LIMIT_SECONDS = 6.0
"""No further pass begins after so long, once there is something to choose from."""
HOPELESS = 2.0
"""What takes so many times as long as the best, twice, gets no further turn."""
GAIN = 1.1
"""Fewer threads have to be so many times as fast as all: else they are only luckier."""
FALLEN = 0.6
"""Below this share of the best rate of its kind a segment has found the machine changed."""
VARIABLE = "OMP_NUM_THREADS"
"""Whoever sets it has decided."""


def numbers(most: int) -> list[int]:
    """Numbers of threads to try: all, and each time half as many."""
    found = [most]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found


def fastest(
    time_pass: Callable[[int], float], most: int, now: Callable[[], float] = time.monotonic
) -> tuple[int, float]:
    """(the number of threads with the fastest pass, how many times as fast as with ``most``).

    ``time_pass``: seconds of a pass with so many threads.
    """
    seconds: dict[int, list[float]] = {number: [] for number in numbers(most)}
    begun, medians = now(), dict[int, float]()
    for _ in range(ROUNDS):
        for number in [*seconds]:
            if len(medians) > 1 and now() - begun > LIMIT_SECONDS:
                break
            seconds[number].append(time_pass(number))
            medians[number] = statistics.median(seconds[number])
        best = min(medians.values())
        hopeless = [n for n, some in seconds.items() if len(some) > 1 and min(some) > HOPELESS * best]
        seconds = {n: some for n, some in seconds.items() if n not in hopeless}
    chosen = min(medians, key=lambda number: (medians[number], -number))
    gain = medians[most] / medians[chosen]
    return (chosen, gain) if gain >= GAIN else (most, 1.0)


class Threads:
    """The threads of a worker, as many as pay."""

    def __init__(self, device: str, notice: Callable[[str], None]) -> None:
        self.most = torch.get_num_threads()
        """As many as torch takes by itself."""
        self._fixed = device != "cpu" or bool(os.environ.get(VARIABLE)) or self.most == 1
        self._notice, self._look = notice, True
        self._best: dict[tuple[Any, ...], float] = {}

    def settle(self, base: Any, shop: Shop) -> None:
        """Choose the number before a job, if nobody has yet or the rate has fallen since."""
        if self._fixed or not self._look:
            return
        self._look, before = False, torch.get_num_threads()
        time_pass = passes(base, shop)
        chosen, gain = fastest(time_pass, self.most)
        torch.set_num_threads(chosen)
        if chosen != before:
            why = f", {gain:.1f} times as fast as {self.most} now" if chosen < self.most else ""
            self._notice(f"the CPU computes with {chosen} of {self.most} threads{why}")

    def note(self, kind: tuple[Any, ...], rate: float) -> None:
        """A segment of this kind had so many tokens per second."""
        best = self._best[kind] = max(rate, self._best.get(kind, 0.0))
        if rate < FALLEN * best:
            self._look = True
            self._best.clear()  # from here on it is held against what there is now


def passes(base: Any, shop: Shop) -> Callable[[int], float]:
    """A clock for passes forward over one row of middling length, which is the same in each."""
    data = shop.data.train
    row = sorted(range(len(data)), key=lambda one: (data.lengths[one], one))[len(data) // 2]
    batch = collate([data], [[row]], shop.pad)

    def time_pass(number: int) -> float:
        torch.set_num_threads(number)
        with torch.inference_mode(), unmasked(base, batch.ids.shape[1]):
            start = time.perf_counter()
            target_losses(base, batch)
            return time.perf_counter() - start

    time_pass(torch.get_num_threads())  # the first one allocates
    return time_pass
