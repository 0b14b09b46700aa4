"""The driver: over a fake of ``pynvml``, and the same assertions over the real one where it answers."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from budgetsearch.core.errors import DeviceError
from budgetsearch.machine.host import GIB, MIB, HostMemory, gib, host_memory
from budgetsearch.machine.nvml import CardLost, Driver, NvmlCard, Reading
from tests.support.fake_nvml import ERRORS, REASONS, FakeCard, FakePynvml, NVMLError, public

PID = 4242
Install = Callable[[ModuleType], Driver]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a module in place of pynvml, and gives the driver that uses it."""

    def put(module: ModuleType) -> Driver:
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return Driver()

    return put


def busy_card() -> FakeCard:
    """A card of which every value is known and unlike the others."""
    return FakeCard(
        used=10 * GIB,
        reserved=1 * GIB,
        processes=[(7, 3 * GIB), (PID, 6 * GIB)],
        percent=83,
        milliwatts=287_500,
        millijoules=5_000_250,
        celsius=61,
        reasons=REASONS["HwThermalSlowdown"] | REASONS["SwPowerCap"],
    )


EVERYTHING = Reading(
    used_bytes=10 * GIB,
    total_bytes=40 * GIB,
    free_bytes=29 * GIB,
    own_bytes=6 * GIB,
    utilization=0.83,
    watts=287.5,
    joules=5000.25,
    celsius=61.0,
    throttled=("power limit", "heat (hardware)"),
)


# ----------------------------------------------------------------- the fake against the real module


def test_everything_that_the_fake_offers_is_in_the_real_module() -> None:
    """Functions take the same arguments, constants have the same value; needs no driver."""
    real = importlib.import_module("pynvml")
    offered = public(FakePynvml())
    assert [] == [name for name in offered if not hasattr(real, name)]
    for name, mine in offered.items():
        theirs = getattr(real, name)
        if isinstance(mine, int):
            assert mine == theirs, name
        elif not isinstance(mine, type):
            names = [list(inspect.signature(call).parameters) for call in (mine, theirs)]
            assert names[1] == names[0], name
    assert {"nvmlInit", "NVMLError_GpuIsLost", "nvmlClocksEventReasonSwPowerCap"} <= set(offered)


@pytest.mark.parametrize("number", ERRORS)
def test_the_exceptions_of_the_fake_are_those_of_the_real_module(number: int) -> None:
    """The class follows the number, all are NVMLErrors, and they say the same."""
    real = importlib.import_module("pynvml")
    theirs, mine = real.NVMLError(number), NVMLError(number)
    assert type(theirs).__name__ == type(mine).__name__ == f"NVMLError_{ERRORS[number][0]}"
    assert (number, number) == (mine.value, theirs.value)
    assert isinstance(mine, NVMLError) and isinstance(theirs, real.NVMLError)
    assert number == getattr(real, type(theirs).__name__)().value == type(mine)().value
    if number in real.NVMLError._errcode_to_string:
        assert str(theirs) == str(mine)
    assert not issubclass(real.NVMLLibraryMismatchError, real.NVMLError)


# ------------------------------------------------------------------------------------ the contract


@pytest.fixture(params=["fake", "real"])
def answering(request: pytest.FixtureRequest, install: Install) -> Iterator[Driver]:
    """A driver that has a card."""
    driver = install(FakePynvml(busy_card())) if request.param == "fake" else Driver()
    if not driver.cards():
        pytest.skip(f"NVML answers with no card here: {driver.silence}")
    yield driver
    driver.close()


def test_a_driver_that_answers_gives_sound_cards_and_readings(answering: Driver) -> None:
    """Sizes fit into each other, shares are shares, energy only grows, and it can be opened again."""
    for card in answering.cards():
        assert card.uuid.startswith(("GPU-", "MIG-")) and card.name and card.index >= 0
        assert 0 <= card.free_bytes <= card.total_bytes and card.total_bytes > 0
        first, second = (answering.sample(card.uuid, os.getpid()) for _ in range(2))
        assert first is not None and second is not None and "" == answering.silence
        for reading in (first, second):
            assert 0 <= reading.used_bytes <= reading.total_bytes
            assert 0 <= reading.free_bytes <= reading.total_bytes
            assert reading.own_bytes is None or 0 <= reading.own_bytes <= reading.total_bytes
            assert reading.utilization is None or 0 <= reading.utilization <= 1
            assert reading.watts is None or 0 <= reading.watts < 5000
            assert reading.celsius is None or -20 < reading.celsius < 150
        assert first.joules is None or second.joules is None or first.joules <= second.joules
    with pytest.raises(CardLost):
        answering.sample("GPU-00000000-no-such-card", os.getpid())
    answering.close()
    answering.close()
    assert answering.cards()


