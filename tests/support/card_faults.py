"""What is traced on the fake card, and the faults that the guard has to see: one process for all of it.

``python -m tests.support.card_faults NAME ...`` prints a line of JSON for each name: what is wrong with it.
The engine of autograd counts devices once in a process, so the fake card wants one of its own.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

from benchmarks.training.kernels import PRODUCTS
from benchmarks.training.trace import Setup, Step, Traced, evaluation, fake_card, foreseen, step
from budgetsearch.core.records import CalibrateJob
from budgetsearch.machine import memory as foresight
from budgetsearch.training import attention, batches, calibrate, evaluate, gang, losses, recipe
from budgetsearch.training.members import Member

LAYERS = (1, 2)
"""What a layer adds is the difference."""
WHOLE = 32
"""Layers of a 7B."""
PEAK_MARGIN = 0.05
"""Of the peak of the whole model, against what is foreseen."""
KERNELS: Mapping[str, int] = {
    "plain": 141,
    "dropout": 183,
    "recompute": 189,
    "nf4": 175,
    "nf4 recompute": 226,
    "fused": 74,
}
"""A layer's, of one member in one pass and its share of the step."""
ROWS = (1020, 1000)
"""Of a step: rounded up they have one width."""
LARGE_VOCABULARY = "meta-llama/Llama-3.1-8B"

PLAIN = Setup(rows=ROWS)
CASES: Mapping[str, Setup] = {
    "plain": PLAIN,
    "dropout": replace(PLAIN, dropout=0.05, micro_batch=1),
    "recompute": replace(PLAIN, recompute=True),
    "nf4": replace(PLAIN, quantization="nf4"),
    "nf4 recompute": replace(PLAIN, quantization="nf4", recompute=True),
    "fused": replace(PLAIN, fused=True),
    "gang": replace(PLAIN, members=4, rank=128, dropout=0.05, rows=(512, 400)),
    "fp32": replace(PLAIN, quantization="fp32"),
    "fp16 before Ampere": replace(PLAIN, half="fp16", capability=(7, 0)),
}


def wrong_steps(name: str) -> list[str]:
    """What is wrong with the steps of a case; nothing, as it should be."""
    setup = CASES[name]
    few, more = (_traced(replace(setup, layers=layers)) for layers in LAYERS)
    wrong = _wrong_step(few)
    added = LAYERS[1] - LAYERS[0]
    kernels = (len(more.kernels) - len(few.kernels)) / added / few.passes
    if name in KERNELS and kernels > KERNELS[name]:
        wrong.append(f"kernels: {kernels:.0f} a layer and pass, {KERNELS[name]} are allowed")
    peak = few.peak_bytes + (more.peak_bytes - few.peak_bytes) / added * (WHOLE - LAYERS[0])
    share = peak / foreseen(replace(setup, layers=WHOLE))
    least = 0.0 if setup.fused else 1 - PEAK_MARGIN  # plan does not count on fused kernels
    if not least <= share <= 1 + PEAK_MARGIN:
        wrong.append(f"peak: {share:.3f} of what is foreseen")
    return wrong


def _traced(setup: Setup) -> Step:
    with fake_card(setup.capability) as trace:
        return step(Traced.on(setup, trace))


def _wrong_step(found: Step) -> list[str]:
    wrong = [f"meeting: {name}" for name in found.meetings]
    if sum(found.waits.values()) != 1:
        wrong.append(f"waits: {found.waits} in {found.passes} passes, one a step is allowed")
    return wrong + _wrong_widths(found) + _wrong_types(found)


def _wrong_widths(found: Step) -> list[str]:
    return [f"width: {width}" for width in found.widths if width % batches.CARD_WIDTHS]


def _wrong_types(found: Step) -> list[str]:
    full = [k for k in found.kernels if k.name in PRODUCTS and k.dtype != "bfloat16" and k.dtype != "float16"]
    return [f"types: {full[0].name} in {full[0].dtype}"] if full else []


def wrong_first_layer(name: str) -> list[str]:
    """What one layer shows already, which is all but kernels a layer and the whole peak."""
    return _wrong_step(_traced(replace(CASES[name], layers=1)))


def wrong_evaluation() -> list[str]:
    """What is wrong with an evaluation: nothing but the losses is waited for, and products are in 16 bits."""
    with fake_card() as trace:
        found = evaluation(Traced.on(PLAIN, trace), rows=2)
    return [f"meeting: {name}" for name in found.meetings] + _wrong_widths(found) + _wrong_types(found)


