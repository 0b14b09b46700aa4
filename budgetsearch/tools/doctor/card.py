"""The lines about torch, the card, CUDA, the driver, bitsandbytes and NVML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from budgetsearch.machine.detect import Card
from budgetsearch.machine.host import gib
from budgetsearch.tools.doctor.check import SETTLE, Check, divided, fail, ok, warn
from budgetsearch.tools.doctor.machine import Machine
from budgetsearch.tools.doctor.step import FUSED

NF4_TOLERANCE = 0.16
"""Largest error of nf4 as a share of its block's largest value: half of its widest gap (0.152), and a
little for the double quantization of the scales."""
CUDA_BUILD = (
    "Install torch for CUDA: on Linux pip install --force-reinstall torch takes such a build; those for "
    "older drivers and cards are at https://pytorch.org/get-started/locally."
)
DRIVER = "Install the NVIDIA driver until nvidia-smi lists the card; start a container with --gpus all."
NVML_REMEDIES: Mapping[str, str] = {
    "nvidia-ml-py": "pip install nvidia-ml-py",
    "mismatch": "Reboot: the driver was updated, but the kernel still runs the old one.",
    "permission": "Give this user access to /dev/nvidia*; the group of those files has it.",
}
"""By a word in what NVML says; anything else is a driver that is not there."""


def torch(machine: Machine) -> Check:
    """Whether torch can be imported, and which build it is."""
    answer = machine.answers["torch"]
    if problem := answer.get("problem"):
        return fail("torch", problem, "pip install --force-reinstall torch")
    built = f"built for CUDA {answer['built']}" if answer["built"] else "built for the CPU"
    return ok("torch", f"{answer['version']}, {built}")


def card(machine: Machine) -> Check:
    """What ``--gpu`` means here."""
    found = machine.card
    if found is None:
        return fail("card", *divided(machine.refusal))
    if machine.misses_its_card:
        return fail("card", "there is a card, but --gpu auto takes the CPU", SETTLE.format("nvml"))
    text = f"{found.name}, {gib(found.usable_bytes)} of {gib(found.total_bytes)} usable"
    if not found.note:
        return ok("card", text)
    text = f"{text}: {found.note.rstrip('.')}"
    if machine.on_cpu:
        return ok("card", text)
    return warn("card", text, "nvidia-smi lists who holds memory; --gpu auto uses a whole card.")


def cuda(machine: Machine) -> Check:
    """Whether torch sees the card that is meant, and computes on it."""
    torch_answer, answer = machine.answers["torch"], machine.answers["cuda"]
    if "problem" in torch_answer:
        return fail("cuda", "not tried, since torch does not load", SETTLE.format("torch"))
    if machine.on_cpu and not machine.misses_its_card:
        return ok("cuda", _unused(machine))
    if not torch_answer["built"]:
        return fail("cuda", f"torch {torch_answer['version']} cannot use a card", CUDA_BUILD)
    if problem := answer.get("problem"):
        return fail("cuda", problem, DRIVER)
    if not answer["count"]:
        return fail("cuda", f"torch sees no card: {answer['why']}", DRIVER)
    if machine.card is None or machine.on_cpu:
        settle = SETTLE.format("card" if machine.card is None else "nvml")
        return warn("cuda", f"torch sees {answer['count']} cards; none was tried", settle)
    return _computes(machine.card, answer, torch_answer["version"])


def _computes(found: Card, answer: Mapping[str, Any], version: str) -> Check:
    text = f"{found.device} is {answer['name']}, capability {answer['capability']}"
    if problem := answer.get("broken"):
        return fail("cuda", f"{text}; torch {version} does not compute on it: {problem}", CUDA_BUILD)
    if not answer["bf16"]:
        slow = "Expect slow training; cards of capability 8.0 or more (Ampere and later) have bf16."
        return warn("cuda", f"{text}, without bf16 units", slow)
    return ok("cuda", f"{text}, computes, has bf16")


def driver(machine: Machine) -> Check:
    """The driver's version, and whether it is new enough for the CUDA that torch was built with."""
    facts, built = machine.driver, machine.answers["torch"].get("built")
    if facts.silence:
        if machine.on_cpu and not machine.misses_its_card:
            return ok("driver", _unused(machine))
        return warn("driver", "unknown, since NVML does not answer", SETTLE.format("nvml"))
    text = f"{facts.version}, up to CUDA {facts.cuda[0]}.{facts.cuda[1]}"
    if not built or machine.on_cpu:
        return ok("driver", text)
    needed = tuple(int(part) for part in str(built).split(".")[:2])
    if facts.cuda >= needed:
        return ok("driver", f"{text}; torch wants {built}")
    # Within one major version every CUDA runs on every driver; above it only with NVIDIA's cuda-compat.
    if facts.cuda[0] == needed[0] or machine.answers["cuda"].get("count"):
        return ok("driver", f"{text}; torch wants {built} and makes do with it")
    return fail(
        "driver", f"{text}, too old for torch, which wants {built}", f"Update the driver. Or: {CUDA_BUILD}"
    )