# ---------------------------------------------------------------------------------------- readings


def test_a_reading_has_every_value_in_its_unit(install: Install) -> None:
    """Watts, joules, shares, and bytes by process; what the driver keeps is neither used nor free."""
    driver = install(FakePynvml(busy_card()))
    reading = driver.sample("GPU-aaaa0000", PID)
    assert reading == EVERYTHING
    assert 4 * GIB == reading.others_bytes


@pytest.mark.parametrize("number", [3, 4, 13, 999], ids=lambda number: ERRORS[number][0])
@pytest.mark.parametrize(
    ("call", "missing"),
    [
        ("nvmlDeviceGetComputeRunningProcesses", "own_bytes"),
        ("nvmlDeviceGetUtilizationRates", "utilization"),
        ("nvmlDeviceGetPowerUsage", "watts"),
        ("nvmlDeviceGetTotalEnergyConsumption", "joules"),
        ("nvmlDeviceGetTemperature", "celsius"),
    ],
)
def test_a_value_that_is_refused_is_none_and_the_others_stay(
    install: Install, call: str, missing: str, number: int
) -> None:
    """Not supported, not permitted, not known: only that value is lost."""
    card = busy_card()
    card.errors[call] = number
    reading = install(FakePynvml(card)).sample(card.uuid, PID)
    assert {**vars(EVERYTHING), missing: None} == vars(reading)


@pytest.mark.parametrize("number", [3, 4])
def test_refused_reasons_are_unknown_not_absent(install: Install, number: int) -> None:
    """None is not the empty tuple: nobody can say whether the card is slowed down."""
    card = busy_card()
    card.errors["nvmlDeviceGetCurrentClocksEventReasons"] = number
    reading = install(FakePynvml(card)).sample(card.uuid, PID)
    assert {**vars(EVERYTHING), "throttled": None} == vars(reading)


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("SwPowerCap", "power limit"),
        ("HwSlowdown", "hardware slowdown"),
        ("SwThermalSlowdown", "heat (driver)"),
        ("HwThermalSlowdown", "heat (hardware)"),
        ("HwPowerBrakeSlowdown", "power brake of the server"),
        ("GpuIdle", None),
        ("ApplicationsClocksSetting", None),
        ("SyncBoost", None),
    ],
)
def test_only_harmful_reasons_count(install: Install, reason: str, word: str | None) -> None:
    """An idle card is slow as well, and that is no news."""
    card = FakeCard(reasons=REASONS[reason])
    reading = install(FakePynvml(card)).sample(card.uuid, PID)
    assert reading is not None
    assert ((word,) if word else ()) == reading.throttled


def test_questions_that_an_old_driver_does_not_know_cost_their_answers_alone(install: Install) -> None:
    """The package says so with two kinds of errors."""
    fake = FakePynvml(busy_card())
    fake._old_driver |= {"nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetComputeRunningProcesses"}
    reading = install(fake).sample("GPU-aaaa0000", PID)
    assert {**vars(EVERYTHING), "throttled": None, "own_bytes": None} == vars(reading)


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([], None),
        ([(7, 5)], None),
        ([(PID, None)], None),
        ([(PID, 5), (PID, 6), (7, 9)], 11),
    ],
    ids=["nobody", "another", "not told", "twice"],
)
def test_what_a_process_holds_may_be_unknown(
    install: Install, processes: list[tuple[int, int | None]], expected: int | None
) -> None:
    """In a container the driver may know it by another number; then nobody knows the others' share."""
    card = FakeCard(used=20, processes=processes)
    reading = install(FakePynvml(card)).sample(card.uuid, PID)
    assert reading is not None
    assert (expected, None if expected is None else 20 - expected) == (
        reading.own_bytes,
        reading.others_bytes,
    )


