"""Detection: which card of this machine ``--gpu`` and ``--device`` mean, and how a worker gets it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from budgetsearch.core.errors import DeviceError
from budgetsearch.machine.host import GIB, gib, host_memory
from budgetsearch.machine.nvml import Driver, NvmlCard
from budgetsearch.machine.profiles import PROFILES, CardProfile, profile

SEVEN_B_BYTES = 20 * GIB
"""A 7B in bf16 with adapters and a short micro-batch needs about this much (litgpt: 21.3 GB)."""
SMALL = PROFILES["t4"]
"""For an unknown card on which a 7B does not fit."""
BUSY_SHARE = 0.9
"""With less than this share of its memory free, a card is in use by others (estimate: an empty desktop
holds 1 to 5%)."""
CPU_SHARE = 0.8
"""The rest of the machine goes on living; a CPU run that swaps is as good as dead."""
BF16_FROM = (8, 0)
"""The first compute capability with bf16 units (Ampere)."""
UUID_KINDS = ("GPU-", "MIG-")


@dataclass(frozen=True)
class Card:
    """The card that a run uses."""

    profile: CardProfile
    device: str
    """``cpu``, or ``cuda:0``: with ``environment`` the worker sees no other card."""
    name: str
    usable_bytes: int
    """The cap of the run: what the profile grants and what is free now, whichever is less."""
    total_bytes: int
    note: str = ""
    """What the user should know: a larger card that is capped, memory that others hold, no card."""
    index: int | None = None
    """As nvidia-smi counts; of a slice, that of its card; None on the CPU."""
    uuid: str | None = None
    """What NVML and CUDA know the card by, or the slice of one; None on the CPU."""
    stand_in: bool = False
    """Whether this is another kind of card than the profile's, so that its speed is another card's."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables for the worker process: it sees this card alone, however CUDA counts."""
        if self.uuid is None:
            return {}
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": self.uuid}


