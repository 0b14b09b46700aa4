"""The watcher of the card, on a virtual clock: peaks, limits, energy, warnings, and how it ends."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

import pytest

from budgetsearch.core.reports import CardUse
from budgetsearch.machine.host import GIB, MIB, HostMemory
from budgetsearch.machine.nvml import Driver, NvmlCard, Reading
from budgetsearch.machine.watch import CardWatcher
from tests.support.fake_nvml import REASONS, FakeCard, FakePynvml

PID = os.getpid()


class Bench:
    """A watcher of one card, with a clock that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.card = FakeCard(reserved=GIB)
        self.fake = FakePynvml(self.card)
        monkeypatch.setitem(sys.modules, "pynvml", self.fake)
        self.said: list[str] = []
        self.seconds = 100.0

    def watcher(self, uuid: str | None = "GPU-aaaa0000", limit: int | None = None) -> CardWatcher:
        return CardWatcher(uuid, limit_bytes=limit, notify=self.said.append, now=lambda: self.seconds)

    def hold(self, own: int | None, others: int = 0) -> None:
        """What processes have on the card; own None: the driver does not name this one."""
        self.card.used = (own or 0) + others
        self.card.processes = [] if own is None else [(PID, own)]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """One A100, of which the driver keeps one GiB for itself."""
    return Bench(monkeypatch)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets which share of the machine's memory is left."""

    def leave(share: float) -> None:
        monkeypatch.setattr(
            "budgetsearch.machine.watch.host_memory", lambda: HostMemory(100 * GIB, int(share * 100 * GIB))
        )

    leave(0.5)
    return leave


# --------------------------------------------------------------------------------------- aggregates


def test_a_job_begins_with_clean_sums(bench: Bench) -> None:
    """What was before ``begin`` does not count; its own first look and that of ``use`` do."""
    watcher = bench.watcher()
    bench.hold(30 * GIB, 5 * GIB)
    bench.card.percent, bench.card.celsius = 100, 90
    watcher.take()
    bench.hold(2 * GIB)
    bench.card.percent, bench.card.celsius = 20, 50
    watcher.take()
    watcher.begin()
    bench.hold(8 * GIB)
    bench.card.percent, bench.card.celsius = 80, 60
    watcher.take()
    bench.hold(4 * GIB)
    bench.card.percent, bench.card.celsius = 50, 55
    assert CardUse(3, 8 * GIB, 0, pytest.approx(0.5), 0.0, 60.0) == watcher.use()


def test_the_peak_is_that_of_all_processes(bench: Bench) -> None:
    """Beside it stands what the others held at most."""
    watcher = bench.watcher()
    watcher.begin()
    for own, others in ((4, 1), (10, 3), (9, 3), (2, 1)):
        bench.hold(own * GIB, others * GIB)
        watcher.take()
    use = watcher.use()
    assert (13 * GIB, 3 * GIB) == (use.peak_bytes, use.others_bytes)


def test_energy_is_the_difference_of_the_cards_counter(bench: Bench) -> None:
    """Not the power at the looks, which may all have missed the work."""
    watcher = bench.watcher()
    bench.card.millijoules = 5_000_000
    watcher.take()
    watcher.begin()
    for millijoules in (5_040_000, 5_300_500):
        bench.seconds += 10
        bench.card.millijoules = millijoules
        watcher.take()
    assert 300.5 == watcher.use().joules


def test_without_a_counter_energy_is_power_over_time(bench: Bench) -> None:
    """The mean of two looks, times the seconds between them."""
    bench.card.errors["nvmlDeviceGetTotalEnergyConsumption"] = 3
    watcher = bench.watcher()
    bench.card.milliwatts = 100_000
    watcher.begin()
    bench.seconds += 2
    bench.card.milliwatts = 300_000
    watcher.take()
    bench.seconds += 3
    assert 400 + 900 == watcher.use().joules


def test_a_counter_that_begins_anew_costs_no_energy(bench: Bench) -> None:
    """A driver that was loaded again counts from zero; for that interval power stands in."""
    watcher = bench.watcher()
    bench.card.millijoules, bench.card.milliwatts = 9_000_000, 50_000
    watcher.begin()
    bench.seconds += 2
    bench.card.millijoules = 1_000
    watcher.take()
    bench.card.millijoules = 11_000
    assert 100 + 10 == watcher.use().joules