def bitsandbytes(machine: Machine) -> Check:
    """Whether nf4 works on the device: a tensor is packed, unpacked and compared."""
    name, answer = "bitsandbytes", machine.answers["bitsandbytes"]
    if "problem" in machine.answers["torch"]:
        return fail(name, "not tried, since torch does not load", SETTLE.format("torch"))
    again = "pip install --upgrade --force-reinstall bitsandbytes; then python -m bitsandbytes says more."
    if problem := answer.get("problem"):
        return fail(name, problem, again)
    device = machine.card.device if machine.card is not None else "cpu"
    text = f"{answer['version']}, backends {', '.join(answer['backends']) or 'none'}"
    if not answer["nf4_error"] <= NF4_TOLERANCE:
        wrong = f"nf4 on {device} is off by {answer['nf4_error']:.2f} of the largest value"
        return fail(name, f"{text}; {wrong}, {NF4_TOLERANCE} is allowed", again)
    if not answer["library"]:
        return warn(name, f"{text}; its native library does not load, nf4 on {device} is slow", again)
    return ok(name, f"{text} ({answer['library']}), nf4 on {device} is right")


STEP_REMEDIES: Mapping[str, str] = {
    "out of memory": "nvidia-smi lists who holds memory; stop it, or take another card with --device.",
    "no kernel image": CUDA_BUILD,
    "busy or unavailable": DRIVER,
}
"""By a word in what a step says; else it is bitsandbytes' affair where it packs, and torch's for the rest."""


KERNELS = 'pip install "budgetsearch[gpu]"'
COMPILER = (
    "Triton compiles them: it wants a C compiler (gcc) and Python's headers, and a release for this card."
)


def step(machine: Machine) -> Check:
    """Whether the worker trains a real step of a tiny model on the card, under each kind of base."""
    if machine.on_cpu and not machine.misses_its_card:
        return ok("step", _unused(machine))
    answer = machine.answers.get("step", {})
    if machine.card is None or machine.on_cpu or not answer:
        return ok("step", "not tried: no card was asked")
    if problem := answer.get("problem"):
        return fail("step", f"no worker starts on the card: {problem}", _step_remedy("", problem))
    plain, answer = answer.get(FUSED, ""), {name: found for name, found in answer.items() if name != FUSED}
    wrong = {name: found["problem"] for name, found in answer.items() if "problem" in found}
    if wrong:
        name, problem = next(iter(wrong.items()))
        text = f"{', '.join(wrong)} cannot be trained on the card: {problem}"
        return fail("step", text, _step_remedy(name, problem))
    times = ", ".join(f"{name} {found['seconds']} s" for name, found in answer.items())
    text = f"the worker trains on the card, loading included: {times}"
    if plain:
        remedy = KERNELS if "not installed" in plain else COMPILER
        return warn("step", f"{text}; without Liger's kernels, by a quarter slower: {plain}", remedy)
    return ok("step", f"{text}; with Liger's kernels")


def _step_remedy(quantization: str, problem: str) -> str:
    known = [todo for word, todo in STEP_REMEDIES.items() if word in problem.lower()]
    if known:
        return known[0]
    return SETTLE.format("bitsandbytes") if quantization in ("nf4", "int8") else CUDA_BUILD


def nvml(machine: Machine) -> Check:
    """Whether the driver tells what cards there are and what memory they have left."""
    facts = machine.driver
    if not facts.silence:
        cards = [
            f"{c.index} {c.name} ({gib(c.free_bytes)} of {gib(c.total_bytes)} free)" for c in facts.cards
        ]
        return ok("nvml", "; ".join(cards) or "answers, and knows no card")
    if machine.on_cpu and not machine.misses_its_card:
        return ok("nvml", f"{_unused(machine)} ({facts.silence})")
    words = [word for word in NVML_REMEDIES if word in facts.silence.lower()]
    return fail("nvml", f"does not answer: {facts.silence}", NVML_REMEDIES[words[0]] if words else DRIVER)


def _unused(machine: Machine) -> str:
    return "not needed for --gpu cpu" if machine.gpu == "cpu" else "not needed: --gpu auto takes the CPU"


CHECKS = (torch, card, cuda, driver, bitsandbytes, nvml, step)
"""In the order of their lines."""
