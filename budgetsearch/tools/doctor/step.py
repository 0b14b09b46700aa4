"""One real step of a tiny model on the card, by the worker's own workshop, under each kind of base."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from budgetsearch.core.records import Schedule, Segment, TrainJob, WorkerSetup
from budgetsearch.tools.doctor.check import describe

QUANTIZATIONS = ("fp32", "bf16", "nf4", "int8")
FUSED = "fused"
"""Why Liger's kernels are not used; empty: they are."""
ROWS = 12
TURN, PAD = "<turn>", "<pad>"


def ask_step(device: str) -> dict[str, Any]:
    """Seconds of a step under each kind of base, or what went wrong with it; nothing on the CPU, where the
    first trial shows it as soon."""
    return {} if device == "cpu" else try_steps(device)


def try_steps(device: str) -> dict[str, Any]:
    """The same on any device; what fails before the first step is the answer to all."""
    from budgetsearch.training.fused import refused
    from budgetsearch.training.workshop import Workshop

    with tempfile.TemporaryDirectory(prefix="budgetsearch-doctor-") as name:
        setup = _setup(Path(name), device)
        workshop = Workshop(setup, lambda message: None, lambda job_id: False)
        try:
            found = {quantization: _step(workshop, quantization) for quantization in QUANTIZATIONS}
            return found | {FUSED: refused(device)}
        finally:
            workshop.close()


def _step(workshop: Any, quantization: str) -> dict[str, Any]:
    start = time.monotonic()
    segment = Segment(
        trial_id=0,
        params={"quantization": quantization, "rank": 4, "learning_rate": 1e-3, "dropout": 0.05},
        seed=0,
        rung=0,
        start_tokens=0,
        stop_tokens=1,
        schedule=Schedule(0, 1),
        batch_size=4,
        micro_batch=2,
    )
    try:
        (result,) = workshop.train(TrainJob(0, (segment,), eval_examples=2, limit_seconds=30.0))
    except Exception as error:  # whatever goes wrong with one kind, the next one is asked all the same
        workshop.forget(quantization)
        return {"problem": describe(error)}
    if result.status != "ok":
        return {"problem": f"{result.status}: {result.detail}"}
    return {"seconds": round(time.monotonic() - start, 1)}


def _setup(folder: Path, device: str) -> WorkerSetup:
    """A model of two random layers and a few rows."""
    from budgetsearch.training.data.tokens import Sources, prepare

    model, rows = folder / "model", folder / "rows.jsonl"
    _write_model(model)
    lines = [json.dumps({"prompt": f"{n} and {n} are", "completion": str(2 * n)}) for n in range(ROWS)]
    rows.write_text("\n".join(lines), encoding="utf-8")
    data = prepare(model, Sources(str(rows)), max_length=128, cache=folder)
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    return WorkerSetup(
        model_path=str(model),
        model_name="doctor",
        data_path=str(data.folder),
        checkpoint_path=str(checkpoints),
        device=device,
        targets="all-linear",
        seed=0,
        half=_half(device),
    )


def _half(device: str) -> str:
    import torch

    old = device != "cpu" and torch.cuda.get_device_capability(device) < (8, 0)
    return "fp16" if old else "bf16"


def _write_model(folder: Path) -> None:
    """Grouped heads, as most models have them, and a byte for a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=TURN, pad_token=PAD)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