def test_what_nobody_can_say_is_none(bench: Bench) -> None:
    """No zero where there is no measurement."""
    for call in ("UtilizationRates", "PowerUsage", "TotalEnergyConsumption", "Temperature"):
        bench.card.errors[f"nvmlDeviceGet{call}"] = 3
    watcher = bench.watcher()
    watcher.begin()
    use = watcher.use()
    assert (None, None, None, {}) == (use.utilization, use.joules, use.celsius, use.throttled)


def test_throttling_is_a_share_of_the_looks(bench: Bench) -> None:
    """By reason."""
    watcher = bench.watcher()
    watcher.begin()
    for reasons in (REASONS["SwPowerCap"], REASONS["SwPowerCap"] | REASONS["HwThermalSlowdown"]):
        bench.card.reasons = reasons
        watcher.take()
    bench.card.reasons = REASONS["GpuIdle"]
    assert {"power limit": 0.5, "heat (hardware)": 0.25} == watcher.use().throttled


def test_a_slice_has_no_energy_and_no_utilization(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole card's are not its own."""
    part = FakeCard("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "MIG-1", 5 * GIB, used=GIB, processes=[(PID, GIB)])
    monkeypatch.setitem(sys.modules, "pynvml", FakePynvml(FakeCard(slices=[part])))
    watcher = CardWatcher("MIG-1")
    watcher.begin()
    assert CardUse(2, GIB, 0, None, None, 40.0) == watcher.use()


# -------------------------------------------------------------------------------------- soft limit


@pytest.mark.parametrize(("own", "expected"), [(9.69, False), (9.71, True)])
def test_own_use_beyond_97_percent_of_the_limit_presses(bench: Bench, own: float, expected: bool) -> None:
    """What others hold does not count here: the limit is this process's."""
    watcher = bench.watcher(limit=10 * GIB)
    bench.hold(int(own * GIB), 5 * GIB)
    assert expected is watcher.check()
    assert expected is watcher.pressed()


def test_pressure_ends_when_memory_is_given_back(bench: Bench) -> None:
    """``pressed`` only remembers the last look; ``check`` looks."""
    watcher = bench.watcher(limit=10 * GIB)
    assert not watcher.pressed()
    bench.hold(10 * GIB)
    assert not watcher.pressed()
    assert watcher.check()
    bench.hold(5 * GIB)
    assert watcher.pressed()
    assert not watcher.check()


@pytest.mark.parametrize(
    ("total", "free", "expected"),
    [
        (40 * GIB, 411 * MIB, False),
        (40 * GIB, 408 * MIB, True),  # 1% is 409.6 MiB
        (8 * GIB, 129 * MIB, False),
        (8 * GIB, 127 * MIB, True),  # 1% would be 82 MiB
    ],
)
def test_a_full_card_presses_whoever_filled_it(bench: Bench, total: int, free: int, expected: bool) -> None:
    """The larger of 1% and 128 MiB must be free, with or without a limit."""
    bench.card.total = total
    watcher = bench.watcher()
    bench.hold(MIB, total - GIB - MIB - free)
    assert expected is watcher.check()


def test_where_the_driver_names_no_process_the_growth_is_its_own(bench: Bench) -> None:
    """What others held before must not press for ever; whatever is added counts against the limit."""
    watcher = bench.watcher(limit=10 * GIB)
    bench.hold(None, 20 * GIB)
    assert not watcher.check()
    bench.hold(None, 29 * GIB)
    assert not watcher.check()
    bench.hold(None, 30 * GIB)
    assert watcher.check()
    bench.hold(None, 18 * GIB)  # a neighbour left: there is 2 GiB more than was thought
    assert not watcher.check()
    bench.hold(None, 28 * GIB)
    assert watcher.check()


def test_on_an_empty_card_the_growth_is_all_use(bench: Bench) -> None:
    """Nothing was there before, so nothing is subtracted, now or later."""
    watcher = bench.watcher(limit=10 * GIB)
    bench.hold(None, 0)
    assert not watcher.check()
    bench.hold(None, int(9.8 * GIB))
    assert [True, True] == [watcher.check(), watcher.check()]


# ------------------------------------------------------------------------------------------ others


def test_growing_neighbours_are_told_once_per_doubling(bench: Bench) -> None:
    """Beyond 1% of the card over what they held at the start."""
    watcher = bench.watcher()
    for others in (2, 2.3, 2.3):  # 0.3 GiB is under 1% of 40 GiB
        bench.hold(4 * GIB, int(others * GIB))
        watcher.take()
    assert [] == bench.said
    for others, told in ((3, 1), (3.9, 1), (4.1, 2), (6, 2), (6.3, 3), (2, 3), (6.3, 3)):
        bench.hold(4 * GIB, int(others * GIB))
        watcher.take()
        watcher.take()
        assert told == len(bench.said), others
    assert "Another process took 1.00 GiB of the card" in bench.said[0]
    assert "32.00 GiB are free" in bench.said[0]
    assert "took 4.30 GiB" in bench.said[2]


def test_on_a_small_card_256_mib_are_the_least(bench: Bench) -> None:
    """A desktop that opens a window is no news."""
    bench.card.total = 8 * GIB
    watcher = bench.watcher()
    for others, told in ((0, 0), (255, 0), (257, 1)):
        bench.hold(GIB, others * MIB)
        watcher.take()
        watcher.take()
        assert told == len(bench.said), others


def test_memory_that_is_freed_between_two_questions_is_no_neighbour(bench: Bench) -> None:
    """Used and own are asked one after the other; a single odd look neither warns nor counts."""
    watcher = bench.watcher()
    bench.hold(8 * GIB)
    watcher.begin()
    bench.card.processes = [(PID, 2 * GIB)]  # 6 GiB were freed after "used" was read
    watcher.take()
    bench.hold(2 * GIB)
    watcher.take()
    assert (0, []) == (watcher.use().others_bytes, bench.said)


def test_unnamed_processes_are_never_blamed(bench: Bench) -> None:
    """Where the driver does not say what is our own, all growth may be."""
    watcher = bench.watcher()
    for used in (1, 20, 35):
        bench.hold(None, used * GIB)
        watcher.take()
        watcher.take()
    assert (0, []) == (watcher.use().others_bytes, bench.said)


# -------------------------------------------------------------------------------------- throttling


def test_a_card_that_is_slow_for_long_is_told_once_per_reason(bench: Bench) -> None:
    """Ten seconds without a break; a break begins anew, and what was told stays told."""
    watcher = bench.watcher()

    def go(reason: str, seconds: float) -> int:
        bench.card.reasons = REASONS[reason]
        for _ in range(int(seconds / 0.5)):
            watcher.take()
            bench.seconds += 0.5
        return len(bench.said)

    assert 0 == go("SwThermalSlowdown", 10)
    assert 0 == go("GpuIdle", 1)
    assert 0 == go("SwThermalSlowdown", 10)
    assert 1 == go("SwThermalSlowdown", 1.5)
    assert 1 == go("SwThermalSlowdown", 30)
    assert 1 == go("GpuIdle", 5)
    assert 1 == go("SwThermalSlowdown", 30)
    assert 2 == go("SwPowerCap", 30)
    assert ["heat (driver)" in bench.said[0], "power limit" in bench.said[1]] == [True, True]


# ---------------------------------------------------------------------------------- lost and silent


def test_a_lost_card_is_told_once_and_presses_nobody(bench: Bench, host: Callable[[float], None]) -> None:
    """Looks go on without raising, on the process; the sums keep what the card gave."""
    host(0.005)
    watcher = bench.watcher(limit=10 * GIB)
    bench.hold(10 * GIB)
    watcher.begin()
    assert watcher.check()
    bench.card.lost = True
    assert not watcher.check()
    asked = len(bench.fake._calls)
    reading = watcher.take()
    assert asked == len(bench.fake._calls), "a lost card must not be asked again: the question can hang"
    assert (100 * GIB, None) == (reading.total_bytes, reading.watts)
    use = watcher.use()
    assert (2, 10 * GIB, 1) == (use.samples, use.peak_bytes, len(bench.said))
    assert "budgetsearch resume RUN" in bench.said[0]


def test_a_silent_driver_is_told_once_and_the_process_is_watched(
    bench: Bench, host: Callable[[float], None]
) -> None:
    """The resident set stands for the card; other processes and energy are not known."""
    bench.fake._init_error = 9
    watcher = bench.watcher(limit=1)
    watcher.begin()
    use = watcher.use()
    assert 1_000_000 < use.peak_bytes < 100 * GIB
    assert (2, 0, None, None) == (use.samples, use.others_bytes, use.utilization, use.joules)
    assert not watcher.pressed()
    host(0.005)
    assert watcher.check()
    assert 1 == len(bench.said)
    assert "NVML does not answer for the card (Driver Not Loaded)" in bench.said[0]
    assert 1 == bench.fake._calls.count("nvmlInit"), "a driver that is not there is asked once"


def test_a_driver_that_falls_silent_for_a_while_is_told_once(
    bench: Bench, host: Callable[[float], None]
) -> None:
    """The sums of the card are not mixed with the memory of the process, and go on when it is back."""
    watcher = bench.watcher()
    bench.hold(10 * MIB)
    watcher.begin()
    bench.card.errors["nvmlDeviceGetMemoryInfo"] = 999
    watcher.take()
    assert 100 * GIB == watcher.take().total_bytes
    del bench.card.errors["nvmlDeviceGetMemoryInfo"]
    assert 40 * GIB == watcher.take().total_bytes
    use = watcher.use()
    assert (3, 10 * MIB, 1) == (use.samples, use.peak_bytes, len(bench.said))


def test_on_the_cpu_nothing_needs_saying(bench: Bench, host: Callable[[float], None]) -> None:
    """No driver is loaded; memory below 3% of the machine presses."""
    watcher = bench.watcher(None)
    watcher.begin()
    assert not watcher.check()
    host(0.011)
    assert not watcher.check()
    host(0.009)
    assert watcher.check()
    watcher.close()
    assert ([], []) == (bench.said, bench.fake._calls)
    assert watcher.use().peak_bytes > 1_000_000


# ---------------------------------------------------------------------------------------- the thread


class Counting:
    """A driver that counts looks, and tells when there were enough."""

    silence = ""

    def __init__(self, enough: int) -> None:
        self.looks = self.closed = 0
        self.enough = enough
        self.reached = threading.Event()
        self.threads: set[str] = set()

    def cards(self) -> tuple[NvmlCard, ...]:
        return ()

    def sample(self, uuid: str, pid: int) -> Reading | None:
        assert not self.closed, "a look after the driver was let go"
        self.looks += 1
        self.threads.add(threading.current_thread().name)
        if self.looks >= self.enough:
            self.reached.set()
        return Reading(self.looks * MIB, GIB, GIB, own_bytes=self.looks * MIB)

    def close(self) -> None:
        self.closed += 1


def test_the_thread_looks_by_itself_and_ends_with_a_last_look() -> None:
    """Before the driver is let go, once; a second close does nothing."""
    nvml = Counting(enough=4)
    watcher = CardWatcher("GPU-1", nvml=nvml, interval=0.001)
    watcher.start()
    assert nvml.reached.wait(30)
    assert {threading.current_thread().name, "card-watcher"} == nvml.threads
    watcher.close()
    assert "card-watcher" not in {thread.name for thread in threading.enumerate()}
    looks = nvml.looks
    assert looks >= 5
    watcher.close()
    latest = watcher.latest()
    assert latest is not None
    assert (looks, 1, looks * MIB) == (nvml.looks, nvml.closed, latest.used_bytes)


def test_closing_drains() -> None:
    """With an interval longer than the job, its peak is still in the last look; then nothing looks."""
    nvml = Counting(enough=1)
    watcher = CardWatcher("GPU-1", nvml=nvml, interval=3600)
    watcher.start()
    watcher.begin()
    watcher.close()
    assert (3, 1) == (nvml.looks, nvml.closed)
    assert CardUse(2, 3 * MIB) == watcher.use()
    assert (3 * MIB, 3) == (watcher.take().used_bytes, nvml.looks)


def test_closing_a_watcher_that_never_started_looks_once_and_lets_go() -> None:
    """The same end without the thread."""
    nvml = Counting(enough=1)
    CardWatcher("GPU-1", nvml=nvml).close()
    assert (1, 1) == (nvml.looks, nvml.closed)


def test_a_look_that_hangs_does_not_keep_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML can hang on a lost card; the driver is then left open rather than shut down under the look."""
    release, hanging = threading.Event(), threading.Event()

    class Hanging(Counting):
        def sample(self, uuid: str, pid: int) -> Reading | None:
            if threading.current_thread().name == "card-watcher":
                hanging.set()
                release.wait(30)
            return super().sample(uuid, pid)

    monkeypatch.setattr("budgetsearch.machine.watch.CLOSE_SECONDS", 0.01)
    nvml = Hanging(enough=1)
    watcher = CardWatcher("GPU-1", nvml=nvml, interval=0.001)
    watcher.start()
    assert hanging.wait(30)
    watcher.close()
    assert 0 == nvml.closed
    release.set()


def test_whoever_is_told_may_ask_back(bench: Bench) -> None:
    """Sentences are told outside of the lock."""
    answers: list[object] = []
    watcher = CardWatcher("GPU-aaaa0000", notify=lambda text: answers.append(watcher.use().samples))
    bench.card.lost = True
    watcher.take()
    assert 1 == len(answers)


def test_the_real_driver_is_shut_down(bench: Bench) -> None:
    """No user of the library is left."""
    watcher = bench.watcher()
    watcher.start()
    watcher.close()
    assert 0 == bench.fake._users
    assert isinstance(watcher._nvml, Driver)


def test_where_the_driver_names_nobody_the_process_says_what_it_holds(bench: Bench) -> None:
    """In a container: a neighbour that grows is a neighbour, and not taken for our own use."""
    held = [20 * GIB]
    watcher = CardWatcher(
        "GPU-aaaa0000",
        limit_bytes=round(39.35 * GIB),
        notify=bench.said.append,
        now=lambda: bench.seconds,
        own=lambda: held[0],
    )
    bench.card.total, bench.card.used, bench.card.processes = 80 * GIB, 20 * GIB, []
    watcher.take()
    bench.card.used = 50 * GIB
    for _ in range(2):
        watcher.take()
    assert not watcher.pressed()
    assert any("Another process took 30.00 GiB" in text for text in bench.said)
    held[0] = 39 * GIB
    assert watcher.check()


class Stuck(Counting):
    """A driver whose second look hangs until it is let go."""

    def __init__(self) -> None:
        super().__init__(2)
        self.let_go = threading.Event()

    def sample(self, uuid: str, pid: int) -> Reading | None:
        found = super().sample(uuid, pid)
        if self.looks == 2:
            self.let_go.wait(30)
        return found


def test_a_look_that_hangs_does_not_hold_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks meanwhile gets the last look."""
    monkeypatch.setattr("budgetsearch.machine.watch.LOCK_SECONDS", 0.05)
    driver = Stuck()
    watcher = CardWatcher("GPU-1", nvml=driver, interval=0.001)
    watcher.start()
    assert driver.reached.wait(30)
    assert watcher.take().used_bytes == MIB
    driver.let_go.set()
    watcher.close()


class Odd(Counting):
    """A driver whose third look fails in a way that nobody foresaw."""

    def sample(self, uuid: str, pid: int) -> Reading | None:
        found = super().sample(uuid, pid)
        if self.looks == 3:
            raise RuntimeError("what is this?")
        return found


def test_a_look_that_fails_oddly_does_not_end_the_watch() -> None:
    """It is told once, and the next look counts again."""
    said: list[str] = []
    driver = Odd(6)
    watcher = CardWatcher("GPU-1", nvml=driver, notify=said.append, interval=0.001)
    watcher.start()
    assert driver.reached.wait(30)
    watcher.close()
    assert len([text for text in said if "what is this?" in text]) == 1
