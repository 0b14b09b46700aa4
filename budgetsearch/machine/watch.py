"""The watcher of the card: a thread that looks at it five times a second while the worker trains."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import psutil

from budgetsearch.core.reports import CardUse
from budgetsearch.machine.host import MIB, gib, host_memory
from budgetsearch.machine.nvml import CardLost, Driver, Reading

INTERVAL = 0.2
"""Seconds between two looks: NVML renews most of its numbers a few times a second."""
LIMIT_SHARE = 0.97
"""The soft limit, as a share of the hard one. Estimate: of 24 GB the rest is 0.7 GB, about as much as one
large activation takes at once."""
FREE_SHARE, FREE_BYTES = 0.01, 128 * MIB
"""A card with less free memory than the larger of these is full. Estimate: CUDA's libraries take workspaces
of some dozen MB beside torch's allocator, and fail where they do not get them."""
AVAILABLE_SHARE, AVAILABLE_BYTES = 0.03, 1024 * MIB
"""The same for the machine's memory, where the smaller counts. Estimate: below this it swaps or kills."""
LOCK_SECONDS = 1.0
"""Nobody waits longer for a look under way: NVML can hang, and then the last one has to do."""
CLOSE_SECONDS = 5.0
"""So long the last look may take: NVML can hang on a lost card, and the worker must exit all the same."""


