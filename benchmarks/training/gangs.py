"""A gang against the same trials one after another with plain PEFT and a transformers Trainer.

For every quantization and size of micro-batch: tokens per second, wall seconds per trial (loading the
base and setting up included, the way a loop over Optuna trials pays them), and peak memory, for gangs of
1, 2, 4, ... members. Rows have one length, so neither side has padding. Both sides run in turn in one
process, before and after each other, because machines are noisy.

    python -m benchmarks.training.gangs                                  # SmolLM2-135M on the CPU
    python -m benchmarks.training.gangs --device cuda:0 --shape 1b --quantizations bf16,nf4
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.training.common import device_name, fetch, say, write
from budgetsearch.core.records import Params, Schedule, Segment
from budgetsearch.training.bases import load_base
from budgetsearch.training.calibrate import saturated
from budgetsearch.training.data.store import TokenSet, writing
from budgetsearch.training.gang import Gang
from budgetsearch.training.members import Shop
from budgetsearch.training.memory import free, is_memory_error, peak_bytes, start_peak
from budgetsearch.training.recipe import GangTraining

ROW = 256
"""Longest row, in tokens; larger micro-batches have more rows."""
RANK = 16
RATE = 1e-5
SHAPES = {  # (vocabulary, hidden, intermediate, layers, heads, key-value heads)
    "0.1b": (49152, 576, 1536, 30, 9, 3),  # SmolLM2-135M
    "1b": (128256, 2048, 8192, 16, 32, 8),  # Llama-3.2-1B
    "7b": (32000, 4096, 14336, 32, 32, 8),  # Mistral-7B
}


@dataclass
class Measured:
    """What some steps of one way to train came to."""

    tokens_per_second: float
    seconds_per_trial: float
    """Wall time, loading and setting up included, for the steps that were run."""
    peak_bytes: int


def random_model(shape: str, folder: Path) -> Path:
    """Random weights of a real shape, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, hidden, intermediate, layers, heads, shared = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        tie_word_embeddings=shape != "7b",
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    return folder


def rows_of(length: int, count: int, vocabulary: int) -> TokenSet:
    """Random rows of one length; the second half of each is its completion."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, vocabulary, (count, length), generator=generator, dtype=torch.int32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        with writing(path) as writer:
            for row in tokens.tolist():
                writer.add(row, [index >= length // 2 for index in range(length)])
        return TokenSet(path)


class Bench:
    """Measurements on one base model."""

    def __init__(self, path: Path, device: str, seconds: float) -> None:
        self.path, self.device, self.seconds = path, device, seconds
        self.base: Any = None

    def sequential(self, quantization: str, data: TokenSet, micro: int) -> Measured:
        """One trial with PEFT and the Trainer: load, put the adapter on, train."""
        from peft import LoraConfig, get_peft_model
        from transformers import Trainer, TrainerCallback, TrainingArguments

        self.base = None
        free(self.device)
        start_peak(self.device)
        marks: list[float] = []
        begun = time.monotonic()

        class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
            """Notes when each step ends; the last one comes when the time is up."""

            def on_step_end(watch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: N805
                if self.device != "cpu":
                    torch.cuda.synchronize()
                marks.append(time.monotonic())
                control.should_training_stop = done(marks, self.seconds)

        model = load_base(str(self.path), quantization, self.device)
        adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=micro,
                max_steps=10_000,
                learning_rate=RATE,
                use_cpu=self.device == "cpu",
                bf16=self.device != "cpu",
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=self.device != "cpu",
            )
            examples = [_example(*data.row(index)) for index in range(len(data))]
            Trainer(model=adapted, args=arguments, train_dataset=examples, callbacks=[Watch()]).train()
        wall = time.monotonic() - begun
        return self._measured(marks, micro * int(data.lengths[0]), wall)

    def gang(self, quantization: str, data: TokenSet, micro: int, members: int) -> Measured:
        """The same trials at once on a resident base."""
        if self.base is None:
            self.base = load_base(str(self.path), quantization, self.device)
        start_peak(self.device)
        begun = time.monotonic()
        training = GangTraining.set_up(
            self.base, [_segment(number, quantization, micro) for number in range(members)], self._shop(data)
        )
        gang, marks = Gang(self.base, [m.adapter for m in training.members]), list[float]()
        with gang.worn():
            while not done(marks, self.seconds):
                training.step_on(gang, training.members)
                marks.append(time.monotonic())
        wall = (time.monotonic() - begun) / members
        return self._measured(marks, members * micro * int(data.lengths[0]), wall)

    def _measured(self, marks: list[float], tokens: int, wall: float) -> Measured:
        step = statistics.median(b - a for a, b in pairwise(marks))
        return Measured(tokens / step, wall, peak_bytes(self.device))

    def _shop(self, data: TokenSet) -> Shop:
        return Shop(
            data=SimpleNamespace(train=data),  # type: ignore[arg-type]
            model_path=self.path,
            checkpoint_path=Path(),
            device=self.device,
            targets="all-linear",
            base_name="base",
            seed=0,
            pad=0,
            beat=lambda trial, activity, tokens, loss: None,
            stopping=lambda: False,
            peak_bytes=lambda: 0,
        )


def done(marks: list[float], seconds: float) -> bool:
    """Whether enough steps were timed; the first one only warms up."""
    return len(marks) >= 4 and marks[-1] - marks[0] >= seconds


def _example(ids: Any, trained: Any) -> dict[str, list[int]]:
    labels = [token if flag else -100 for token, flag in zip(ids.tolist(), trained, strict=True)]
    return {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels}


def _segment(number: int, quantization: str, micro: int) -> Segment:
    params: Params = {"quantization": quantization, "rank": RANK, "learning_rate": RATE}
    schedule = Schedule(0, 10**12)
    return Segment(number, params, number, 0, 0, 10**12, schedule, batch_size=micro, micro_batch=micro)


def measure(bench: Bench, quantization: str, size: int, sizes: list[int], most: int) -> dict[str, Any]:
    """One row of the table: the sequential way before and after the gangs."""
    length = min(size, ROW)
    micro = size // length
    vocabulary = 32_000
    data = rows_of(length, 64 * micro, vocabulary)
    before = bench.sequential(quantization, data, micro)
    gangs: dict[int, Measured] = {}
    for members in sizes:
        if members * size > most:
            break
        try:
            gangs[members] = bench.gang(quantization, data, micro, members)
        except Exception as error:
            if not is_memory_error(error):
                raise
            break
        say(f"{quantization} {size} x {members}: {gangs[members]}")
    after = bench.sequential(quantization, data, micro)
    rate = statistics.fmean([before.tokens_per_second, after.tokens_per_second])
    say(f"{quantization} {size} sequential: {before} {after}")
    return {
        "quantization": quantization,
        "tokens": size,
        "sequential": {
            "tokens_per_second": round(rate, 1),
            "both": [round(m.tokens_per_second, 1) for m in (before, after)],
            "seconds_per_trial": round(min(before.seconds_per_trial, after.seconds_per_trial), 2),
            "peak_gib": round(max(before.peak_bytes, after.peak_bytes) / 2**30, 2),
        },
        "gangs": {
            str(members): {
                "tokens_per_second": round(m.tokens_per_second, 1),
                "times_sequential": round(m.tokens_per_second / rate, 3),
                "seconds_per_trial": round(m.seconds_per_trial, 2),
                "peak_gib": round(m.peak_bytes / 2**30, 2),
            }
            for members, m in gangs.items()
        },
    }


def judge(rows: list[dict[str, Any]]) -> None:
    """Add to each row what saturation allows, what the calibration's rule would choose, and the share."""
    for quantization in {row["quantization"] for row in rows}:
        mine = [row for row in rows if row["quantization"] == quantization]
        best = max(row["sequential"]["tokens_per_second"] for row in mine)
        for row in mine:
            rates = {int(k): v["tokens_per_second"] for k, v in row["gangs"].items()}
            sizes = sorted(rates)
            chosen = sizes[saturated([rates[size] for size in sizes])[0]]
            gain = rates[chosen] / row["sequential"]["tokens_per_second"]
            limit = best / row["sequential"]["tokens_per_second"]
            row["chosen"] = chosen
            row["gain"], row["limit"] = round(gain, 3), round(limit, 3)
            row["share_of_limit"] = round(gain / limit, 3)


