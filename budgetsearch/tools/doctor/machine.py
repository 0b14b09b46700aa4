"""What the driver and the libraries say about the card: asked once, judged in ``card``."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import DeviceError
from budgetsearch.engines.local import allocator
from budgetsearch.machine import child
from budgetsearch.machine.detect import Card, detect
from budgetsearch.machine.nvml import Driver, NvmlCard
from budgetsearch.tools.doctor.check import SETTLE, describe
from budgetsearch.tools.doctor.probe import QUESTIONS

PROBE_SECONDS = 180.0
"""A cold disk needs a minute for torch; a driver that hangs needs for ever."""
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")
"""There while the driver's kernel module is loaded, whether or not NVML answers."""

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class DriverFacts:
    """What the driver says about itself."""

    cards: tuple[NvmlCard, ...] = ()
    silence: str = ""
    """Why it says nothing; empty if it answers."""
    version: str = ""
    cuda: tuple[int, int] = (0, 0)
    """The newest CUDA that it supports."""


@dataclass(frozen=True)
class Machine:
    """Everything that was asked about the card."""

    gpu: str
    """As ``--gpu`` names it, in small letters."""
    card: Card | None
    """What that means here; None: nothing."""
    driver: DriverFacts
    answers: Mapping[str, Answer]
    """The probe's answers by question; ``problem`` stands in for one that it could not give."""
    refusal: str = ""
    """Why ``gpu`` means nothing here."""
    kernel_driver: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether a run would use no card."""
        return self.card is not None and self.card.device == "cpu"

    @property
    def misses_its_card(self) -> bool:
        """Whether ``--gpu auto`` takes the CPU only because NVML does not tell of the card."""
        seen = self.kernel_driver or self.answers["cuda"].get("count", 0) > 0
        return self.on_cpu and self.gpu == "auto" and bool(self.driver.silence) and seen


def ask(gpu: str, device: int | str | None) -> Machine:
    """Ask the driver and the libraries; takes as long as importing torch."""
    card, refusal = None, ""
    try:
        card = detect(gpu, device)
    except DeviceError as error:
        refusal = str(error)
    except Exception as error:  # from the depths of NVML; what torch and the disk say is still worth hearing
        refusal = f"{describe(error)}; {SETTLE.format('nvml')}"
    gpu = gpu.strip().lower()
    return Machine(gpu, card, ask_driver(), ask_libraries(card), refusal, KERNEL_DRIVER.exists())


def ask_driver() -> DriverFacts:
    """The cards and versions by NVML, or why it says nothing."""
    driver = Driver()
    try:
        cards = driver.cards()
        if driver.silence:
            return DriverFacts(silence=driver.silence)
        version, cuda = _driver_versions()
        return DriverFacts(cards, "", version, cuda)
    except Exception as error:  # NVML's own exceptions have no name before its package is imported
        return DriverFacts(silence=describe(error))
    finally:
        driver.close()


def _driver_versions() -> tuple[str, tuple[int, int]]:
    import pynvml

    pynvml.nvmlInit()
    try:
        number = int(pynvml.nvmlSystemGetCudaDriverVersion())  # 12080 for 12.8
        return str(pynvml.nvmlSystemGetDriverVersion()), (number // 1000, number % 1000 // 10)
    finally:
        pynvml.nvmlShutdown()


def ask_libraries(card: Card | None, seconds: float = PROBE_SECONDS) -> dict[str, Answer]:
    """What the probe answers on this card; on the CPU where there is none."""
    device = card.device if card is not None else "cpu"
    own = card.environment if card is not None else {}
    environment = child.environment({**allocator(), **own})  # not every driver can do what it asks for
    program = child.python("budgetsearch.tools.doctor.probe", device)
    try:
        done = subprocess.run(
            program, env=environment, cwd=child.NEUTRAL, capture_output=True, timeout=seconds, check=False
        )
        printed, problem = done.stdout, _ending(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as error:
        printed, problem = error.stdout or b"", f"no answer within {seconds:.0f} s"
    answers: dict[str, Answer] = {}
    for text in printed.decode("utf-8").splitlines():
        answers |= read_json(text)
    for name in QUESTIONS:
        if name not in answers:
            answers[name] = {"problem": problem}
            problem = "not tried, since the process that tries it has ended before"
    return answers


def _ending(code: int, words: bytes) -> str:
    """How the probe ended, if it did so before its last answer, and the last that was heard of it."""
    end = f"code {code}" if code >= 0 else signal.Signals(-code).name
    if code == -signal.SIGILL:
        end += ", this processor lacks an instruction that it uses"
    last = words.decode("utf-8", "replace").strip().splitlines()[-1:]
    return f"ends its process ({end})" + "".join(f": {text}" for text in last)