class CardWatcher:
    """Watches one card, or where no card answers this process; safe to call from several threads.

    A spike between two looks goes unseen. Memory that torch caches counts as used.
    """

    def __init__(
        self,
        uuid: str | None,
        *,
        limit_bytes: int | None = None,
        notify: Callable[[str], None] = lambda text: None,
        nvml: Driver | None = None,
        now: Callable[[], float] = time.monotonic,
        interval: float = INTERVAL,
        own: Callable[[], int] | None = None,
    ) -> None:
        """Watch a card or a slice of one from now on; call ``start`` before anything is put on it.

        Args:
            uuid: what NVML knows it by; None: there is none, watch this process.
            limit_bytes: what this process may use of it; None: all that is free.
            notify: takes a sentence for the user, from whichever thread found it; it must not close the
                watcher.
            nvml: the driver; the real one if None.
            now: a clock that never runs back, in seconds.
            interval: seconds between two looks of the thread.
            own: bytes that this process holds, for where the driver does not name it (in a container).
        """
        self._uuid, self._limit, self._notify = uuid, limit_bytes, notify
        self._nvml = nvml or Driver()
        self._now, self._interval, self._own = now, interval, own
        self._process = psutil.Process()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._tally, self._alarms = Tally(), Alarms()
        self._latest: Reading | None = None
        self._pressed = False
        self._seen = self._told_silence = self._lost = False
        self._lowest: int | None = None
        self._others: int | None = None

    def start(self) -> None:
        """Take the first look, then let a thread take the others."""
        self.take()
        self._thread = threading.Thread(target=self._watch, name="card-watcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take the last look, end the thread and let go of the driver; safe to call twice."""
        if self._closed:
            return
        self._stop.set()
        if self._thread is None:
            self.take()
        else:
            self._thread.join(CLOSE_SECONDS)
        self._closed = True
        if self._thread is None or not self._thread.is_alive():
            self._nvml.close()

    def begin(self) -> None:
        """A job begins: what ``use`` returns starts anew."""
        self._look(begin=True)

    def use(self) -> CardUse:
        """What happened since ``begin``, up to now."""
        self.take()
        with self._lock:
            return self._tally.use()

    def latest(self) -> Reading | None:
        """The last look; None before the first."""
        return self._latest

    def take(self) -> Reading:
        """Look now; after ``close`` only the last look is left."""
        return self._look()

    def pressed(self) -> bool:
        """Whether the last look found memory beyond the soft limit.

        What torch caches counts; give it back and ``check`` before anything shrinks for it.
        """
        return self._pressed

    def check(self) -> bool:
        """Look now; whether memory is beyond the soft limit."""
        self.take()
        return self._pressed

    def _watch(self) -> None:
        told = False
        while True:
            last = self._stop.wait(self._interval)
            try:
                self.take()
            except Exception as error:  # one look that fails must not end the watch
                self._pressed = False
                if not told:
                    told = True
                    self._notify(f"The card could not be looked at ({type(error).__name__}: {error}).")
            if last:
                return

    def _look(self, begin: bool = False) -> Reading:
        messages: list[str] = []
        if not self._lock.acquire(timeout=LOCK_SECONDS if self._latest else -1) and self._latest:
            return self._latest
        try:
            if begin:
                self._tally = Tally()
            if self._latest is None or not self._closed:
                self._latest = self._judge(messages)
            reading = self._latest
        finally:
            self._lock.release()
        for message in messages:  # outside of the lock: whoever is told may ask back
            self._notify(message)
        return reading

    def _judge(self, messages: list[str]) -> Reading:
        """A new reading, counted and compared with the limits."""
        reading, now = self._ask_card(messages), self._now()
        if reading is None:
            reading = self._ask_process()
            least = min(AVAILABLE_SHARE * reading.total_bytes, AVAILABLE_BYTES)
            self._pressed = not self._lost and reading.free_bytes < least
            if not self._seen:  # never mix the memory of a card with that of a process
                self._tally.add(reading, 0, now)
            return reading
        # What was freed between the two questions of a reading looks like the others' for one reading.
        others, before = reading.others_bytes, self._others
        steady = others if others is None or before is None else min(others, before)
        self._others = others
        self._lowest = reading.used_bytes if self._lowest is None else min(self._lowest, reading.used_bytes)
        self._pressed = self._full(reading, self._lowest)
        self._tally.add(reading, steady or 0, now)
        messages += self._alarms.look(reading, steady, now)
        return reading

    def _ask_card(self, messages: list[str]) -> Reading | None:
        if self._uuid is None or self._lost:
            return None
        try:
            reading = self._nvml.sample(self._uuid, self._process.pid)
        except CardLost as error:
            self._lost = True
            messages.append(str(error))
            return None
        if reading is not None:
            self._seen = True
            if reading.own_bytes is None and self._own is not None:
                return replace(reading, own_bytes=self._own())
            return reading
        if not self._told_silence:
            self._told_silence = True
            messages.append(
                f"NVML does not answer for the card ({self._nvml.silence}): the run goes on, but only the "
                "memory of its process is watched, and neither energy nor utilization is known."
            )
        if not self._seen:  # there is no driver, and there will be none
            self._uuid = None
        return None

    def _ask_process(self) -> Reading:
        memory, own = host_memory(), int(self._process.memory_info().rss)
        return Reading(own, memory.total_bytes, memory.available_bytes, own)

    def _full(self, reading: Reading, lowest_bytes: int) -> bool:
        # Where the driver does not name processes, what was used before this one began is the others'.
        own = reading.own_bytes if reading.own_bytes is not None else reading.used_bytes - lowest_bytes
        if self._limit is not None and own > LIMIT_SHARE * self._limit:
            return True
        return reading.free_bytes < max(FREE_SHARE * reading.total_bytes, FREE_BYTES)


OTHERS_SHARE, OTHERS_BYTES = 0.01, 256 * MIB
"""Growth of other processes below the larger of these is not worth a word. Estimate: an idle CUDA context
takes 200 to 500 MB, a desktop that opens a window less."""
THROTTLE_SECONDS = 10.0
"""A card that is slowed down for less has only met a peak of power or heat."""


class Alarms:
    """Turns readings into sentences."""

    def __init__(self) -> None:
        self._others_at_start: int | None = None
        self._told_growth = 0
        self._since: dict[str, float] = {}
        self._told_reasons: set[str] = set()

    def look(self, reading: Reading, others_bytes: int | None, now: float) -> list[str]:
        """What is new in a reading, taken at ``now`` seconds; usually nothing."""
        return self._others(reading, others_bytes) + self._throttling(reading, now)

    def _others(self, reading: Reading, others_bytes: int | None) -> list[str]:
        if others_bytes is None:
            return []
        if self._others_at_start is None:
            self._others_at_start = others_bytes
        growth = others_bytes - self._others_at_start
        least = max(OTHERS_SHARE * reading.total_bytes, OTHERS_BYTES, 2 * self._told_growth)
        if growth <= least:
            return []
        self._told_growth = growth
        return [
            f"Another process took {gib(growth)} of the card since the run began; {gib(reading.free_bytes)} "
            "are free. Stop it (nvidia-smi shows it), or the micro-batches will shrink."
        ]

    def _throttling(self, reading: Reading, now: float) -> list[str]:
        reasons = reading.throttled or ()
        self._since = {reason: self._since.get(reason, now) for reason in reasons}
        lasting = [reason for reason, since in self._since.items() if now - since > THROTTLE_SECONDS]
        new = [reason for reason in lasting if reason not in self._told_reasons]
        self._told_reasons.update(new)
        return [
            f"The card has run below its speed for {THROTTLE_SECONDS:.0f} s: {reason}. Tokens per second "
            "suffer; nvidia-smi -q -d PERFORMANCE tells more."
            for reason in new
        ]


class Tally:
    """Adds up readings; the sum is a ``CardUse``."""

    def __init__(self) -> None:
        self._last: Reading | None = None
        self._last_time = 0.0
        self._samples = 0
        self._peak_bytes = 0
        self._others_bytes = 0
        self._utilization: list[float] = []
        self._joules: float | None = None
        self._celsius: float | None = None
        self._throttled: Counter[str] = Counter()

    def add(self, reading: Reading, others_bytes: int, now: float) -> None:
        """Count one reading, taken at ``now`` seconds of any clock."""
        if self._last is not None:
            joules = _joules(self._last, reading, now - self._last_time)
            if joules is not None:
                self._joules = (self._joules or 0.0) + joules
        self._last, self._last_time = reading, now
        self._samples += 1
        self._peak_bytes = max(self._peak_bytes, reading.used_bytes)
        self._others_bytes = max(self._others_bytes, others_bytes)
        if reading.utilization is not None:
            self._utilization.append(reading.utilization)
        if reading.celsius is not None:
            self._celsius = max(reading.celsius, self._celsius or reading.celsius)
        self._throttled.update(reading.throttled or ())

    def use(self) -> CardUse:
        """The sum so far."""
        known = len(self._utilization)
        return CardUse(
            samples=self._samples,
            peak_bytes=self._peak_bytes,
            others_bytes=self._others_bytes,
            utilization=sum(self._utilization) / known if known else None,
            joules=self._joules,
            celsius=self._celsius,
            throttled={reason: count / self._samples for reason, count in self._throttled.items()},
        )


def _joules(before: Reading, after: Reading, seconds: float) -> float | None:
    """Energy between two readings: by the card's counter, else by its power; None: nobody can say."""
    if before.joules is not None and after.joules is not None and after.joules >= before.joules:
        return after.joules - before.joules
    if before.watts is not None and after.watts is not None:
        return (before.watts + after.watts) / 2 * seconds
    return None
