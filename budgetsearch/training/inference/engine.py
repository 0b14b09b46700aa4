"""The thread that owns the model: who waits joins the batch under way, who is done or gone leaves it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from budgetsearch.core.errors import BudgetsearchError
from budgetsearch.training.inference.sequence import Answer
from budgetsearch.training.memory import free, is_memory_error

LOGGER = logging.getLogger("budgetsearch.serve")
JOIN_TOKENS = 16
"""So long a batch goes on before those who wait join it: to join, all that is known is read again."""


class Busy(BudgetsearchError):
    """As many wait as may."""


class Closing(BudgetsearchError):
    """No more is taken on."""


class BatchLike(Protocol):
    """What runs the model."""

    def look(self, answers: Sequence[Answer]) -> None:
        """See ``Batch.look``."""

    def write(self, answers: Sequence[Answer], pause: Callable[[], bool]) -> None:
        """See ``Batch.write``."""


@dataclass
class Counts:
    """What the engine has done since it began."""

    prompt_tokens: int = 0
    tokens: int = 0
    answers: int = 0
    cancelled: int = 0
    failed: int = 0
    joined: int = 0
    """Batches that were interrupted so that others could join."""


@dataclass
class Engine:
    """Takes answers on from any thread and writes them in its own."""

    batch: BatchLike
    device: str
    rows: int = 8
    """Written at once; halved for good when memory runs out."""
    most_waiting: int = 64
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self._waiting: deque[Answer] = deque()
        self._active: list[Answer] = []
        self._ready = threading.Condition()
        self._closing = False
        self._steps = 0
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    # ------------------------------------------------------------------ from other threads

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Answers that no batch has taken in yet."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Answers that are being written."""
        return len(self._active)

    @property
    def is_alive(self) -> bool:
        """Whether it still takes work on."""
        return self._thread.is_alive() and not self._closing

    def submit(self, answers: Sequence[Answer]) -> None:
        """Take these on together, or none of them.

        Raises:
            Busy: too many wait.
            Closing: the server is about to end.
        """
        with self._ready:
            if self._closing:
                raise Closing("The server is shutting down; ask another one.")
            idle = self.rows - len(self._active)
            if len(self._waiting) + len(answers) > self.most_waiting + max(0, idle):
                raise Busy(
                    f"{len(self._waiting)} answers wait already, and {len(answers)} more do not fit into a "
                    f"queue of {self.most_waiting}. Try again in a moment, or serve with a longer --queue."
                )
            self._waiting.extend(answers)
            self._ready.notify()

    def close(self, seconds: float) -> None:
        """Write what was taken on, at most so long, and end; what is left then is cancelled."""
        with self._ready:
            self._closing = True
            self._ready.notify()
        self._thread.join(seconds)
        for answer in [*self._active, *self._waiting]:
            answer.cancelled = True
        self._thread.join(seconds)

    # ---------------------------------------------------------------------- in its thread

    def _run(self) -> None:
        while self._filled():
            group, spared = list(self._active), 0
            try:
                self._go_on(group)
            except Exception as error:  # one bad request must not end the server
                spared = self._survive(error, group)
            live = [one for one in group if not one.finish]
            self._active = live[: len(live) - spared]
            self._count(one for one in group if one.finish)

    def _filled(self) -> bool:
        """Wait for work and take it into the batch; whether there is any more to do."""
        with self._ready:
            while not (self._waiting or self._active or self._closing):
                self._ready.wait()
            while self._waiting and len(self._active) < self.rows:
                answer = self._waiting.popleft()
                if answer.cancelled:
                    answer.end("cancelled")
                    self._count([answer])
                else:
                    self._active.append(answer)
            return bool(self._active or self._waiting or not self._closing)

    def _go_on(self, group: Sequence[Answer]) -> None:
        for answer in group:
            if answer.cancelled:
                answer.end("cancelled")
        unseen = [one for one in group if one.sampling.echo and one.prompt_tokens is None and not one.finish]
        if unseen:
            self.batch.look(unseen)
        if live := [one for one in group if not one.finish]:
            self._steps = 0
            self.batch.write(live, self._pause)

    def _pause(self) -> bool:
        """Whether somebody waits who would fit in."""
        self._steps += 1
        if not self._waiting or self._steps < JOIN_TOKENS:
            return False
        room = sum(1 for one in self._active if not one.finish) < self.rows
        self.counts.joined += room
        return room

    def _survive(self, error: Exception, group: Sequence[Answer]) -> int:
        """Out of memory: fewer at once, and the same once more; all else fails the answers of this batch.
        Returns how many of the last ones went back to the queue."""
        live = [one for one in group if not one.finish]
        if is_memory_error(error):
            free(self.device)
            if len(live) > 1:
                self.rows = max(1, len(live) // 2)
                LOGGER.warning("memory ran out with %d answers at once; now %d", len(live), self.rows)
                with self._ready:
                    self._waiting.extendleft(reversed(live[self.rows :]))
                return len(live) - self.rows
        LOGGER.error("a batch of %d answers failed: %s: %s", len(live), type(error).__name__, error)
        for one in live:
            one.end("error", f"{type(error).__name__}: {error}"[:300])
        return 0

    def _count(self, over: Iterable[Answer]) -> None:
        for one in over:
            self.counts.answers += 1
            self.counts.prompt_tokens += len(one.prompt)
            self.counts.tokens += len(one.tokens)
            self.counts.cancelled += one.finish == "cancelled"
            self.counts.failed += one.finish == "error"