def test_a_card_without_memory_of_its_own_uses_the_machines(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chip that shares the processor's memory answers "not supported"; refusal is another thing."""
    monkeypatch.setattr("budgetsearch.machine.nvml.host_memory", lambda: HostMemory(120 * GIB, 100 * GIB))
    card = FakeCard(name="NVIDIA GB10", errors={"nvmlDeviceGetMemoryInfo": 3})
    driver = install(FakePynvml(card))
    assert (NvmlCard(0, "NVIDIA GB10", "GPU-aaaa0000", 120 * GIB, 100 * GIB, None, (8, 0)),) == driver.cards()
    reading = driver.sample(card.uuid, PID)
    assert reading is not None
    assert (120 * GIB, 100 * GIB, 20 * GIB) == (reading.total_bytes, reading.free_bytes, reading.used_bytes)
    card.errors["nvmlDeviceGetMemoryInfo"] = 4
    assert ((), "card 0: Insufficient Permissions") == (driver.cards(), driver.silence)
    assert (None, "Insufficient Permissions") == (driver.sample(card.uuid, PID), driver.silence)


# ------------------------------------------------------------------------------------ lost, silent


@pytest.mark.parametrize(
    "call",
    ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetCurrentClocksEventReasons"],
)
@pytest.mark.parametrize("number", [15, 16])
def test_a_card_that_is_lost_in_the_middle_says_what_to_do(install: Install, call: str, number: int) -> None:
    """Whichever question finds it; the user is told to look, to reset and to resume."""
    card = busy_card()
    driver = install(FakePynvml(card))
    assert EVERYTHING == driver.sample(card.uuid, PID)
    card.errors[call] = number
    with pytest.raises(CardLost) as caught:
        driver.sample(card.uuid, PID)
    words = [card.uuid, ERRORS[number][1], "nvidia-smi", "reset", "reboot", "budgetsearch resume RUN"]
    assert [] == [word for word in words if word not in str(caught.value)]
    assert isinstance(caught.value, DeviceError)


def test_a_card_that_left_the_bus_is_lost(install: Install) -> None:
    """NVML does not find its UUID any more."""
    with pytest.raises(CardLost, match="GPU-gone does not answer any more"):
        install(FakePynvml(FakeCard())).sample("GPU-gone", PID)


def test_a_lost_card_does_not_hide_the_others(install: Install) -> None:
    """It is left out; alone it is the reason of the silence."""
    lost = FakeCard(uuid="GPU-lost", lost=True)
    driver = install(FakePynvml(lost, FakeCard(uuid="GPU-well")))
    assert [(1, "GPU-well")] == [(card.index, card.uuid) for card in driver.cards()]
    assert "" == driver.silence
    driver = install(FakePynvml(lost))
    assert ((), "card 0: GPU is lost") == (driver.cards(), driver.silence)


@pytest.mark.parametrize("number", [9, 12])
def test_without_a_driver_nothing_answers_and_nothing_raises(install: Install, number: int) -> None:
    """A library that cannot be opened is a machine without cards, with the reason kept."""
    driver = install(FakePynvml(FakeCard(), init_error=number))
    assert ((), ERRORS[number][1]) == (driver.cards(), driver.silence)
    assert None is driver.sample("GPU-aaaa0000", PID)
    driver.close()


def test_without_the_package_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason names what to install."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    driver = Driver()
    assert ((), None) == (driver.cards(), driver.sample("GPU-aaaa0000", PID))
    assert "nvidia-ml-py" in driver.silence


def test_a_driver_that_was_shut_down_by_others_is_opened_again(install: Install) -> None:
    """One silent reading, with the reason; the next one is there again."""
    fake = FakePynvml(busy_card())
    driver = install(fake)
    assert EVERYTHING == driver.sample("GPU-aaaa0000", PID)
    fake._users = 0
    assert (None, "Uninitialized") == (driver.sample("GPU-aaaa0000", PID), driver.silence)
    assert (EVERYTHING, "") == (driver.sample("GPU-aaaa0000", PID), driver.silence)


def test_the_driver_is_opened_at_the_first_question_and_shut_down_once(install: Install) -> None:
    """Nothing is left open, and an unused driver never loads the library."""
    fake = FakePynvml(FakeCard())
    install(fake).close()
    assert [] == fake._calls
    driver = install(fake)
    driver.cards()
    driver.sample("GPU-aaaa0000", PID)
    driver.close()
    driver.close()
    assert 0 == fake._users
    assert [1, 1] == [fake._calls.count(name) for name in ("nvmlInit", "nvmlShutdown")]


# --------------------------------------------------------------------------------------------- MIG


def divided_card() -> FakeCard:
    """A card in MIG mode with two slices; about itself it says nothing but its name."""
    name = "NVIDIA A100-SXM4-40GB"
    return FakeCard(
        name,
        errors={"nvmlDeviceGetMemoryInfo": 4},
        celsius=70,
        reasons=REASONS["SwThermalSlowdown"],
        slices=[
            FakeCard(f"{name} MIG 3g.20gb", "MIG-3333", 20 * GIB, used=2 * GIB, processes=[(PID, GIB)]),
            None,
            FakeCard(f"{name} MIG 1g.5gb", "MIG-1111", 5 * GIB),
        ],
    )


def test_in_mig_mode_the_slices_are_the_cards(install: Install) -> None:
    """Each with its own memory, at its card's index; places that are not taken are passed over."""
    driver = install(FakePynvml(divided_card(), FakeCard("NVIDIA L4", "GPU-l4", 22 * GIB)))
    name = "NVIDIA A100-SXM4-40GB"
    assert (
        NvmlCard(0, f"{name} MIG 3g.20gb", "MIG-3333", 20 * GIB, 18 * GIB, "GPU-aaaa0000", (8, 0)),
        NvmlCard(0, f"{name} MIG 1g.5gb", "MIG-1111", 5 * GIB, 5 * GIB, "GPU-aaaa0000", (8, 0)),
        NvmlCard(1, "NVIDIA L4", "GPU-l4", 22 * GIB, 22 * GIB, None, (8, 0)),
    ) == driver.cards()


def test_a_slice_has_its_own_memory_and_its_cards_heat(install: Install) -> None:
    """Utilization and power are not known by slice, and the whole card's would be a lie."""
    reading = install(FakePynvml(divided_card())).sample("MIG-3333", PID)
    expected = Reading(2 * GIB, 20 * GIB, 18 * GIB, GIB, celsius=70.0, throttled=("heat (driver)",))
    assert expected == reading


def test_a_card_in_mig_mode_without_slices_is_no_card(install: Install) -> None:
    """The reason says how to make one."""
    driver = install(FakePynvml(FakeCard(slices=[])))
    assert () == driver.cards()
    assert "card 0 is in MIG mode, but has no instance" in driver.silence
    assert "nvidia-smi mig -cgi" in driver.silence


def test_a_card_that_is_lost_in_mig_mode_is_not_called_undivided(install: Install) -> None:
    """The wrong advice would be to make an instance."""
    card = divided_card()
    card.errors["nvmlDeviceGetMigDeviceHandleByIndex"] = 15
    driver = install(FakePynvml(card))
    assert ((), "card 0: GPU is lost") == (driver.cards(), driver.silence)


def test_a_removed_slice_is_lost(install: Install) -> None:
    """Its handle is worth nothing any more."""
    card = divided_card()
    driver = install(FakePynvml(card))
    driver.sample("MIG-1111", PID)
    assert card.slices is not None and card.slices[2] is not None
    card.slices[2].errors["nvmlDeviceGetMemoryInfo"] = 2
    with pytest.raises(CardLost, match="Invalid Argument"):
        driver.sample("MIG-1111", PID)


# -------------------------------------------------------------------------------------------- host


def cgroup(folder: Path, files: dict[str, str]) -> Path:
    """A folder like the kernel's."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_the_memory_of_its_limit(tmp_path: Path, version: int) -> None:
    """What it uses is gone, but its cached files would give way."""
    names = ("memory.max", "memory.current", "memory.stat", "")
    if version == 1:
        names = (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_",
        )
    limit, use, stat, prefix = names
    lines = f"anon 1\n{prefix}active_file {5 * MIB}\n{prefix}inactive_file {6 * MIB}\nother 9\n"
    folder = cgroup(tmp_path, {limit: f"{64 * MIB}\n", use: f"{40 * MIB}\n", stat: lines})
    assert HostMemory(64 * MIB, (64 - 40 + 5 + 6) * MIB) == host_memory(folder)
    (folder / use).write_text(str(80 * MIB))
    assert HostMemory(64 * MIB, 0) == host_memory(folder)


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    """No hierarchy, no limit, or one far beyond the machine: all the same."""
    plain = host_memory(tmp_path)
    assert 0 < plain.available_bytes <= plain.total_bytes
    files = {"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "anon 5\n"}
    assert plain.total_bytes == host_memory(cgroup(tmp_path, files)).total_bytes
    huge = {**files, "memory.max": f"{2**62}\n"}
    assert plain.total_bytes == host_memory(cgroup(tmp_path, huge)).total_bytes


def test_bytes_are_written_in_gib() -> None:
    """As in every message of this package."""
    assert "39.35 GiB" == gib(int(39.35 * GIB))