def markdown(rows: list[dict[str, Any]], sizes: list[int]) -> str:
    """The table of the docs: tokens per second, in brackets as a multiple of the sequential way's."""
    heads = ["base", "tokens", "PEFT + Trainer", *[f"gang of {n}" for n in sizes]]
    heads += ["chosen: gain, of the limit"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        rates = [row["gangs"].get(str(n)) for n in sizes]
        cells = [f"{r['tokens_per_second']:.0f} ({r['times_sequential']:.2f})" if r else "" for r in rates]
        verdict = f"{row['chosen']}: {row['gain']:.2f}, {row['share_of_limit']:.0%} of {row['limit']:.2f}"
        rate = f"{row['sequential']['tokens_per_second']:.0f}"
        lines.append([row["quantization"], str(row["tokens"]), rate, *cells, verdict])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Measure everything, write the JSON after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights; without: SmolLM2-135M")
    parser.add_argument("--quantizations", default=None, help="default: fp32,bf16,nf4; on a card bf16,nf4")
    parser.add_argument("--tokens", default="64,128,256,512,1024,2048", help="per micro-batch")
    parser.add_argument("--members", default="1,2,4,8,16")
    parser.add_argument("--most", type=int, default=None, help="positions at once; default 4096, card 65536")
    parser.add_argument("--seconds", type=float, default=5.0, help="of steps that are timed")
    parser.add_argument("--name", default=None, help="of the JSON; default: gangs-DEVICE[-SHAPE]")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cpu = options.device == "cpu"
    quantizations = (options.quantizations or ("fp32,bf16,nf4" if cpu else "bf16,nf4")).split(",")
    most = options.most or (4096 if cpu else 65536)
    sizes = [int(m) for m in options.members.split(",")]
    kind = "cpu" if cpu else device_name(options.device).replace(" ", "-").lower()
    name = options.name or "-".join(filter(None, ("gangs", kind, options.shape)))
    with tempfile.TemporaryDirectory() as folder:
        path = random_model(options.shape, Path(folder)) if options.shape else fetch().path
        bench = Bench(path, options.device, options.seconds)
        rows: list[dict[str, Any]] = []
        for quantization in quantizations:
            for size in (int(t) for t in options.tokens.split(",")):
                rows.append(measure(bench, quantization, size, sizes, most))
                bench.base = None
                gc.collect()
                judge(rows)
                found = {
                    "device": device_name(options.device),
                    "torch": torch.__version__,
                    "model": options.shape or "SmolLM2-135M",
                    "rank": RANK,
                    "row": ROW,
                    "rows": rows,
                }
                out = write(name, found, options.out)
    print(markdown(rows, sizes))
    print(out)


if __name__ == "__main__":
    main()
