"""Card profiles: what each card offers, and what a run on it uses unless told otherwise.

The data stand in ``cards.yaml``, next to this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from budgetsearch.core.errors import DeviceError, nearest
from budgetsearch.machine.host import GIB

CARDS = Path(__file__).with_name("cards.yaml")
Dtype = Literal["bf16", "fp16", "fp32"]
SLICE = re.compile(r"\bMIG\b")
"""In the name of a slice, which also contains the name of its card."""


@dataclass(frozen=True)
class CardProfile:
    """A kind of card, and the defaults of a run on it."""

    name: str
    model: str
    data: str
    space: str
    dtype: Dtype
    """What the base model computes in."""
    batch_size: int
    """Effective batch in sequences."""
    max_length: int
    """Longest row in tokens."""
    source: str
    """Where ``usable_bytes`` comes from."""
    revision: str | None = None
    """Commit of ``model`` on the Hub."""
    pattern: str = ""
    """Regular expression that the NVML device name must contain; empty: any."""
    usable_bytes: int | None = None
    """What programs really get; None: measured where the run starts."""
    tflops: float | None = None
    """Peak dense 16-bit tensor throughput in TFLOP/s, without sparsity; None: unknown."""
    bandwidth_gbs: float | None = None
    """Peak memory bandwidth in GB/s; None: unknown."""
    speed_source: str = ""
    """Where ``tflops`` and ``bandwidth_gbs`` come from."""
    boards: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Speeds of boards that differ, by what their name contains."""

    def fits(self, name: str) -> bool:
        """Whether a device of this name is this kind of card; a slice of one is not."""
        return bool(self.pattern) and not SLICE.search(name) and re.search(self.pattern, name) is not None

    def on(self, name: str) -> CardProfile:
        """This profile with the speeds of the board that has this device name."""
        for part, speeds in self.boards.items():
            if part in name:
                return replace(
                    self,
                    tflops=speeds.get("tflops", self.tflops),
                    bandwidth_gbs=speeds.get("bandwidth_gbs", self.bandwidth_gbs),
                )
        return self


def read_profiles(path: Path = CARDS) -> Mapping[str, CardProfile]:
    """The profiles of a file, by name and in its order."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: _profile(name, content["defaults"], card) for name, card in content["cards"].items()}


def _profile(name: str, defaults: Mapping[str, Any], own: Mapping[str, Any]) -> CardProfile:
    card = {**defaults, **own}
    if "model" in own:
        card["revision"] = own.get("revision")
    usable_gib = card.pop("usable_gib", None)
    usable_bytes = None if usable_gib is None else int(usable_gib * GIB)
    return CardProfile(name=name, usable_bytes=usable_bytes, **card)


PROFILES: Mapping[str, CardProfile] = read_profiles()


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