def wrong_head() -> list[str]:
    """What is wrong with the loss over a large vocabulary: at most a product for every 256 positions."""
    setup = replace(PLAIN, model=LARGE_VOCABULARY)
    found = _traced(setup)
    heads = [k for k in found.kernels if k.name == "mm" and k.shape[-1] > 100_000]
    most = -(-sum(length // 2 for length in ROWS) // 256)
    return [f"head: {len(heads)} products, {most} are enough"] if len(heads) > most else []


def wrong_calibration() -> list[str]:
    """What is wrong with a probe's peak: it is that of the longest rows once there are states."""
    setup = replace(PLAIN, rank=128, rows=(1024, 512))
    job = CalibrateJob(-1, "bf16", (setup.rank,), 2, 600.0, probe_seconds=0.0)
    with fake_card() as trace:
        traced = Traced.on(setup, trace)
        with (
            patch.object(Member, "_new", classmethod(lambda cls, *args: _member(traced, *args))),
            patch("budgetsearch.training.members.Adapter.fresh", lambda *args, **rest: traced.adapter()),
            patch("budgetsearch.training.recipe._no_room", lambda *args: ""),
            patch.object(batches.DataOrder, "step_rows", lambda self, number: [1, 1]),
        ):
            probe = calibrate._Bench(traced.base, job, traced.shop).probe(1, 2, False)
        truth = step(traced).peak_bytes
    share = probe.peak_bytes / truth
    return [] if share > 0.99 else [f"probe: {share:.3f} of the peak of the same rows later on"]


_real_new = Member.__dict__["_new"].__func__


def _member(traced: Traced, *args: Any) -> Member:
    found: Member = _real_new(Member, *args)
    return found


CHECKS: Mapping[str, Callable[[], list[str]]] = {
    **{name: (lambda name=name: wrong_steps(name)) for name in CASES},  # type: ignore[misc]
    "evaluation": wrong_evaluation,
    "head": wrong_head,
    "calibration": wrong_calibration,
}


# ------------------------------------------------------------------------------- the faults


@contextmanager
def _wide_masks() -> Iterator[None]:
    """Dropout as numbers in 32 bits, and a comparison."""

    def fill(self: Any, mask: torch.Tensor, k: int, number: int) -> torch.Tensor:
        return mask.copy_(torch.rand(mask.shape, device=mask.device) >= self.dropout[k])

    with patch.object(gang.Worn, "_fill", fill):
        yield


def _blind(shape: Any, training: Any) -> float:
    """An estimate that knows no copies of the base."""
    return 0.0


ONE_LAYER = "one layer, "
"""Before the name of a case: the cheaper check is enough."""
FAULTS: Mapping[str, tuple[str, Callable[[], Any], str]] = {
    "a wait in every pass": (
        ONE_LAYER + "plain",
        lambda: patch.object(recipe, "unmasked", _nothing),
        "waits",
    ),
    "grouped heads before Ampere": (
        ONE_LAYER + "fp16 before Ampere",
        lambda: patch.object(attention, "GROUPED_FROM", (0, 0)),
        "meeting: math attention",
    ),
    "rows that stay on the CPU": (
        ONE_LAYER + "plain",
        lambda: patch.object(batches.Batch, "to", _stay),
        "meeting",
    ),
    "rows that are waited for": (
        ONE_LAYER + "plain",
        lambda: patch.object(batches.Batch, "to", _wait),
        "waits",
    ),
    "dropout in 32 bits": ("dropout", _wide_masks, "kernels"),
    "every width its own": ("evaluation", lambda: patch.object(evaluate, "width_step", lambda d: 1), "width"),
    "an evaluation in 32 bits": ("evaluation", lambda: patch.object(evaluate, "mixed", _nothing), "types"),
    "little logits": ("head", lambda: patch.object(losses, "CARD_ROWS", 1), "head"),
    "a probe without states": (
        "calibration",
        lambda: patch.object(Member, "make_states", lambda self: None),
        "probe",
    ),
    "an estimate without copies": ("fp32", lambda: patch.object(foresight, "_workspace", _blind), "peak"),
}
"""By what is put back: the check that must see it, how it is put back, and what the check says."""


def _nothing(*args: Any, **rest: Any) -> Any:
    return nullcontext()


def _stay(self: Any, device: str) -> Any:
    return self


def _wait(self: Any, device: str) -> Any:
    return replace(self, **{name: getattr(self, name).to(device) for name in ("ids", "places", "labels")})


def main(names: list[str]) -> None:
    """Print what is wrong with each, as soon as it is known."""
    gc.freeze()  # a peak is measured once what came before is gone: else a million objects are gone through
    for name in names:
        check, fault, _ = FAULTS.get(name, (name, nullcontext, ""))
        try:
            with fault():
                known = CHECKS.get(check)
                found = known() if known else wrong_first_layer(check.removeprefix(ONE_LAYER))
        except FakeTensorDeviceMismatchError as error:
            found = [f"meeting: {error}"]
        print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [*CHECKS, *FAULTS])