def detect(name: str, device: int | str | None = None, nvml: Driver | None = None) -> Card:
    """Find the card that ``--gpu NAME`` means on this machine.

    Args:
        name: a profile; ``auto`` takes the largest card, or the CPU where there is none.
        device: which card if there are several: its index, as nvidia-smi counts, or its UUID or the
            beginning of it (``GPU-...``, ``MIG-...``).
        nvml: the driver; the real one if None.

    Raises:
        DeviceError: the card is unknown, absent or too small; it says what to do.
    """
    wanted = profile(name)
    if wanted.name == "cpu":
        if device is not None:
            raise DeviceError(f"--device {device} names a GPU, but --gpu cpu uses none; drop one.")
        return _cpu("")
    driver = nvml or Driver()
    try:
        everything = driver.cards()
    finally:
        driver.close()
    cards = _visible(everything, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not cards and wanted.name == "auto" and device is None:
        return _cpu(f"No GPU is used: {_absence(everything, driver.silence)}.")
    return _gpu(wanted, _choose(wanted, _candidates(wanted, cards, everything, device, driver.silence)))


def _candidates(
    wanted: CardProfile,
    cards: Sequence[NvmlCard],
    everything: Sequence[NvmlCard],
    device: int | str | None,
    silence: str,
) -> Sequence[NvmlCard]:
    """The cards that may be used; at least one."""
    if not cards:
        asked = f"--gpu {wanted.name}" if wanted.name != "auto" else f"--device {device}"
        raise DeviceError(
            f"{asked} was asked for, but {_absence(everything, silence)}; use --gpu auto or --gpu cpu "
            "without --device, or run on a machine that has this card."
        )
    found = cards if device is None else _named(str(device).strip(), cards)
    if not found:
        hidden = _named(str(device).strip(), everything)
        why = "CUDA_VISIBLE_DEVICES hides it" if hidden else "no card, or more than one, has this name"
        raise DeviceError(f"--device {device}: {why}; use one of {_list(cards)}.")
    return found


def _named(entry: str, cards: Sequence[NvmlCard]) -> list[NvmlCard]:
    """The card with this index, UUID or beginning of a UUID, or its slices; none if it is ambiguous."""
    if entry.isdecimal():
        return [card for card in cards if card.index == int(entry)]
    if entry[:4].upper() not in UUID_KINDS:
        return []
    found = [card for card in cards if card.uuid.lower().startswith(entry.lower())]
    if not found:
        found = [card for card in cards if (card.parent_uuid or "").lower().startswith(entry.lower())]
        return found if len({card.index for card in found}) == 1 else []
    return found if len(found) == 1 else []


def _visible(cards: Sequence[NvmlCard], setting: str | None) -> list[NvmlCard]:
    """The cards that CUDA_VISIBLE_DEVICES shows, by CUDA's rules, but with indices as nvidia-smi counts.

    The list ends at the first entry that names no card, and one that names a card twice shows none.
    """
    if setting is None:
        return list(cards)
    shown: list[NvmlCard] = []
    for entry in setting.split(","):
        found = _named(entry.strip(), cards)
        if not found:
            break
        shown += found
    return shown if len({card.uuid for card in shown}) == len(shown) else []


def _choose(wanted: CardProfile, cards: Sequence[NvmlCard]) -> NvmlCard:
    """The largest card, or the one that is the profile's, or the smallest that can stand in for it."""
    needed = wanted.usable_bytes
    if needed is None:
        return max(cards, key=lambda card: (card.total_bytes, card.free_bytes))
    enough = [card for card in cards if card.total_bytes >= needed]
    if not enough:
        raise DeviceError(
            f"--gpu {wanted.name} needs {gib(needed)}, but here is only {_list(cards)}; "
            "use --gpu auto for the card that is here."
        )
    exact = [card for card in enough if wanted.fits(card.name)]
    return min(exact or enough, key=lambda card: (card.total_bytes, -card.free_bytes))


def _gpu(wanted: CardProfile, card: NvmlCard) -> Card:
    found = wanted if wanted.usable_bytes is not None else _recognise(card)
    stand_in = wanted.usable_bytes is not None and not wanted.fits(card.name)
    cap = wanted.usable_bytes or card.total_bytes
    usable = min(cap, card.free_bytes)
    notes = []
    if stand_in:
        article = "an" if wanted.name[0] in "ahlr" else "a"
        notes.append(
            f"--gpu {wanted.name} runs on the {card.name}, capped to {gib(cap)} of its memory; "
            f"its speed is not {article} {wanted.name}'s."
        )
    if usable < BUSY_SHARE * min(cap, card.total_bytes):
        notes.append(f"Other processes hold memory of the {card.name}; {gib(usable)} are left for this run.")
    board = found if stand_in else found.on(card.name)
    if card.capability is not None:  # what the card can do counts, whatever it stands in for
        board = replace(board, dtype="bf16" if card.capability >= BF16_FROM else "fp16")
    return Card(
        profile=board,
        device="cuda:0",
        name=card.name,
        usable_bytes=usable,
        total_bytes=card.total_bytes,
        note=" ".join(notes),
        index=card.index,
        uuid=card.uuid,
        stand_in=stand_in,
    )


def _recognise(card: NvmlCard) -> CardProfile:
    """The profile for a card that ``auto`` found; an unknown one gets a model by its memory."""
    for known in PROFILES.values():
        if known.fits(card.name) and card.total_bytes >= (known.usable_bytes or 0):
            return known
    unknown = PROFILES["auto"]
    if card.total_bytes >= SEVEN_B_BYTES:
        return unknown
    return replace(unknown, model=SMALL.model, revision=SMALL.revision)


def _absence(everything: Sequence[NvmlCard], silence: str) -> str:
    if everything:
        setting = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return f"CUDA_VISIBLE_DEVICES={setting!r} hides {_list(everything)}"
    return f"no NVIDIA card answers here ({silence})" if silence else "the NVIDIA driver knows no card"


def _cpu(note: str) -> Card:
    memory = host_memory()
    return Card(
        PROFILES["cpu"], "cpu", "CPU", int(CPU_SHARE * memory.available_bytes), memory.total_bytes, note
    )


def _list(cards: Sequence[NvmlCard]) -> str:
    """The cards as ``--device`` takes them: slices of a card share its index, so by their UUID."""
    return ", ".join(
        f"{card.uuid if card.parent_uuid else card.index} ({card.name}, {gib(card.total_bytes)})"
        for card in cards
    )
